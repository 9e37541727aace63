//! kernels/adamw.cu against the f64 CPU backend: sizes around vectors, tiles and blocks, decaying
//! ranges at every edge, clipping, norms that are not finite, and the working copy. Moments in bf16
//! are f32 results rounded as `moments::stored` says.

// One decaying range is a list of ranges, not of its elements.
#![expect(clippy::single_range_in_vec_init)]

mod moments;
mod split;

use std::ops::Range;

use half::bf16;
use isobath::backend::{AdamWStep, Backend, FlatBuffers};
use isobath::config::{Dtype, Master};
use isobath::cpu::Cpu;
use isobath::cuda::adamw::{AdamW, AdamWBuffers, FlatPart, MAX_ELEMENTS};
use isobath::cuda::{Allocation, DevicePointer, Driver, StreamId, host};
use isobath::tensor::{Kind, Shape, View};

use super::machines::*;
use crate::support::normals;

const F32: Dtype = Dtype::F32;

#[derive(Clone, Debug)]
struct Case {
    elements: usize,
    decay: Vec<Range<usize>>,
    decoupled: bool,
    /// Largest norm, as a share of the gradients' norm; 0: off.
    clip: f64,
    working: bool,
    moments: Dtype,
}

const SEED: u64 = 0x1234_5678_9abc_def0;
const UPDATE: u64 = 3;

impl Case {
    fn step(&self, norm: f64) -> AdamWStep<'_> {
        AdamWStep {
            // So large that an update is no less than the parameters.
            lr: 0.05,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.5,
            decoupled: self.decoupled,
            correction1: 1.0 - 0.9f64.powi(3),
            correction2: 1.0 - 0.95f64.powi(3),
            clip: f64::from((self.clip * norm) as f32),
            decay: &self.decay,
            seed: SEED,
            update: UPDATE,
        }
    }

    fn part(&self) -> FlatPart {
        FlatPart { moments: self.moments, ..f32_part(self.elements) }
    }
}

fn f32_part(elements: usize) -> FlatPart {
    FlatPart { first: 0, elements: elements as u64, master: Master::F32, moments: F32 }
}

/// parameters, gradients, moment1, moment2 [N], in f32; the moments as they are stored.
type Flat = [Vec<f64>; 4];

fn inputs(elements: usize, moments: Dtype) -> Flat {
    let draw = |dtype, seed, of: fn(f64) -> f64| -> Vec<f64> {
        normals(seed, elements).into_iter().map(|value| rounded(dtype, of(value))).collect()
    };
    [
        // None so small that its decay could not be seen.
        draw(F32, 1, |x| 0.1 * (x + 1f64.copysign(x))),
        draw(F32, 2, |x| x),
        draw(moments, 3, |x| 0.1 * x),
        draw(moments, 4, |x| 0.1 + x * x),
    ]
}

/// What comes out: grad_norm [1], then parameters, moment1, moment2 [N].
type Outputs = [Vec<f64>; 4];
const NAMES: [&str; 4] = ["grad_norm", "parameters", "moment1", "moment2"];

struct Prepared {
    case: Case,
    inputs: Flat,
    clip_by: f64,
    plain: Outputs,
    exact: Outputs,
}

impl Prepared {
    fn new(case: Case) -> Self {
        let inputs = inputs(case.elements, case.moments);
        let norm = inputs[1].iter().map(|g| g * g).sum::<f64>().sqrt();
        let (plain, exact) = (plain(&case, &inputs, norm), exact(&case, &inputs, norm));
        Prepared { case, inputs, clip_by: norm, plain, exact }
    }
}

// ------------------------------------------------------------------ exact and plain

