//! kernels/loss.cu and loss_sm90.cu against the formula in f64: every variant and type, padding,
//! ignored rows, z-loss, logits far from zero, rows of one tile and of several, in one block and in
//! a cluster.

use isobath::Result;
use isobath::config::Dtype;
use isobath::cuda::host::Host;
use isobath::cuda::loss::{Loss, LossBackward, LossForward, MAX_COLUMNS, Shape};
use isobath::cuda::{Driver, StreamId, host};
use isobath::random::Philox;
use isobath::tensor::IGNORE_INDEX;

use super::counting::Counting;
use super::machines::*;
use crate::support::{normals, tokens};

#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: Dtype,
    rows: usize,
    classes: usize,
    columns: usize,
    z_loss: f32,
    /// Logits are normals, or for `Some(size)` either `size` or `-size`.
    size: Option<f64>,
}

struct Inputs {
    logits: Vec<f64>,  // [T,V], NaN in the padding
    targets: Vec<i32>, // [T]
    scale: f32,
}

impl Inputs {
    fn new(case: Case) -> Self {
        let Case { dtype, rows, classes, columns, .. } = case;
        let mut logits = normals(1, rows * columns);
        for (at, logit) in logits.iter_mut().enumerate() {
            let value = match case.size {
                Some(size) => size.copysign(*logit),
                // Spread like those of a trained model: a few classes matter.
                None => 3.0 * *logit,
            };
            *logit = if at % columns < classes { rounded(dtype, value) } else { f64::NAN };
        }
        let mut targets = tokens(2, rows, classes);
        let edges = [0, classes as i32 - 1, IGNORE_INDEX];
        targets.iter_mut().zip(edges).for_each(|(target, edge)| *target = edge);
        Inputs { logits, targets, scale: 0.37 }
    }
}

#[derive(Default)]
struct Outputs {
    losses: Vec<f64>,    // [T]
    d_targets: Vec<f64>, // of the targets' logits, one for each row that has a target
    d_others: Vec<f64>,  // of all other logits in these rows that are classes
}

/// A case with what must come out, which no schedule changes.
struct Prepared {
    case: Case,
    inputs: Inputs,
    plain: Outputs,
    exact: Outputs,
}

impl Prepared {
    fn new(case: Case) -> Self {
        let inputs = Inputs::new(case);
        let (plain, exact) = (plain(case, &inputs), exact(case, &inputs));
        Prepared { case, inputs, plain, exact }
    }
}

// ------------------------------------------------------------------ exact and plain

fn exact(case: Case, inputs: &Inputs) -> Outputs {
    let mut outputs = Outputs::default();
    let (z_loss, scale) = (f64::from(case.z_loss), f64::from(inputs.scale));
    for (row, &target) in inputs.logits.chunks(case.columns).zip(&inputs.targets) {
        if target == IGNORE_INDEX {
            outputs.losses.push(0.0);
            continue;
        }
        let row = &row[..case.classes];
        let max = row.iter().fold(f64::NEG_INFINITY, |max, &logit| max.max(logit));
        let sum: f64 = row.iter().map(|logit| (logit - max).exp()).sum();
        let log_z = max + sum.ln();
        outputs.losses.push(log_z - row[target as usize] + z_loss * log_z * log_z);
        for (class, logit) in row.iter().enumerate() {
            let p = (logit - max).exp() / sum * (1.0 + 2.0 * z_loss * log_z);
            if class == target as usize {
                outputs.d_targets.push(scale * (p - 1.0));
            } else {
                outputs.d_others.push(scale * p);
            }
        }
    }
    outputs
}

