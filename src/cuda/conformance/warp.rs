//! Conversions, arithmetic, shuffles and votes, barriers, memory order, atomics, clusters.

use half::bf16;

use super::{Case, Inputs, Needs, Tolerance, bits};

pub(super) fn cases() -> Vec<Case> {
    [
        conversions(),
        approximations(),
        vec![intrinsics(), cache_hints()],
        shuffles(),
        vec![votes(), reductions(), elect_one()],
        barriers(),
        memory_order(),
        atomics(),
        clusters(),
    ]
    .concat()
}

fn sm80(name: &str, threads: u32, inp: Vec<u32>, expected: Vec<u32>) -> Case {
    Case::new(name, Needs::Sm80, threads, inp, expected)
}

// ------------------------------------------------------------------ conversions and arithmetic

/// To nearest, ties to even; every NaN becomes 0x7fff.
fn to_bf16(word: u32) -> u32 {
    let value = f32::from_bits(word);
    if value.is_nan() { 0x7fff } else { u32::from(bf16::from_f32(value).to_bits()) }
}

/// Both signs of what is special about f32 and about rounding to bf16, then random bits.
fn awkward_floats(name: &str, count: usize) -> Vec<u32> {
    let special = [
        0x0000_0000, // 0
        0x7f80_0000, // infinity
        0x7fc0_0000, // a quiet NaN
        0x7f80_0001, // a signalling NaN whose upper half looks like infinity
        0x7fff_ffff, // a NaN that rounding would carry out of the exponent
        0x7f7f_ffff, // the largest f32: rounds to infinity
        0x7f7f_7fff, // just below the tie between the largest bf16 and infinity
        0x0000_0001, // the smallest subnormal
        0x0000_8000, // the tie between 0 and the smallest bf16
        0x007f_ffff, // the largest subnormal
        0x3f80_8000, // a tie, to even downwards
        0x3f81_8000, // a tie, to even upwards
        0x3f80_8001, // just above a tie
        0x3f80_7fff, // just below a tie
    ];
    let both = special.iter().flat_map(|&word: &u32| [word, word | 0x8000_0000]);
    both.chain(Inputs::of(name).words(count)).take(count).collect()
}

fn conversions() -> Vec<Case> {
    let one = awkward_floats("bf16_bits", 128);
    let low = awkward_floats("bf16x2_bits low", 128);
    let high = Inputs::of("bf16x2_bits high").words(128);
    let of_two = low.iter().zip(&high).map(|(&low, &high)| to_bf16(low) | to_bf16(high) << 16);
    let expected_two = of_two.collect();
    vec![
        sm80("bf16_bits", 128, one.clone(), one.into_iter().map(to_bf16).collect()),
        sm80("bf16x2_bits", 128, [low, high].concat(), expected_two),
    ]
}

/// The errors are those of the PTX ISA's tables for `.approx.ftz.f32` (`.approx.f32` for tanh),
/// twice: the golden may come from a GPU, and its error lie on the other side.
fn approximations() -> Vec<Case> {
    let function = |name: &str, inp: Vec<f32>, exact: fn(f64) -> f64, relative, absolute| Case {
        tolerance: Tolerance::Float { relative: 2.0 * relative, absolute: 2.0 * absolute },
        ..sm80(
            name,
            128,
            bits(&inp),
            inp.iter().map(|&x| (exact(f64::from(x)) as f32).to_bits()).collect(),
        )
    };
    let uniform = |name: &str, from, to| Inputs::of(name).uniform(128, from, to);
    let wide = |name: &str| -> Vec<f32> {
        uniform(name, -40.0, 40.0).into_iter().map(f32::exp2).collect()
    };
    let power = |exponent: f64| 2f64.powf(exponent);
    vec![
        function("exp2_approx", uniform("exp2", -40.0, 40.0), f64::exp2, power(-22.0), 0.0),
        function("log2_approx", wide("log2"), f64::log2, power(-22.0), power(-22.0)),
        function("rsqrt_approx", wide("rsqrt"), |x| 1.0 / x.sqrt(), power(-22.4), 0.0),
        function("reciprocal_approx", wide("reciprocal"), |x| 1.0 / x, power(-23.0), 0.0),
        function("tanh_approx", uniform("tanh", -5.0, 5.0), f64::tanh, power(-11.0), 0.0),
    ]
}