/// The CPU backend in f64, with the norm that it finds itself.
fn exact(case: &Case, inputs: &Flat, norm: f64) -> Outputs {
    let cpu = &mut Cpu::<f64>::new();
    let mut view = |values: &[f64]| {
        let shape = Shape::new(&[values.len()]);
        let buffer = cpu.allocate("test", size_of_val(values)).unwrap();
        let view = View { buffer, offset: 0, kind: Kind::Statistic, shape };
        cpu.values_mut(view).copy_from_slice(values);
        view
    };
    let [parameters, gradients, moment1, moment2] = [0, 1, 2, 3].map(|i| view(&inputs[i]));
    let grad_norm = view(&[0.0]);
    let buffers = FlatBuffers {
        parameters,
        working: None,
        vectors: None,
        gradients,
        moment1,
        moment2,
        grad_norm,
        first: 0,
    };
    cpu.gradient_norm(&buffers).unwrap();
    cpu.adamw(&buffers, &case.step(norm)).unwrap();
    [grad_norm, parameters, moment1, moment2].map(|view| cpu.values(view).to_vec())
}

/// The formulas in f32, one element after the other.
fn plain(case: &Case, inputs: &Flat, norm: f64) -> Outputs {
    let step = case.step(norm);
    let norm = inputs[1].iter().map(|&g| (g * g) as f32).sum::<f32>().sqrt();
    let scale = step.gradient_scale(f64::from(norm)) as f32;
    let mut decays = vec![false; case.elements];
    case.decay.iter().for_each(|range| decays[range.clone()].fill(true));
    let [mut parameters, mut moment1, mut moment2] = [const { Vec::new() }; 3];
    let (beta1, beta2) = (step.beta1 as f32, step.beta2 as f32);
    for i in 0..case.elements {
        let [w, g, m, v] = [0, 1, 2, 3].map(|buffer: usize| inputs[buffer][i] as f32);
        let decay = if decays[i] { step.weight_decay as f32 } else { 0.0 };
        let g = g * scale + if step.decoupled { 0.0 } else { decay * w };
        let m = beta1 * m + (1.0 - beta1) * g;
        let v = beta2 * v + (1.0 - beta2) * g * g;
        let (m_hat, v_hat) = (m / step.correction1 as f32, v / step.correction2 as f32);
        let update =
            m_hat / (v_hat.sqrt() + step.eps as f32) + if step.decoupled { decay * w } else { 0.0 };
        parameters.push(f64::from(w - step.lr as f32 * update));
        moment1.push(f64::from(m));
        moment2.push(f64::from(v));
    }
    [vec![f64::from(norm)], parameters, moment1, moment2]
}

// ------------------------------------------------------------------ on a device

/// The buffers of one optimizer on a device.
struct OnDevice {
    adamw: AdamW,
    moments: Dtype,
    flat: [Allocation; 4],
    working: Option<Allocation>,
    grad_norm: Allocation,
}

impl OnDevice {
    fn new(driver: &mut dyn Driver, case: &Case, inputs: &Flat) -> Self {
        let names = ["parameters", "gradients", "moment1", "moment2"];
        let dtypes = [F32, F32, case.moments, case.moments];
        OnDevice {
            adamw: AdamW::new(driver, case.part(), &case.decay, &[]).unwrap(),
            moments: case.moments,
            flat: [0, 1, 2, 3].map(|i| upload(driver, names[i], dtypes[i], &inputs[i])),
            working: case.working.then(|| unwritten(driver, "working", Dtype::Bf16, case.elements)),
            grad_norm: unwritten(driver, "grad_norm", F32, 1),
        }
    }

    fn buffers(&self) -> AdamWBuffers {
        let [parameters, gradients, moment1, moment2] = self.flat.map(|it| it.address);
        AdamWBuffers {
            parameters,
            gradients,
            moment1,
            moment2,
            working: self.working.map(|it| it.address),
            vectors: None,
            grad_norm: self.grad_norm.address,
        }
    }

    fn norm(&self, driver: &mut dyn Driver) {
        let (gradients, to) = (self.flat[1].address, self.grad_norm.address);
        self.adamw.gradient_norm(driver, StreamId::MAIN, gradients, to).unwrap();
    }

    fn outputs(&self, driver: &mut dyn Driver) -> Outputs {
        let [parameters, _, moment1, moment2] = self.flat;
        [(F32, self.grad_norm), (F32, parameters), (self.moments, moment1), (self.moments, moment2)]
            .map(|(dtype, buffer)| download(driver, dtype, buffer))
    }