/// In f32, one value after the other; gradients are rounded to the case's type.
fn plain(case: Case, inputs: &Inputs) -> Outputs {
    let mut outputs = Outputs::default();
    let (z_loss, scale) = (case.z_loss, inputs.scale);
    let stored = |value: f32| rounded(case.dtype, f64::from(value));
    for (row, &target) in inputs.logits.chunks(case.columns).zip(&inputs.targets) {
        if target == IGNORE_INDEX {
            outputs.losses.push(0.0);
            continue;
        }
        let row: Vec<f32> = row[..case.classes].iter().map(|&logit| logit as f32).collect();
        let max = row.iter().fold(f32::NEG_INFINITY, |max, &logit| max.max(logit));
        let sum: f32 = row.iter().map(|logit| (logit - max).exp()).sum();
        let log_z = max + sum.ln();
        let loss = log_z - row[target as usize] + z_loss * log_z * log_z;
        outputs.losses.push(f64::from(loss));
        let of_exp = scale * (1.0 + 2.0 * z_loss * log_z) / sum;
        for (class, logit) in row.iter().enumerate() {
            let d = (logit - max).exp() * of_exp;
            if class == target as usize {
                outputs.d_targets.push(stored(d - scale));
            } else {
                outputs.d_others.push(stored(d));
            }
        }
    }
    outputs
}

// ------------------------------------------------------------------ on a device

/// [`Loss::new`], or [`Loss::in_one_block`].
type Make = fn(&mut dyn Driver, Dtype, usize, usize) -> Result<Loss>;

/// Losses of the forward pass, those of the backward pass, and what became of the logits.
fn run(driver: &mut dyn Driver, case: Case, inputs: &Inputs) -> [Vec<f64>; 3] {
    run_made(Loss::new, driver, case, inputs)
}

fn run_made(make: Make, driver: &mut dyn Driver, case: Case, inputs: &Inputs) -> [Vec<f64>; 3] {
    let Case { dtype, rows, classes, columns, z_loss, .. } = case;
    let loss = make(driver, dtype, classes, columns).unwrap();
    let logits = upload(driver, "logits", dtype, &inputs.logits);
    let targets = driver.upload("targets", &inputs.targets).unwrap();
    let scale = driver.upload("scale", &[inputs.scale]).unwrap();
    let mut losses = vec![];
    for backward in [false, true] {
        let to = unwritten(driver, "losses", Dtype::F32, rows);
        let (logits, targets, losses_to) = (logits.address, targets.address, to.address);
        if backward {
            let args = LossBackward { logits, targets, scale: scale.address, losses: losses_to };
            loss.backward(driver, StreamId::MAIN, rows, z_loss, &args).unwrap();
        } else {
            let args = LossForward { logits, targets, losses: losses_to };
            loss.forward(driver, StreamId::MAIN, rows, z_loss, &args).unwrap();
        }
        losses.push(download(driver, Dtype::F32, to));
        driver.release(to).unwrap();
    }
    let d_logits = download(driver, dtype, logits);
    for buffer in [logits, targets, scale] {
        driver.release(buffer).unwrap();
    }
    let [forward, backward] = losses.try_into().unwrap();
    [forward, backward, d_logits]
}

fn check(make: Make, driver: &mut dyn Driver, prepared: &Prepared) -> Vec<u8> {
    let Prepared { case, inputs, plain, exact } = prepared;
    let [losses, with_gradient, d_logits] = run_made(make, driver, *case, inputs);
    assert!(bits(&[&losses]) == bits(&[&with_gradient]), "{case:?}: the passes' losses differ");
    let mut found = Outputs { losses, ..Outputs::default() };
    for (row, (d_row, &target)) in d_logits.chunks(case.columns).zip(&inputs.targets).enumerate() {
        let (d_classes, d_padding) = d_row.split_at(case.classes);
        assert!(d_padding.iter().all(|&d| d == 0.0), "{case:?}: row {row}: padding has a gradient");
        if target == IGNORE_INDEX {
            assert_eq!(found.losses[row], 0.0, "{case:?}: row {row} is ignored");
            assert!(d_classes.iter().all(|&d| d == 0.0), "{case:?}: row {row} is ignored");
            continue;
        }
        for (class, &d) in d_classes.iter().enumerate() {
            let to = match class == target as usize {
                true => &mut found.d_targets,
                false => &mut found.d_others,
            };
            to.push(d);
        }
    }
    let compare = |name: &str, dtype, of: fn(&Outputs) -> &Vec<f64>| {
        if !of(exact).is_empty() {
            assert_exact(&format!("{case:?} {name}"), dtype, of(&found), of(plain), of(exact));
        }
    };
    compare("losses", Dtype::F32, |it| &it.losses);
    // Apart, because the ones are a thousand times the others.
    compare("d of targets", case.dtype, |it| &it.d_targets);
    compare("d of others", case.dtype, |it| &it.d_others);
    bits(&[&found.losses, &d_logits])
}