fn intrinsics() -> Case {
    let mut integers = Inputs::of("intrinsics").words(128);
    for (i, integer) in integers.iter_mut().enumerate() {
        *integer >>= i % 33 / 2 * 2; // every number of leading zeros
    }
    integers[..3].copy_from_slice(&[0, 1, u32::MAX]);
    let x = Inputs::of("intrinsics x").uniform(128, 0.01, 100.0);
    let y = Inputs::of("intrinsics y").normals(128);
    let of_each = |function: &dyn Fn(usize) -> u32| (0..128).map(function).collect::<Vec<_>>();
    let counts = of_each(&|i| {
        let word = integers[i];
        let first = if word == 0 { 0 } else { word.trailing_zeros() + 1 };
        word.count_ones() | word.leading_zeros() << 8 | first << 16
    });
    let expected = [
        counts,
        of_each(&|i| (x[i] / y[i]).to_bits()),
        of_each(&|i| (1.0 / x[i]).to_bits()),
        of_each(&|i| x[i].sqrt().to_bits()),
        of_each(&|i| x[i].mul_add(y[i], -1.0).to_bits()),
        of_each(&|i| x[i].max(y[i]).to_bits() ^ (integers[i] as i32).min(77) as u32),
    ];
    let inp = [integers.clone(), bits(&x), bits(&y)].concat();
    sm80("intrinsics", 128, inp, expected.concat())
}

fn cache_hints() -> Case {
    let inp = Inputs::of("cache_hints").words(384);
    sm80("cache_hints", 32, inp.clone(), inp)
}

// ------------------------------------------------------------------ shuffles and votes

#[derive(Clone, Copy)]
enum Shuffle {
    Index,
    Up,
    Down,
    Xor,
}

impl Shuffle {
    /// The thread whose value `thread` receives (CUDA C++ Programming Guide, warp shuffle
    /// functions): parts of `width` lanes; out of its part a lane keeps its own value, except that
    /// xor may reach earlier parts.
    fn source(self, thread: usize, by: usize, width: usize) -> usize {
        let lane = thread % width;
        let part = thread - lane;
        match self {
            Shuffle::Index => part + by % width,
            Shuffle::Up if by <= lane => thread - by,
            Shuffle::Down if lane + by < width => thread + by,
            Shuffle::Xor if thread ^ by < part + width => thread ^ by,
            Shuffle::Up | Shuffle::Down | Shuffle::Xor => thread,
        }
    }
}

fn shuffles() -> Vec<Case> {
    let kinds = [
        ("__shfl_sync", Shuffle::Index, 64),
        ("__shfl_up_sync", Shuffle::Up, 32),
        ("__shfl_down_sync", Shuffle::Down, 32),
        ("__shfl_xor_sync", Shuffle::Xor, 32),
    ];
    let case = |(name, kind, end): (&str, Shuffle, u32)| {
        let values = Inputs::of(name).words(64);
        let by = Inputs::of(&format!("{name} by")).below(64, end);
        let from = |thread: usize, width| kind.source(thread, by[thread] as usize, width);
        let mut expected = vec![];
        for width in [32, 16, 8, 4, 2] {
            expected.extend((0..64).map(|thread| values[from(thread, width)]));
        }
        expected.extend((0..64).map(|thread| from(thread, 8) as u32));
        expected.extend((0..64).map(|thread| values[from(thread, 8)]));
        expected.extend(
            (0..64).map(|thread| values[kind.source(thread, by[thread] as usize % 16, 16)]),
        );
        expected.extend((0..64).map(|thread| (from(thread, 32) as f32).to_bits()));
        sm80(name, 64, [values.clone(), by.clone()].concat(), expected)
    };
    kinds.map(case).to_vec()
}