    /// Every bit that an update could change.
    fn bits(&self, driver: &mut dyn Driver) -> Vec<u8> {
        let mut buffers = vec![self.flat[0], self.flat[2], self.flat[3]];
        buffers.extend(self.working);
        let mut bits = vec![];
        for buffer in buffers {
            bits.extend(driver.download::<u8>(buffer.address, buffer.bytes as usize).unwrap());
        }
        bits
    }

    fn release(self, driver: &mut dyn Driver) {
        self.adamw.release(driver).unwrap();
        for buffer in self.flat.into_iter().chain(self.working).chain([self.grad_norm]) {
            driver.release(buffer).unwrap();
        }
    }
}

fn check(driver: &mut dyn Driver, prepared: &Prepared) -> Vec<u8> {
    let Prepared { case, inputs, clip_by, plain, exact } = prepared;
    let device = OnDevice::new(driver, case, inputs);
    device.norm(driver);
    let step = case.step(*clip_by);
    device.adamw.update(driver, StreamId::MAIN, &step, &device.buffers()).unwrap();
    let found = device.outputs(driver);
    let what = format!("{} elements, {case:?}", case.elements);
    // Before they were rounded.
    let computed = match case.moments {
        Dtype::F32 => found.clone(),
        Dtype::Bf16 => moments::check_stored(driver, &what, case, inputs, &step, &found),
    };
    for i in 0..4 {
        assert_exact(&format!("{what} {}", NAMES[i]), F32, &computed[i], &plain[i], &exact[i]);
    }
    if let Some(working) = device.working {
        let rounded = found[1].iter().map(|&w| f64::from(rounded_parameter(w as f32)));
        let rounded: Vec<f64> = rounded.collect();
        assert_eq!(download(driver, Dtype::Bf16, working), rounded, "{what}: the working copy");
    }
    let mut bits = device.bits(driver);
    bits.extend(found[0][0].to_bits().to_le_bytes());
    device.release(driver);
    bits
}

fn check_all(cases: impl IntoIterator<Item = Case>) {
    let prepared: Vec<Prepared> = cases.into_iter().map(Prepared::new).collect();
    on_every_machine(|driver| prepared.iter().flat_map(|it| check(driver, it)).collect());
}

// ------------------------------------------------------------------ tests

/// Around a vector of 4, a block of 2048 and a tile of the norm of 4096; every option at each.
#[test]
fn every_size_and_option() {
    let sizes = [1, 2, 3, 4, 5, 63, 1023, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 10_243];
    check_all(sizes.into_iter().enumerate().flat_map(|(index, elements)| {
        [0, 1].map(|option| Case {
            moments: if (index / 2 + option) % 2 == 0 { Dtype::Bf16 } else { F32 },
            elements,
            decay: vec![0..elements / 2, elements / 2 + elements / 7..elements],
            decoupled: (index + option) % 2 == 0,
            clip: [0.0, 0.3, 2.0][(index + option) % 3],
            working: option == 0,
        })
    }));
}

/// Ranges that begin and end in every place of a vector, at and beside the edges of blocks, that
/// touch, that are empty, that are one element long, that span blocks; none, and all of it.
#[test]
fn every_edge_of_a_decaying_range() {
    let elements = 3 * 2048 + 77;
    let all = vec![
        vec![],
        vec![0..elements],
        vec![0..1, 2..3, 5..9, 14..14, 15..17, 20..24, 24..25, 64..128],
        vec![0..2048, 4096..elements],
        vec![2047..2048, 2049..4095, 4097..elements - 1],
        vec![2048..4096],
        vec![1..6144, 6145..6146, elements - 1..elements],
        // A binary search with many steps.
        (0..elements / 10).map(|i| 10 * i + i % 3..10 * i + 5 + i % 4).collect(),
    ];
    check_all(all.into_iter().enumerate().map(|(index, decay)| Case {
        elements,
        decay,
        decoupled: index % 2 == 0,
        clip: 0.5,
        working: false,
        moments: DTYPES[index / 2 % 2],
    }));
}