fn bits(all: &[&Vec<f64>]) -> Vec<u8> {
    all.iter().flat_map(|it| it.iter()).flat_map(|value| value.to_bits().to_le_bytes()).collect()
}

fn check_all(make: Make, cases: impl IntoIterator<Item = Case>) {
    let prepared: Vec<Prepared> = cases.into_iter().map(Prepared::new).collect();
    on_every_machine(|driver| prepared.iter().flat_map(|it| check(make, driver, it)).collect());
}

// ------------------------------------------------------------------ tests

fn vector(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F32 => 4,
        Dtype::Bf16 => 8,
    }
}

/// The widest row of each variant, a vector more and a vector less; padding of less than a vector,
/// of several vectors, and none.
fn every_width(dtype: Dtype) {
    let vector = vector(dtype);
    let mut cases = vec![];
    let mut add = |rows, columns: usize, padding: usize| {
        let z_loss = if cases.len() % 2 == 0 { 1e-2 } else { 0.0 };
        let classes = columns.saturating_sub(padding).max(1);
        cases.push(Case { dtype, rows, classes, columns, z_loss, size: None });
    };
    add(5, vector, 0);
    add(7, vector, vector);
    add(9, 5 * vector, 3);
    for (threads, vectors, rows) in [(128, 1, 11), (128, 4, 5), (256, 8, 4), (512, 8, 3)] {
        let widest = threads * vectors * vector;
        add(rows, widest, 0);
        add(3, widest - vector, 1);
        add(3, widest + vector, 2 * vector + 3);
    }
    check_all(Loss::new, cases);
}

#[test]
fn bf16_rows_of_every_width() {
    every_width(Dtype::Bf16);
}

#[test]
fn f32_rows_of_every_width() {
    every_width(Dtype::F32);
}

/// On machines without clusters: one tile exactly, a second one of one vector, a second one of
/// padding alone, several.
#[test]
fn rows_of_several_tiles() {
    let mut cases = vec![];
    for (dtype, tile) in [(Dtype::Bf16, 65536), (Dtype::F32, 32768)] {
        let case = |columns, classes, z_loss| Case {
            dtype,
            rows: 2,
            classes,
            columns,
            z_loss,
            size: None,
        };
        cases.push(case(tile, tile - 9, 0.0));
        cases.push(case(tile + vector(dtype), tile + 1, 1e-2));
        cases.push(case(tile + 256, tile - 5, 1e-2));
    }
    let several = Case {
        dtype: Dtype::Bf16,
        rows: 1,
        classes: 128_003,
        columns: 128_008,
        z_loss: 1e-3,
        size: None,
    };
    cases.push(several);
    cases.push(Case { columns: 1 << 18, classes: 1 << 18, ..several });
    check_all(Loss::in_one_block, cases);
}