fn votes() -> Case {
    // A mixed warp, one of all, one of none.
    let mixed = Inputs::of("votes").below(32, 2);
    let inp = [mixed, vec![7; 32], vec![0; 32]].concat();
    let ballot = |from: usize, lanes: usize| {
        (from..from + lanes).map(|i| u32::from(inp[i] != 0) << (i % 32)).sum::<u32>()
    };
    let of_warp = |thread: usize| ballot(thread / 32 * 32, 32);
    let expected = [
        (0..96).map(of_warp).collect::<Vec<_>>(),
        (0..96).map(|thread| u32::from(of_warp(thread) != 0)).collect(),
        (0..96).map(|thread| u32::from(of_warp(thread) == u32::MAX)).collect(),
        (0..96).map(|thread| ballot(thread / 16 * 16, 16)).collect(),
    ];
    sm80("votes", 96, inp.clone(), expected.concat())
}

/// Every lane adds in the same tree, so all have the same bits.
fn reductions() -> Case {
    let values = Inputs::of("reductions").normals(32);
    let mut sums = values.clone();
    for step in [16, 8, 4, 2, 1] {
        sums = (0..32).map(|lane: usize| sums[lane] + sums[lane ^ step]).collect();
    }
    let most = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    sm80("reductions", 32, bits(&values), [bits(&sums), bits(&[most; 32])].concat())
}

fn elect_one() -> Case {
    Case::new("elect_one", Needs::Sm90a, 64, vec![0; 4], vec![1, 1])
}

// ------------------------------------------------------------------ barriers

fn barriers() -> Vec<Case> {
    // out[i] = inp[source(i)]
    let exchange = |name, threads: u32, words: usize, source: fn(usize) -> usize| {
        let inp = Inputs::of(name).words(threads as usize);
        let expected = (0..words).map(|i| inp[source(i)]).collect();
        sm80(name, threads, inp, expected)
    };
    let steps = (0..32).map(|i| 36 * i);
    let shared_address = Case {
        dynamic_shared_bytes: 2048,
        ..sm80("shared_address", 32, vec![0; 4], steps.chain([0, 0, 0, 7 * 16]).collect())
    };
    vec![
        exchange("syncwarp", 64, 64, |i| i ^ 31),
        exchange("syncthreads", 256, 256, |i| 255 - i),
        exchange("barrier_sync", 256, 256, |i| i ^ 127),
        exchange("barrier_arrive", 256, 128, |i| 127 - i),
        shared_address,
    ]
}

// ------------------------------------------------------------------ memory order, atomics

fn memory_order() -> Vec<Case> {
    let words = Inputs::of("memory order").words(8);
    let next = words[1..].iter().chain(&words[..1]);
    vec![
        Case {
            blocks: 2,
            cooperative: true,
            initial: vec![0; 5],
            ..sm80(
                "acquire_release",
                32,
                words.clone(),
                vec![1, words[0], words[1], words[0], words[1]],
            )
        },
        Case {
            blocks: 8,
            cooperative: true,
            initial: vec![0; 17],
            ..sm80(
                "grid_barrier",
                32,
                words.clone(),
                [8].iter().chain(&words).chain(next).copied().collect(),
            )
        },
        sm80("threadfence_block", 64, words.clone(), vec![words[0]]),
    ]
}

