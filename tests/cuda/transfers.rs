//! Copies between the program and the device that nobody waits for: what arrives, that no memory is
//! written again too early, and steps that are enqueued before the previous one is over.

use std::cell::RefCell;
use std::rc::Rc;

use isobath::backend::{Backend, Reading};
use isobath::config::Dtype;
use isobath::cuda::host::{Host, Options};
use isobath::cuda::transfers::{SENT_SECTIONS, section_bytes};
use isobath::cuda::{AHEAD, Cuda};
use isobath::tensor::{Kind, Shape, View};

use super::commands::{Case, state, steps};
use super::counting::{Counting, Counts};
use super::machines::*;
use super::order::Order;
use super::replay::{
    assert_same, config, trained, trained_ahead, trained_ahead_with, with_documents,
    with_narrow_moments, with_sampled_layers,
};
use crate::support::{metrics, tokens};

const SENT: usize = 1 << 10;
const READ: usize = 8;

/// Numbers of a device, [count] each.
fn arrays<const N: usize>(backend: &mut Cuda, kind: Kind, count: usize) -> [View; N] {
    let shape = Shape::new(&[count]);
    [(); N].map(|()| {
        let buffer = backend.allocate("numbers", 4 * count).unwrap();
        View { buffer, offset: 0, kind, shape }
    })
}

/// Writes that go twice around the ring, each to a place of its own, two of which are then read:
/// half of what was written there first, half of what was written last. Races, waits, and what was
/// read.
fn written(without: Option<u64>) -> (Vec<String>, u64, Vec<f32>) {
    let order = Rc::new(RefCell::new(Order::new(without)));
    let host = Host::new(Options { workers: 1, ..Options::default() }).unwrap();
    let driver = Counting { order: Some(order.clone()), ..Counting::new(host) };
    let mut backend = Cuda::new(Box::new(driver), Dtype::F32, None).unwrap();
    backend.prepare_transfers(SENT, READ).unwrap();
    // One fills a section.
    let count = section_bytes(SENT) / 4;
    let [first, second] = arrays(&mut backend, Kind::Statistic, count);
    let mut readings: Vec<Reading> = vec![];
    let mut read = vec![];
    for i in 0..2 * SENT_SECTIONS {
        let view = [first, second][i % 2];
        backend.write(view, &vec![i as f32; count]).unwrap();
        let number = |view| View { shape: Shape::new(&[1]), ..view };
        let reading = backend.begin_read(&[number(first), number(second)]).unwrap();
        if let Some(before) = readings.pop() {
            let mut values = [0.0; 2];
            backend.finish_read(before, &mut values).unwrap();
            read.extend(values);
        }
        readings.push(reading);
    }
    let order = order.borrow();
    (order.races.clone(), order.waits, read)
}

#[test]
fn what_is_sent_waits_for_what_was_sent_from_the_same_place() {
    if !has_simt() {
        return;
    }
    let (races, waits, read) = written(None);
    assert_eq!(races, [""; 0]);
    let expected: Vec<f32> = (0..2 * SENT_SECTIONS - 1)
        .flat_map(|i| match i % 2 {
            0 => [i as f32, i.saturating_sub(1) as f32],
            _ => [i as f32 - 1.0, i as f32],
        })
        .collect();
    assert_eq!(read, expected);
    let of_readings = 2 * SENT_SECTIONS as u64 - 1;
    assert_eq!(waits, of_readings + SENT_SECTIONS as u64, "one for each section that comes again");
    let noticed = (0..waits).filter(|&wait| !written(Some(wait)).0.is_empty()).count() as u64;
    // A reading that was waited for says that what was sent before has arrived.
    assert_eq!(noticed, of_readings, "waits that somebody needs");
}

/// The same without readings in between: then every wait for a section is needed.
fn sent(without: Option<u64>) -> (Vec<String>, u64) {
    let order = Rc::new(RefCell::new(Order::new(without)));
    let host = Host::new(Options { workers: 1, ..Options::default() }).unwrap();
    let driver = Counting { order: Some(order.clone()), ..Counting::new(host) };
    let mut backend = Cuda::new(Box::new(driver), Dtype::F32, None).unwrap();
    backend.prepare_transfers(SENT, READ).unwrap();
    let count = section_bytes(SENT) / 4 / 2;
    let [view] = arrays(&mut backend, Kind::Index, count);
    for i in 0..2 * (SENT_SECTIONS as i32 + 2) {
        backend.write_index(view, &vec![i; count]).unwrap();
    }
    let order = order.borrow();
    (order.races.clone(), order.waits)
}

#[test]
fn every_wait_for_a_section_is_needed() {
    if !has_simt() {
        return;
    }
    let (races, waits) = sent(None);
    assert_eq!(races, [""; 0]);
    assert_eq!(waits, 2, "ten sections of eight");
    // Events come in order: the last wait is enough for what was sent before it.
    assert!((0..waits).all(|wait| !sent(Some(wait)).0.is_empty()), "a wait that nothing needs");
}

/// Of any size, on every machine: what is larger than a section is waited for.
#[test]
fn what_is_sent_arrives() {
    for machine in machines() {
        let mut backend = Cuda::new(machine, Dtype::F32, None).unwrap();
        backend.prepare_transfers(SENT, 4 * 3000).unwrap();
        for (seed, count) in [1, 3, 250, 1000, 2999, 3000].into_iter().enumerate() {
            let [view] = arrays(&mut backend, Kind::Statistic, count);
            for again in 0..20 {
                let drawn = tokens(100 * seed as u64 + again, count, 1 << 20);
                let values: Vec<f32> = drawn.into_iter().map(|it| it as f32).collect();
                backend.write(view, &values).unwrap();
                let reading = backend.begin_read(&[view]).unwrap();
                backend.write(view, &vec![-1.0; count]).unwrap();
                let mut found = vec![0.0; count];
                backend.finish_read(reading, &mut found).unwrap();
                assert_eq!(found, values, "{count} numbers");
            }
        }
    }
}

