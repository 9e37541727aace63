//! cp.async, mbarriers, and bulk copies without a tensor map: which bytes land where.

use half::bf16;

use super::{Case, Inputs, Needs, UNTOUCHED, bits, pair};

pub(super) fn cases() -> Vec<Case> {
    [cp_async(), mbarriers(), bulk_loads(), bulk_stores()].concat()
}

/// Shared memory as the kernels fill it, with these words written over it.
fn shared(words: usize, written: &[(usize, &[u32])]) -> Vec<u32> {
    let mut all = vec![UNTOUCHED; words];
    for &(at, piece) in written {
        all[at..at + piece.len()].copy_from_slice(piece);
    }
    all
}

fn cp_async() -> Vec<Case> {
    let of_words = |(name, words): (&str, usize)| {
        let inp = Inputs::of(name).words(32 * words);
        let pieces: Vec<_> =
            inp.chunks(words).enumerate().map(|(lane, piece)| (2 * words * lane, piece)).collect();
        Case::new(name, Needs::Sm80, 32, inp.clone(), shared(64 * words, &pieces))
    };
    let zfill = Inputs::of("cp_async_16_zfill").words(128);
    let filled: Vec<Vec<u32>> = zfill
        .chunks(4)
        .enumerate()
        .map(|(lane, piece)| {
            let kept = |word: usize| match (8 * (lane % 17)).saturating_sub(32 * word) {
                0 => 0,
                bits if bits < 32 => piece[word] & ((1 << bits) - 1),
                _ => piece[word],
            };
            (0..4).map(kept).collect()
        })
        .collect();
    let pieces: Vec<_> =
        filled.iter().enumerate().map(|(lane, piece)| (8 * lane, piece.as_slice())).collect();
    let groups = Inputs::of("cp_async_groups").words(384);
    [("cp_async_4", 1), ("cp_async_8", 2), ("cp_async_16", 4)]
        .map(of_words)
        .into_iter()
        .chain([
            Case::new("cp_async_16_zfill", Needs::Sm80, 32, zfill.clone(), shared(256, &pieces)),
            Case::new("cp_async_groups", Needs::Sm80, 32, groups.clone(), groups),
        ])
        .collect()
}

fn sm90(name: &str, threads: u32, inp: Vec<u32>, expected: Vec<u32>) -> Case {
    Case::new(name, Needs::Sm90a, threads, inp, expected)
}

fn mbarriers() -> Vec<Case> {
    // A wait for parity p is over once the phase of that parity is: on a fresh barrier the phase
    // before the first, of parity 1, counts as over.
    let phases = Inputs::of("mbarrier_phases").words(4);
    let asked = [
        [1, 0], // fresh: parity 1, parity 0
        [0, 1], // parity 0 after one arrival, after two
        [0, 0], // parity 1: right after; with all arrivals but not all bytes
        [1, 1], // parity 0 still; parity 1 with the bytes
        [0, 0], // parity 0, whose phase is the current one; parity 0 of the new barrier
    ];
    let expected = asked.as_flattened().iter().copied().chain([1, phases[0]]).collect();

    let pieces = Inputs::of("mbarrier_expect_tx").words(20);
    let landed = [&pieces[..12], &pieces[16..]].concat();

    let ring = Inputs::of("mbarrier_wait").words(128);
    let emptied = (0..128).map(|i| ring[i ^ 1]).collect();
    vec![
        sm90("mbarrier_phases", 32, phases.clone(), expected),
        sm90("mbarrier_expect_tx", 32, pieces.clone(), landed),
        sm90("mbarrier_wait", 64, ring.clone(), emptied),
    ]
}

fn bulk_loads() -> Vec<Case> {
    let load = Inputs::of("bulk_load").words(28);
    let landed = shared(64, &[(4, &load[8..28]), (36, &load[..4])]);

    let multicast = |name: &str, ranks: u32| {
        let mut inp = Inputs::of("bulk_load_multicast").words(20);
        inp[0] = ranks;
        let tile = |rank: u32| match ranks >> rank & 1 {
            1 => shared(32, &[(8, &inp[4..20])]),
            _ => shared(32, &[]),
        };
        Case {
            kernel: "conform_bulk_load_multicast".to_string(),
            blocks: 2,
            cluster: 2,
            ..sm90(name, 32, inp.clone(), [tile(0), tile(1)].concat())
        }
    };

    let sent = Inputs::of("bulk_copy_cluster").words(64);
    let received = (0..4).flat_map(|block: usize| {
        let from = 16 * (block ^ 1);
        shared(32, &[(12, &sent[from..from + 16])])
    });

    let written = Inputs::of("fence_proxy_async_global").words(32);
    let plus_one: Vec<u32> = written.iter().map(|word| word.wrapping_add(1)).collect();
    vec![
        sm90("bulk_load", 32, load.clone(), landed),
        multicast("bulk_load_multicast", 0b11),
        multicast("bulk_load_multicast to the other block", 0b10),
        Case {
            blocks: 4,
            cluster: 2,
            ..sm90("bulk_copy_cluster", 32, sent.clone(), received.collect())
        },
        sm90("fence_proxy_async_global", 32, written.clone(), plus_one.repeat(2)),
    ]
}

fn bulk_stores() -> Vec<Case> {
    // 16 words into the middle of 24.
    let case = |name: &str, inp: Vec<u32>, initial: Vec<u32>, combine: fn(u32, u32) -> u32| {
        let mut expected = initial.clone();
        for (word, &stored) in expected[4..20].iter_mut().zip(&inp) {
            *word = combine(*word, stored);
        }
        Case { initial, ..sm90(name, 32, inp, expected) }
    };
    let floats = |name: &str, count| bits(&Inputs::of(name).normals(count));
    let pairs = |name: &str, count: usize| -> Vec<u32> {
        let values = Inputs::of(name).normals(2 * count);
        let bf16s: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
        bf16s.chunks(2).map(|two| pair(two[0], two[1])).collect()
    };
    let add_f32 = |a, b| (f32::from_bits(a) + f32::from_bits(b)).to_bits();
    // The exact sum, rounded once: f64 holds it.
    let add_bf16 = |a: u32, b: u32| {
        let half = |word: u32, shift| f64::from(f32::from_bits(word >> shift << 16));
        let sum = |shift| bf16::from_f64(half(a, shift) + half(b, shift));
        pair(sum(0), sum(16))
    };
    let groups = Inputs::of("bulk_groups").words(64);
    let words = |name: &str, count| Inputs::of(name).words(count);
    vec![
        case("bulk_store", words("bulk_store", 16), vec![UNTOUCHED; 24], |_, stored| stored),
        case(
            "bulk_reduce_add_f32",
            floats("bulk_reduce_add_f32", 16),
            floats("bulk_reduce_add_f32 before", 24),
            add_f32,
        ),
        case(
            "bulk_reduce_add_bf16",
            pairs("bulk_reduce_add_bf16", 16),
            pairs("bulk_reduce_add_bf16 before", 24),
            add_bf16,
        ),
        sm90("bulk_groups", 32, groups.clone(), groups),
    ]
}