fn atomics() -> Vec<Case> {
    const BLOCKS: u32 = 4;
    const ALL: usize = 128 * BLOCKS as usize;
    // Eight words that all threads of four blocks change; no order matters.
    let bins = |name, inp: Vec<u32>, combine: &dyn Fn(u32, u32) -> u32| {
        let initial = vec![0; 8];
        let mut expected = initial.clone();
        for (i, &word) in inp.iter().enumerate() {
            expected[i % 8] = combine(expected[i % 8], word);
        }
        Case { blocks: BLOCKS, initial, ..sm80(name, 128, inp, expected) }
    };
    // Pairs, of which the first have what subnormal numbers make of a sum.
    let special = [
        [0x0000_0001, 0x0000_0000, 0x0000_0000], // one in memory: 0
        [0x3f80_0000, 0x007f_ffff, 0x807f_ffff], // two that are added: 1
        [0x0080_0001, 0x8080_0000, 0x8000_0000], // one that is the sum: 0, unchanged by -0
        [0x80c0_0000, 0x0080_0000, 0x8000_0000], // a negative one: -0
    ];
    let mut sums = bits(&Inputs::of("reduce before").normals(64));
    let mut added = bits(&Inputs::of("reduce").normals(128));
    for (i, [before, one, other]) in special.into_iter().enumerate() {
        (sums[i], added[i], added[64 + i]) = (before, one, other);
    }
    let flushed = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
    let float = |word| flushed(f32::from_bits(word));
    let flushed_sum = |a, b| flushed(float(a) + float(b)).to_bits();
    let expected = (0..64).map(|i| flushed_sum(flushed_sum(sums[i], added[i]), added[64 + i]));
    let reduction = Case {
        initial: sums.clone(),
        ..Case::new("reduce_add_f32x2", Needs::Sm90a, 32, added.clone(), expected.collect())
    };

    let small: Vec<f32> =
        Inputs::of("atomic f32").integers(ALL, 1000).into_iter().map(|i| i as f32).collect();
    let sum = |a, b| (f32::from_bits(a) + f32::from_bits(b)).to_bits();

    let tickets = Case {
        blocks: BLOCKS,
        initial: vec![0; 1 + ALL],
        ..sm80("atomic_add_u32", 128, vec![0; 4], [vec![3 * ALL as u32], vec![1; ALL]].concat())
    };
    let before = Inputs::of("atomic before").words(128);
    let inp = Inputs::of("atomic").words(256);
    let exchange = Case {
        initial: [before.clone(), vec![0; 256]].concat(),
        ..sm80("atomic_exch_u32", 128, inp.clone(), [&inp[128..], &before, &inp[..128]].concat())
    };
    // The word is inp[i]: the first exchange expects another and leaves it.
    let words = &inp[..128];
    let compare = Case {
        initial: [words, &[0; 258]].concat(),
        ..sm80("atomic_cas_u32", 128, inp.clone(), [&inp[128..], words, words, &[1, 1]].concat())
    };
    vec![
        bins("atomic_add_f32", bits(&small), &sum),
        bins("atomic_add_i32", Inputs::of("atomic i32").words(ALL), &u32::wrapping_add),
        tickets,
        bins("atomic_max_u32", Inputs::of("atomic max").words(ALL), &|a, b| a.max(b)),
        exchange,
        compare,
        reduction,
    ]
}

// ------------------------------------------------------------------ clusters, registers

fn clusters() -> Vec<Case> {
    let sm90 = |name, threads, inp, expected| Case::new(name, Needs::Sm90a, threads, inp, expected);
    let words = Inputs::of("cluster").words(8);
    let ranks = (0..8).flat_map(|block| {
        let at = |rank: usize| words[block / 4 * 4 + rank % 4];
        let rank = block % 4;
        [rank as u32, 4, at(rank + 1), at(rank + 3).wrapping_mul(3)]
    });
    let cluster =
        Case { blocks: 8, cluster: 4, ..sm90("cluster", 32, words.clone(), ranks.collect()) };
    let mail = Inputs::of("mbarrier_cluster").words(128);
    let received = (0..128).map(|i| mail[i ^ 32 ^ 5]).collect();
    let mbarrier =
        Case { blocks: 4, cluster: 2, ..sm90("mbarrier_cluster", 32, mail.clone(), received) };
    let registers = Inputs::of("setmaxnreg").words(384);
    let kept = registers.iter().enumerate().map(|(i, &word)| if i < 128 { word } else { !word });
    let dependent = Inputs::of("grid_dependency").words(32);
    vec![
        cluster,
        mbarrier,
        sm90("setmaxnreg", 384, registers.clone(), kept.collect()),
        sm90("grid_dependency", 32, dependent.clone(), dependent),
    ]
}