/// A row of each cluster: as wide as it can be, a vector more than the next smaller one holds, and
/// one in which most blocks have nothing but padding.
fn every_cluster(dtype: Dtype) {
    let vector = vector(dtype);
    let case =
        |rows, columns, classes, z_loss| Case { dtype, rows, classes, columns, z_loss, size: None };
    // vectors
    let (one_block, wide, between, wider, widest) = (8192, 16_384, 20_480, 32_768, 65_536);
    check_all(
        Loss::new,
        [
            case(3, (one_block - 1) * vector, (one_block - 1) * vector, 0.0),
            case(4, (one_block + 1) * vector, one_block * vector + 1, 1e-2),
            case(1, (one_block + 1) * vector, 5, 1e-2),
            case(1, (wide - 1) * vector, (wide - 1) * vector - 1, 0.0),
            case(1, wide * vector, wide * vector, 0.0),
            case(2, (wide + 1) * vector, wide * vector - vector - 1, 1e-2),
            case(1, between * vector, between * vector, 1e-2),
            case(1, (between + 1) * vector, between * vector + 3, 0.0),
            case(1, wider * vector, wider * vector - 2, 1e-2),
            case(1, (wider + 1) * vector, wider * vector, 0.0),
            case(1, widest * vector, widest * vector - 1, 0.0),
        ],
    );
}

#[test]
fn bf16_rows_of_every_cluster() {
    every_cluster(Dtype::Bf16);
}

#[test]
fn f32_rows_of_every_cluster() {
    every_cluster(Dtype::F32);
}

/// The smallest that holds a row; without clusters, and after the largest, one block; what that
/// reads twice is all but the last of its tiles.
#[test]
fn a_row_is_held_by_as_few_blocks_as_can() {
    const KIB: usize = 1024;
    for (bytes, blocks, read_again) in [
        (16, 1, 0),
        (128 * KIB, 1, 0),
        (128 * KIB + 16, 4, 128 * KIB),
        (2 * 128_256, 4, 128 * KIB),
        (256 * KIB, 4, 128 * KIB),
        (256 * KIB + 16, 8, 256 * KIB),
        (2 * 256_000, 8, 384 * KIB),
        (4 * 256_000, 8, 896 * KIB),
        (1024 * KIB, 8, 896 * KIB),
    ] {
        let shape = Shape::of(bytes, true);
        assert_eq!((shape.blocks, shape.read_again(bytes)), (blocks, 0), "{bytes} bytes");
        let one = Shape::of(bytes, false);
        assert_eq!((one.blocks, one.read_again(bytes)), (1, read_again), "{bytes} bytes");
    }
    let beyond = Shape::of(1024 * KIB + 16, true);
    assert_eq!((beyond.blocks, beyond.read_again(1024 * KIB + 16)), (1, 1024 * KIB));
}

/// A machine of another compute capability, and a build without the file, have one block each.
#[test]
fn without_clusters_one_block_has_a_row() {
    if !has_simt() {
        return;
    }
    let blocks = |capability, lacks| {
        let mut driver = Counting::new(Host::new(host::Options::default()).unwrap());
        driver.properties.compute_capability = capability;
        driver.lacks = lacks;
        Loss::new(&mut driver, Dtype::Bf16, 128_256, 128_256).unwrap().shape().blocks
    };
    assert_eq!(blocks((9, 0), None), 4);
    assert_eq!(blocks((8, 0), None), 1);
    assert_eq!(blocks((10, 0), None), 1);
    assert_eq!(blocks((9, 0), Some("loss_forward_sm90")), 1);
    assert_eq!(blocks((9, 0), Some("loss_backward_sm90")), 1);
}

/// exp of one of these overflows, and squares of them count in the z-loss.
#[test]
fn logits_far_from_zero() {
    let (mut cases, mut wide) = (vec![], vec![]);
    for dtype in [Dtype::Bf16, Dtype::F32] {
        for (size, z_loss) in [(1e4, 0.0), (1e4, 1e-4), (90.0, 1e-2), (0.0, 1e-2)] {
            let size = Some(rounded(dtype, size));
            cases.push(Case { dtype, rows: 5, classes: 301, columns: 304, z_loss, size });
        }
        // A cluster, or several tiles: a maximum is replaced by a larger one.
        let columns = 70_000;
        wide.push(Case { dtype, rows: 2, classes: 69_997, columns, z_loss: 0.0, size: Some(1e4) });
    }
    check_all(Loss::new, cases.into_iter().chain(wide.iter().copied()));
    check_all(Loss::in_one_block, wide);
}

