//! The flat buffers of a run, piece by piece: no copy of a whole one is made in host memory.
//!
//! Whoever owns the buffers gives or takes elements; whoever writes or reads files does so in
//! chunks of [`CHUNK_ELEMENTS`]. A device belongs to one thread: [`with_two_readers`] lets files be
//! written on two others, which ask that one for their next chunk. What lies in the buffers is not
//! known here.

use std::ops::Range;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::thread::{self, ScopedJoinHandle};

use crate::error::{Error, Result};

/// Elements of a buffer that are in host memory at one time: 4 MiB of f32, for which even a host
/// link of 5 GB/s takes far longer (0.8 ms) than the start of a copy.
pub const CHUNK_ELEMENTS: usize = 1 << 20;

/// The flat buffers that are the state of a run; the gradient's is not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlatBuffer {
    Parameters,
    Moment1,
    Moment2,
}

impl FlatBuffer {
    pub const ALL: [FlatBuffer; 3] =
        [FlatBuffer::Parameters, FlatBuffer::Moment1, FlatBuffer::Moment2];

    /// Its tensor's in a checkpoint.
    pub fn name(self) -> &'static str {
        match self {
            FlatBuffer::Parameters => "parameters",
            FlatBuffer::Moment1 => "moment1",
            FlatBuffer::Moment2 => "moment2",
        }
    }
}

/// Copies elements out of a buffer, from the given one on, as they would be stored in f32.
pub type ReadFlat<'a> = dyn FnMut(FlatBuffer, usize, &mut [f32]) -> Result<()> + 'a;

/// One flat buffer that is read front to back, or at least piece by piece.
pub trait Elements {
    /// These elements, until the next ones are asked for. At most [`CHUNK_ELEMENTS`] or a few more
    /// are asked for at one time.
    fn get(&mut self, range: Range<usize>) -> Result<&[f32]>;
}

impl Elements for &[f32] {
    fn get(&mut self, range: Range<usize>) -> Result<&[f32]> {
        Ok(&self[range])
    }
}

/// `elements` of a buffer in pieces of at most [`CHUNK_ELEMENTS`].
pub fn chunks(elements: usize) -> impl Iterator<Item = Range<usize>> {
    let piece = move |first| first..elements.min(first + CHUNK_ELEMENTS);
    (0..elements).step_by(CHUNK_ELEMENTS).map(piece)
}

/// Reads on a thread that does not own the buffers.
pub struct Reader {
    /// Which buffer [`Elements::get`] reads.
    pub buffer: FlatBuffer,
    requests: Sender<Request>,
    chunk: Vec<f32>,
}

/// Memory to fill, and where to send it then.
struct Request {
    buffer: FlatBuffer,
    first: usize,
    chunk: Vec<f32>,
    answer: SyncSender<Result<Vec<f32>>>,
}

impl Reader {
    fn new(requests: Sender<Request>) -> Self {
        Reader { buffer: FlatBuffer::Parameters, requests, chunk: Vec::new() }
    }
}

impl Elements for Reader {
    fn get(&mut self, range: Range<usize>) -> Result<&[f32]> {
        let mut chunk = std::mem::take(&mut self.chunk);
        chunk.resize(range.len(), 0.0);
        // Only the request can answer: if it is dropped in a panic, nobody waits for it.
        let (answer, answers) = sync_channel(1);
        let request = Request { buffer: self.buffer, first: range.start, chunk, answer };
        let asked = self.requests.send(request);
        let answered = asked.ok().and_then(|()| answers.recv().ok());
        self.chunk = answered.unwrap_or_else(|| Err(no_answer()))?;
        Ok(&self.chunk)
    }
}

fn no_answer() -> Error {
    Error::Internal {
        what: "the thread that reads the device has ended".to_string(),
        remedy: "report its message, which stands before this one: it is a defect".to_string(),
    }
}

/// Runs both on threads of their own, while this one reads for them. Each drops its reader when it
/// is done with it.
///
/// Errors: the system gives no thread.
pub fn with_two_readers<A: Send, B: Send>(
    read: &mut ReadFlat,
    one: impl FnOnce(Reader) -> A + Send,
    other: impl FnOnce(Reader) -> B + Send,
) -> Result<(A, B)> {
    let (requests, asked) = channel();
    let for_one = Reader::new(requests.clone());
    let for_other = Reader::new(requests);
    thread::scope(move |scope| {
        let no_thread = || Error::io("start a thread for", "checkpoint");
        let new = || thread::Builder::new().name("checkpoint".to_string());
        let one = new().spawn_scoped(scope, move || one(for_one)).map_err(no_thread())?;
        let other = new().spawn_scoped(scope, move || other(for_other)).map_err(no_thread())?;
        // Ends when neither has its reader any more.
        for Request { buffer, first, mut chunk, answer } in asked {
            let done = read(buffer, first, &mut chunk);
            // Who asked may have failed meanwhile.
            let _ = answer.send(done.map(|()| chunk));
        }
        Ok((result_of(one), result_of(other)))
    })
}

fn result_of<T>(thread: ScopedJoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