#[test]
fn steps_ahead_have_the_bits_of_steps_one_by_one() {
    let cases = [
        ("plain", config(Dtype::F32, 2)),
        ("documents", with_documents(config(Dtype::Bf16, 3))),
        ("sampled layers", with_sampled_layers(with_narrow_moments(config(Dtype::Bf16, 1)))),
    ];
    for (what, config) in cases {
        for offload in [false, true] {
            let mut config = config.clone();
            config.optimizer.offload = offload;
            for (ahead, alone) in machines().into_iter().zip(machines()) {
                let [ahead, alone] =
                    [ahead, alone].map(|it| Cuda::new(it, config.dtype, None).unwrap());
                let mut expected = trained(&config, 6, alone);
                expected.gradients.clear();
                assert_same(what, &trained_ahead(&config, 6, ahead), &expected);
            }
        }
    }
}

/// A step ahead touches nothing that the one before it still needs, and waits for nothing but
/// that one's losses.
#[test]
fn steps_ahead_are_ordered_and_copy_nothing_that_is_waited_for() {
    if !has_simt() {
        return;
    }
    for config in
        [with_documents(config(Dtype::Bf16, 2)), with_sampled_layers(config(Dtype::F32, 1))]
    {
        let order = Rc::new(RefCell::new(Order::new(None)));
        let counts = Counts::default();
        let host = Host::new(Options { workers: 1, ..Options::default() }).unwrap();
        let driver =
            Counting { order: Some(order.clone()), counts: counts.clone(), ..Counting::new(host) };
        let backend = Cuda::new(Box::new(driver), config.dtype, None).unwrap().with_graphs(false);
        let count = |name: &str| counts.borrow().get(name).copied().unwrap_or(0);
        let mut before = [0; 2];
        trained_ahead_with(&config, 5, backend, |step| {
            let now = [count("copy and wait"), order.borrow().waits];
            if step > 1 {
                assert_eq!(now[0], before[0], "step {step}");
                assert!(now[1] - before[1] <= 2, "step {step}: its reading, and a section at most");
            }
            before = now;
        });
        assert_eq!(order.borrow().races, [""; 0]);
    }
}

/// The program with steps ahead and without: evaluations, samples and checkpoints at steps of their
/// own, and a resumption.
#[test]
fn a_run_with_steps_ahead_writes_the_same() {
    let Some(case) = Case::new() else { return };
    let sets = [
        "dtype=bf16",
        "train.grad_accumulation=2",
        "train.eval_every=3",
        "train.sample_every=4",
        "train.sample_tokens=12",
        "checkpoint.every=5",
    ];
    let run = |name: &str, ahead: &str, steps: &str| {
        let sets = [&sets[..], &[steps]].concat();
        case.train_in(name, "simt", &sets, &[(AHEAD, ahead)])
    };
    let alone = run("alone", "0", "train.steps=9");
    let ahead = run("ahead", "1", "train.steps=9");
    let whole = |line: &serde_json::Value| {
        let mut line = line.clone();
        let line_of = line.as_object_mut().unwrap();
        line_of.remove("tokens_per_second");
        line_of.remove("mfu");
        line
    };
    let lines = |run| metrics(run).iter().map(whole).collect::<Vec<_>>();
    assert_eq!(lines(&ahead), lines(&alone));
    assert_eq!(lines(&ahead).len(), 9);
    for step in [5, 9] {
        assert!(state(&ahead, step) == state(&alone, step), "the checkpoint of step {step}");
    }
    run("parts", "1", "train.steps=4");
    let parts = run("parts", "1", "train.steps=9");
    assert_eq!(steps(&parts), steps(&alone));
    assert!(state(&parts, 9) == state(&alone, 9));
}

/// A loss that is not finite ends both at the same step, and what is on disk is the same.
#[test]
fn a_loss_that_is_not_finite_is_found_a_step_later_and_named_by_its_own_step() {
    let Some(case) = Case::new() else { return };
    let sets = [
        "dtype=f32",
        "train.steps=8",
        "optimizer.lr=1e30",
        "optimizer.clip=0",
        "optimizer.warmup=1",
    ];
    let [alone, ahead] = ["0", "1"].map(|ahead| {
        let name = format!("run-{ahead}");
        let message = case.fails_in(&name, "simt", &sets, &[(AHEAD, ahead)], 1);
        (message, steps(&case.path(&name)))
    });
    assert!(alone.0.starts_with("error: loss is NaN at step 2 (batch rows 2..4)"), "{}", alone.0);
    assert_eq!(alone, ahead);
}

/// A step that cannot be enqueued takes no line from the one before it, which is under way.
#[test]
fn a_damaged_shard_ends_a_run_after_the_same_step() {
    let Some(case) = Case::new() else { return };
    let shard = case.damaged_shard();
    let sets = ["dtype=f32", "train.steps=200", &shard];
    let [alone, ahead] = ["0", "1"].map(|ahead| {
        let name = format!("run-{ahead}");
        let message = case.fails_in(&name, "simt", &sets, &[(AHEAD, ahead)], 2);
        (message, metrics(&case.path(&name)))
    });
    assert!(alone.0.contains("block 3 of the shard is damaged"), "{}", alone.0);
    assert!(alone.1.len() > 2, "{} steps", alone.1.len());
    assert_eq!(alone, ahead);
}