/// One class far above the others, in every place of a row: a maximum that came late, or from
/// another thread, warp, tile or block of a cluster. In a cluster of four, 2048 columns of bf16 go
/// to each block in turn.
#[test]
fn one_hot_rows() {
    let in_clusters = [0, 2047, 2048, 4095, 4096, 6143, 6144, 8191, 8192, 40_000, 65_543];
    on_each_machine(|driver| {
        for (make, dtype, columns, places) in [
            (
                Loss::new as Make,
                Dtype::Bf16,
                2056,
                &[0, 7, 8, 255, 1023, 1024, 2047, 2048, 2055][..],
            ),
            (Loss::in_one_block, Dtype::F32, 32_800, &[0, 3, 4, 32_767, 32_768, 32_799]),
            (Loss::new, Dtype::Bf16, 65_544, &in_clusters),
            (Loss::new, Dtype::F32, 32_772, &[0, 1023, 1024, 2047, 2048, 3072, 4096, 32_771]),
        ] {
            let rows = places.len();
            let case = Case { dtype, rows, classes: columns, columns, z_loss: 0.0, size: None };
            let mut logits = vec![-1e4; rows * columns];
            for (row, &place) in places.iter().enumerate() {
                logits[row * columns + place] = 1e4;
            }
            let targets = places.iter().map(|&place| place as i32).collect();
            let mut inputs = Inputs { logits, targets, scale: 2.0 };
            let [losses, _, d_logits] = run_made(make, driver, case, &inputs);
            assert_eq!(losses, vec![0.0; rows], "{case:?}: certain and right");
            assert!(d_logits.iter().all(|&d| d == 0.0), "{case:?}: nothing to learn");

            // The class before it instead: off by exactly the distance, all of it on two classes.
            let before = |place: usize| (place + columns - 1) % columns;
            inputs.targets = places.iter().map(|&place| before(place) as i32).collect();
            let [losses, _, d_logits] = run_made(make, driver, case, &inputs);
            let apart = 2.0 * rounded(dtype, 1e4);
            assert_eq!(losses, vec![apart; rows], "{case:?}: certain and wrong");
            for (row, &place) in places.iter().enumerate() {
                let mut expected = vec![0.0; columns];
                expected[place] = 2.0;
                expected[before(place)] = -2.0;
                assert_eq!(d_logits[row * columns..][..columns], expected, "{case:?}: row {row}");
            }
        }
    });
}

/// Nothing out of bounds is read, the row says so itself, and its neighbours do not notice.
#[test]
fn what_is_no_class_or_no_number_makes_its_own_row_nan() {
    on_each_machine(|driver| {
        for (dtype, columns) in [
            (Dtype::Bf16, 304),
            (Dtype::F32, 304),
            (Dtype::Bf16, 65_544), // of a cluster
        ] {
            let classes = columns - 3;
            let case = Case { dtype, rows: 8, classes, columns, z_loss: 0.0, size: None };
            let good = Inputs::new(case);
            let mut bad = Inputs::new(case);
            for (row, target) in [(3, -1), (4, classes as i32), (5, i32::MAX), (6, i32::MIN)] {
                bad.targets[row] = target;
            }
            bad.logits[7 * case.columns + 11] = f64::NAN;
            let [expected, _, d_expected] = run(driver, case, &good);
            let [losses, with_gradient, d_logits] = run(driver, case, &bad);
            for row in 0..case.rows {
                let at = row * case.columns..(row + 1) * case.columns;
                if row < 3 {
                    assert_eq!(losses[row], expected[row], "{case:?}: row {row}");
                    assert_eq!(d_logits[at.clone()], d_expected[at], "{case:?}: row {row}");
                    continue;
                }
                assert!(losses[row].is_nan() && with_gradient[row].is_nan(), "{case:?}: row {row}");
                let (d_classes, d_padding) = d_logits[at].split_at(case.classes);
                assert!(d_classes.iter().all(|d| d.is_nan()), "{case:?}: row {row}");
                assert!(d_padding.iter().all(|&d| d == 0.0), "{case:?}: row {row}");
            }
        }
    });
}