/// More tiles than there are partial sums: blocks take several, and the last ones none.
#[test]
fn the_norm_of_more_tiles_than_blocks() {
    let elements = 1024 * 4096 + 2 * 4096 + 3;
    let gradients: Vec<f32> = {
        let drawn: Vec<f32> = normals(5, 4099).into_iter().map(|it| it as f32).collect();
        (0..elements).map(|i| drawn[i % drawn.len()] * (1 + i / 1_000_000) as f32).collect()
    };
    let squares = gradients.iter().map(|&g| f64::from(g) * f64::from(g));
    let expected = squares.sum::<f64>().sqrt() as f32;
    on_every_machine(|driver| {
        let norm = norm_of(driver, &gradients);
        assert!((norm - expected).abs() <= expected * f32::EPSILON / 2.0, "{norm} {expected}");
        norm.to_bits().to_le_bytes().to_vec()
    });
}

fn norm_of(driver: &mut dyn Driver, gradients: &[f32]) -> f32 {
    let adamw = AdamW::new(driver, f32_part(gradients.len()), &[], &[]).unwrap();
    let buffer = driver.upload("gradients", gradients).unwrap();
    let to = driver.upload("grad_norm", &[f32::NAN]).unwrap();
    adamw.gradient_norm(driver, StreamId::MAIN, buffer.address, to.address).unwrap();
    let norm = driver.download::<f32>(to.address, 1).unwrap()[0];
    adamw.release(driver).unwrap();
    driver.release(buffer).unwrap();
    driver.release(to).unwrap();
    norm
}

/// Squares of these leave the range of f32; the norm does not.
#[test]
fn a_norm_is_exact_over_the_whole_range_of_f32() {
    on_each_machine(|driver| {
        for size in [1e-44f32, 3e-30, 1.0, 7e25, 1e38] {
            for (elements, factor) in [(1, 1.0), (4, 2.0), (9, 3.0), (5000, 5000f64.sqrt())] {
                let expected = (f64::from(size) * factor) as f32;
                let norm = norm_of(driver, &vec![-size; elements]);
                let close = (norm - expected).abs() <= expected * f32::EPSILON;
                assert!(close || norm == expected, "{elements} of {size:e}: {norm:e}");
            }
        }
        assert_eq!(norm_of(driver, &[0.0; 7]).to_bits(), 0);
        assert_eq!(norm_of(driver, &[3e38; 100]), f32::INFINITY);
        assert!(norm_of(driver, &[1.0, f32::NAN, 1.0]).is_nan());
    });
}

/// A gradient that is not finite, wherever it is, leaves every bit as it was.
#[test]
fn a_norm_that_is_not_finite_changes_nothing() {
    on_each_machine(|driver| {
        let elements = 2048 + 7;
        let case = Case {
            elements,
            decay: vec![0..100],
            decoupled: true,
            clip: 1.0,
            working: true,
            moments: Dtype::Bf16,
        };
        for clip in [0.0, 1.0] {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                for place in [0, 3, 2047, 2048, elements - 1] {
                    let mut flat = inputs(elements, case.moments);
                    flat[1][place] = bad;
                    let device = OnDevice::new(driver, &case, &flat);
                    let working = device.working.unwrap();
                    driver.fill(StreamId::MAIN, working.address, working.bytes, 0x5a).unwrap();
                    let before = device.bits(driver);
                    device.norm(driver);
                    let step = AdamWStep { clip, ..case.step(1.0) };
                    let buffers = device.buffers();
                    device.adamw.update(driver, StreamId::MAIN, &step, &buffers).unwrap();
                    let norm = device.outputs(driver)[0][0];
                    assert!(!norm.is_finite(), "{bad} at {place}: the norm is {norm}");
                    assert!(device.bits(driver) == before, "{bad} at {place} changed something");

                    // The same optimizer takes the next step.
                    let good = upload(driver, "gradients", F32, &inputs(elements, F32)[1]);
                    let bytes = good.bytes;
                    let (from, to) = (good.address, device.flat[1].address);
                    driver.on_device(StreamId::MAIN, from, to, bytes).unwrap();
                    device.norm(driver);
                    device.adamw.update(driver, StreamId::MAIN, &step, &buffers).unwrap();
                    assert!(device.bits(driver) != before, "no update after {bad} at {place}");
                    driver.release(good).unwrap();
                    device.release(driver);
                }
            }
        }
    });
}

