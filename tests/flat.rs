//! Buffers that other threads read through the one that owns the device.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::channel;
use std::time::Duration;

use isobath::Error;
use isobath::flat::{Elements, FlatBuffer, Reader, with_two_readers};

#[test]
fn each_reader_gets_its_buffer_and_the_errors_of_its_reading() {
    let sum = |mut reader: Reader, buffer: FlatBuffer| -> isobath::Result<f32> {
        reader.buffer = buffer;
        let first: f32 = reader.get(0..3)?.iter().sum();
        Ok(first + reader.get(3..4)?.iter().sum::<f32>())
    };
    let (one, other) = with_two_readers(
        &mut |buffer, first, values| {
            if buffer == FlatBuffer::Moment2 && first == 3 {
                return Err(Error::Usage { what: "gone".into(), remedy: "none".into() });
            }
            values.iter_mut().zip(first..).for_each(|(value, at)| *value = at as f32);
            Ok(())
        },
        |reader| sum(reader, FlatBuffer::Moment1),
        |reader| sum(reader, FlatBuffer::Moment2),
    )
    .unwrap();
    assert_eq!(one.unwrap(), 6.0);
    assert_eq!(other.unwrap_err().to_string(), "gone\n  remedy: none");
}

/// The readers are not left waiting: the panic comes through, and so would a defect's message.
#[test]
fn a_panic_of_the_reading_thread_ends_the_readers() {
    let (done, ended) = channel();
    std::thread::spawn(move || {
        let (answer, answers) = channel();
        let read = |reader: &mut Reader| reader.get(0..1).map(|_| ());
        let send =
            |mut reader: Reader| answer.send([read(&mut reader), read(&mut reader)]).unwrap();
        let panic = catch_unwind(AssertUnwindSafe(|| {
            with_two_readers(&mut |_, _, _| panic!("no device"), send, send)
        }));
        let panic = panic.expect_err("the panic of the reading thread");
        let message = panic.downcast_ref::<&str>().unwrap().to_string();
        drop(answer);
        done.send((message, answers.iter().flatten().collect::<Vec<_>>())).unwrap();
    });
    let (panic, answers) = ended.recv_timeout(Duration::from_secs(60)).expect("readers that end");
    assert_eq!((panic.as_str(), answers.len()), ("no device", 4));
    for answer in answers {
        let error = answer.unwrap_err();
        assert!(matches!(error, Error::Internal { .. }), "{error}");
        assert_eq!(error.exit_code(), 1);
    }
}
