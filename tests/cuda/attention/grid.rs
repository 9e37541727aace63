//! Head dims, query heads for one of k and v, and lengths, with documents and without: Hopper's
//! forward and every backward pass. By default each pair of them occurs; all of them on demand.

use super::*;

const GROUPS: [usize; 4] = [1, 2, 4, 8];
const LENGTHS: [usize; 9] = [1, 7, 64, 113, 128, 203, 256, 513, 1024];
/// Query heads for one of k and v, and whether rows are documents (D) or whole (W).
type Kind = (usize, bool);
const D: bool = true;
const W: bool = false;

/// For each length, what it is tried with for each of [`HEAD_DIMS`]. Where work grows most, longest
/// rows have documents, and widest heads are few.
const SAMPLE: [[Kind; HEAD_DIMS.len()]; LENGTHS.len()] = [
    [(1, W), (2, D), (4, W), (8, D), (8, W)],
    [(2, D), (4, W), (8, D), (1, W), (4, D)],
    [(4, W), (8, D), (1, W), (2, D), (8, D)],
    [(8, D), (1, W), (2, D), (4, W), (2, W)],
    [(1, D), (2, W), (4, D), (8, W), (4, W)],
    [(2, W), (4, D), (8, W), (1, D), (1, W)],
    [(4, D), (8, W), (1, D), (2, W), (2, D)],
    [(8, W), (4, D), (2, W), (1, W), (1, D)],
    [(8, D), (4, D), (2, D), (1, W), (1, D)],
];

/// Borders on those of tiles and beside them, documents of one token, and over several tiles.
fn lengths(sequence: usize) -> &'static [usize] {
    match sequence {
        1 => &[],
        7 => &[3, 1],
        64 => &[1, 33],
        113 => &[64, 17],
        128 => &[31, 65],
        203 => &[1, 127, 64],
        256 => &[128, 5, 60],
        513 => &[257, 127, 1],
        _ => &[257, 1, 190, 320],
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Point {
    head_dim: usize,
    group: usize,
    sequence: usize,
    documents: bool,
}

impl Point {
    fn check(self) -> Check {
        let Point { head_dim, group, sequence, documents } = self;
        // Of few values the plain formula's largest error may be small by chance.
        let batch = if sequence < 64 { 8 } else { 1 };
        let case = Case::new(Dtype::Bf16, heads(group, 1, head_dim), batch, sequence);
        let inputs = if documents { case.packed(lengths(sequence)) } else { case.inputs() };
        Check::new(case, inputs)
    }
}

fn sample() -> impl Iterator<Item = Point> {
    LENGTHS.into_iter().zip(SAMPLE).flat_map(|(sequence, kinds)| {
        HEAD_DIMS.into_iter().zip(kinds).map(move |(head_dim, (group, documents))| Point {
            head_dim,
            group,
            sequence,
            documents,
        })
    })
}

fn everything() -> impl Iterator<Item = Point> {
    LENGTHS.into_iter().flat_map(|sequence| {
        HEAD_DIMS.into_iter().flat_map(move |head_dim| {
            GROUPS.into_iter().flat_map(move |group| {
                [W, D].map(|documents| Point { head_dim, group, sequence, documents })
            })
        })
    })
}

#[test]
fn every_pair_is_in_the_sample() {
    let of = |point: Point| {
        let Point { head_dim, group, sequence, documents } = point;
        [head_dim, group, sequence, usize::from(documents)]
    };
    let found: Vec<_> = sample().map(of).collect();
    for point in everything().map(of) {
        for (a, b) in [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)] {
            let pair = |it: &[usize; 4]| (it[a], it[b]);
            assert!(found.iter().any(|it| pair(it) == pair(&point)), "{point:?}: {a}, {b}");
        }
    }
}

/// Long rows on simt alone, and without the second schedule.
#[test]
fn every_pair_of_sizes() {
    check(sample(), 128);
}

/// On each machine that ISOBATH_TEST_MACHINES names, else on all.
#[test]
#[ignore = "every combination: minutes on simt, far more on the machine for PTX"]
fn every_combination_of_sizes() {
    for length in LENGTHS {
        check(everything().filter(|point| point.sequence == length), usize::MAX);
    }
}

/// Rows of at most `everywhere` tokens on every machine, and on simt twice: as always, and in a
/// random order with the race detector. The same bits. Longer ones on simt or a GPU.
fn check(points: impl Iterator<Item = Point>, everywhere: usize) {
    let (short, long): (Vec<_>, Vec<_>) = points.partition(|point| point.sequence <= everywhere);
    let [short, long] =
        [short, long].map(|it| it.into_iter().map(Point::check).collect::<Vec<_>>());
    let run = |driver: &mut dyn Driver, checks: &[Check]| {
        let mut all = vec![];
        for check in checks {
            for kernels in every_hopper_kernel(driver, check.case) {
                all.extend(check.run(driver, kernels));
            }
        }
        all
    };
    let mut found = vec![];
    on_each_machine(|driver| {
        found.push(run(driver, &short));
        if driver.device() != "ptx" {
            run(driver, &long);
        }
    });
    if has_simt() {
        let (order, asynchronous, race) = (Order::Random, Asynchronous::Anytime, true);
        let raced = Options { order, asynchronous, race, seed: 3, ..Options::default() };
        let raced = run(&mut Host::new(raced).unwrap(), &short);
        assert!(raced == found[0], "other bits in another order");
    }
}