/// A captured step is replayed with the scalars of each step, and gives the bits of steps that
/// were launched one by one.
#[test]
fn a_captured_step_reads_its_scalars_from_the_device() {
    for moments in DTYPES {
        on_each_machine(|driver| check_captured(driver, moments));
    }
}

fn check_captured(driver: &mut dyn Driver, moments: Dtype) {
    let case = Case {
        elements: 5000,
        decay: vec![64..1000, 2048..4500],
        decoupled: true,
        clip: 0.5,
        working: true,
        moments,
    };
    let flat = inputs(case.elements, moments);
    let step = |t: i32| AdamWStep {
        lr: 0.01 * f64::from(t),
        correction1: 1.0 - 0.9f64.powi(t),
        correction2: 1.0 - 0.95f64.powi(t),
        clip: if t == 2 { 0.0 } else { 20.0 },
        update: t as u64,
        ..case.step(1.0)
    };
    let launched = OnDevice::new(driver, &case, &flat);
    for t in 1..4 {
        launched.norm(driver);
        launched.adamw.update(driver, StreamId::MAIN, &step(t), &launched.buffers()).unwrap();
    }
    let captured = OnDevice::new(driver, &case, &flat);
    let stream = driver.new_stream().unwrap();
    driver.begin_capture(stream).unwrap();
    let (gradients, to) = (captured.flat[1].address, captured.grad_norm.address);
    captured.adamw.gradient_norm(driver, stream, gradients, to).unwrap();
    captured.adamw.launch(driver, stream, &captured.buffers()).unwrap();
    let graph = driver.end_capture(stream).unwrap();
    driver.synchronize().unwrap();
    for t in 1..4 {
        captured.adamw.prepare(driver, stream, &step(t)).unwrap();
        driver.launch_graph(graph, stream).unwrap();
    }
    driver.synchronize().unwrap();
    assert!(captured.bits(driver) == launched.bits(driver), "the replay gives other bits");
    launched.release(driver);
    captured.release(driver);
}