/// Ignored rows of every kind of width, between others, and nothing but ignored rows.
#[test]
fn ignored_rows_are_zeros() {
    on_each_machine(|driver| {
        let generator = Philox::new(3, 0);
        for (dtype, columns) in [(Dtype::Bf16, 264), (Dtype::F32, 9000), (Dtype::Bf16, 66_000)] {
            let rows = 4;
            let case =
                Case { dtype, rows, classes: columns - 3, columns, z_loss: 1e-2, size: None };
            let mut inputs = Inputs::new(case);
            let drawn = (0..rows as u64).map(|row| generator.at(row)[0] % 2 == 0);
            let ignored: Vec<bool> = drawn.collect();
            assert!(ignored.contains(&true) && ignored.contains(&false), "{ignored:?}");
            for all in [false, true] {
                for (target, &ignored) in inputs.targets.iter_mut().zip(&ignored) {
                    *target = if ignored || all { IGNORE_INDEX } else { 1 };
                }
                let [losses, with_gradient, d_logits] = run(driver, case, &inputs);
                assert_eq!(losses, with_gradient, "{case:?}");
                for (row, &ignored) in ignored.iter().enumerate() {
                    let zero = ignored || all;
                    assert_eq!(losses[row] == 0.0, zero, "{case:?}: row {row}");
                    let d_row = &d_logits[row * columns..][..columns];
                    assert_eq!(d_row.iter().all(|&d| d == 0.0), zero, "{case:?}: row {row}");
                }
            }
        }
    });
}

#[test]
fn what_has_no_kernel_is_refused() {
    on_each_machine(|driver| {
        for (dtype, classes, columns, why) in [
            (Dtype::Bf16, 12, 12, "multiple of 8"),
            (Dtype::F32, 6, 6, "multiple of 4"),
            (Dtype::F32, 0, 0, "multiple of 4"),
            (Dtype::Bf16, 8, MAX_COLUMNS + 8, "model.vocab up to 1073741824"),
            (Dtype::Bf16, 0, 8, "choose 1 to 8 classes"),
            (Dtype::F32, 9, 8, "choose 1 to 8 classes"),
        ] {
            let error = Loss::new(driver, dtype, classes, columns).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        Loss::new(driver, Dtype::Bf16, MAX_COLUMNS, MAX_COLUMNS).unwrap();
        let loss = Loss::new(driver, Dtype::F32, 8, 8).unwrap();
        let all = driver.allocate("all", 8 * 4).unwrap().address;
        let args = LossForward { logits: all, targets: all, losses: all };
        let mut launched = |rows, z_loss| {
            loss.forward(driver, StreamId::MAIN, rows, z_loss, &args).map_err(|it| it.to_string())
        };
        assert!(launched(1 << 31, 0.0).unwrap_err().contains("train.micro_batch"));
        assert!(launched(1, f32::NAN).unwrap_err().contains("z-loss"));
        // No rows: nothing to do, and nothing that a driver could refuse.
        launched(0, 0.0).unwrap();
    });
}

/// One worker and several: blocks run one after the other, or at the same time.
#[test]
fn workers_do_not_change_a_bit() {
    if let Err(error) = host::present() {
        println!("skipped: no simt: {error}");
        return;
    }
    // In one block, and in a cluster.
    for (rows, columns) in [(9, 1208), (3, 65_544)] {
        let classes = columns - 7;
        let case = Case { dtype: Dtype::Bf16, rows, classes, columns, z_loss: 1e-2, size: None };
        let prepared = Prepared::new(case);
        let of_workers = |workers| {
            let options = host::Options { workers, ..host::Options::default() };
            check(Loss::new, &mut Host::new(options).unwrap(), &prepared)
        };
        let one = of_workers(1);
        for workers in [2, 5] {
            assert!(of_workers(workers) == one, "{workers} workers give other bits than one");
        }
    }
}