#[test]
fn what_cannot_be_updated_is_refused() {
    on_each_machine(|driver| {
        for (elements, decay, why) in [
            (MAX_ELEMENTS + 1, vec![], "shard"),
            (8, vec![4..9], "end within the buffer"),
            (8, vec![0..4, 3..5], "do not overlap"),
            (8, vec![4..6, 0..2], "ascend"),
            #[expect(clippy::reversed_empty_ranges)]
            (8, vec![6..4], "ascend"),
        ] {
            let part = FlatPart { elements, ..f32_part(0) };
            let error = AdamW::new(driver, part, &decay, &[]).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        AdamW::new(driver, FlatPart { elements: MAX_ELEMENTS, ..f32_part(0) }, &[], &[]).unwrap();
        let error =
            AdamW::new(driver, FlatPart { first: 66, ..f32_part(8) }, &[], &[]).unwrap_err();
        assert!(error.to_string().contains("a multiple of 4 elements"), "{error}");

        let case = Case {
            elements: 64,
            decay: vec![0..8],
            decoupled: true,
            clip: 0.0,
            working: true,
            moments: F32,
        };
        let device = OnDevice::new(driver, &case, &inputs(64, F32));
        let good = case.step(1.0);
        let other = [0..9];
        for (step, why) in [
            (AdamWStep { decay: &other, ..good }, "for other ranges"),
            (AdamWStep { decay: &[], ..good }, "for other ranges"),
            (AdamWStep { correction1: 0.0, ..good }, "count steps from 1"),
            (AdamWStep { lr: f64::NAN, ..good }, "lr is NaN"),
            (AdamWStep { weight_decay: 1e39, ..good }, "weight_decay is 1e39"),
            (AdamWStep { eps: 1e-50, ..good }, "choose optimizer.eps"),
        ] {
            let done = device.adamw.update(driver, StreamId::MAIN, &step, &device.buffers());
            let error = done.unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let odd = |address: DevicePointer| address.offset(8);
        let buffers = device.buffers();
        for (args, why) in [
            (AdamWBuffers { parameters: odd(buffers.parameters), ..buffers }, "parameters begin"),
            (AdamWBuffers { gradients: odd(buffers.gradients), ..buffers }, "gradients begin"),
            (AdamWBuffers { moment1: odd(buffers.moment1), ..buffers }, "moment1 begin"),
            (AdamWBuffers { moment2: odd(buffers.moment2), ..buffers }, "moment2 begin"),
            (AdamWBuffers { working: buffers.working.map(odd), ..buffers }, "working copy begin"),
        ] {
            let error = device.adamw.launch(driver, StreamId::MAIN, &args).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("multiple of 16"), "{error}");
        }
        let (from, to) = (odd(buffers.gradients), buffers.grad_norm);
        let error = device.adamw.gradient_norm(driver, StreamId::MAIN, from, to).unwrap_err();
        assert!(error.to_string().contains("multiple of 16"), "{error}");

        // No elements: a norm of 0 and no update.
        let empty = AdamW::new(driver, f32_part(0), &[], &[]).unwrap();
        empty.gradient_norm(driver, StreamId::MAIN, buffers.gradients, to).unwrap();
        assert_eq!(driver.download::<f32>(to, 1).unwrap(), [0.0]);
        let step = AdamWStep { decay: &[], ..good };
        empty.update(driver, StreamId::MAIN, &step, &device.buffers()).unwrap();
    });
}

/// bf16 keeps 8 bits of a parameter; its copy is the nearest, and of two equally near the one
/// farther from zero.
#[test]
fn the_working_copy_is_the_nearest() {
    on_each_machine(|driver| {
        let case = Case {
            elements: 6,
            decay: vec![],
            decoupled: true,
            clip: 0.0,
            working: true,
            moments: F32,
        };
        // lr 0: the parameters stay.
        let step = AdamWStep { lr: 0.0, ..case.step(1.0) };
        let mut flat = inputs(6, F32);
        flat[0] = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x3f80_7fff, 0xbf81_8000, 0x0000_0001]
            .map(|bits| f64::from(f32::from_bits(bits)))
            .to_vec();
        let device = OnDevice::new(driver, &case, &flat);
        device.norm(driver);
        device.adamw.update(driver, StreamId::MAIN, &step, &device.buffers()).unwrap();
        let copy: Vec<bf16> = driver.download(device.working.unwrap().address, 6).unwrap();
        let bits: Vec<u16> = copy.iter().map(|it| it.to_bits()).collect();
        assert_eq!(bits, [0x3f81, 0x3f82, 0x3f81, 0x3f80, 0xbf82, 0]);
        device.release(driver);
    });
}

/// One worker and several: blocks run one after the other, or at the same time.
#[test]
fn workers_do_not_change_a_bit() {
    if let Err(error) = host::present() {
        println!("skipped: no simt: {error}");
        return;
    }
    let case = Case {
        elements: 5 * 4096 + 3,
        decay: vec![64..3000, 9000..20_000],
        decoupled: true,
        clip: 0.5,
        working: true,
        moments: Dtype::Bf16,
    };
    let prepared = Prepared::new(case);
    let of_workers = |workers| {
        let options = host::Options { workers, ..host::Options::default() };
        check(&mut host::Host::new(options).unwrap(), &prepared)
    };
    let one = of_workers(1);
    for workers in [2, 5] {
        assert!(of_workers(workers) == one, "{workers} workers give other bits than one");
    }
}
