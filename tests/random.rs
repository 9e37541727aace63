//! Philox against the published vectors, and the numbers derived from it.

use isobath::random::Philox;

/// Random123's known-answer vectors (kat_vectors, philox4x32 with 7 and 10 rounds).
#[test]
fn philox_gives_the_published_vectors() {
    let of_seven = |seed, stream, counter| Philox::new(seed, stream).after_rounds(7, counter);
    assert_eq!(of_seven(0, 0, 0), [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]);
    assert_eq!(
        of_seven(0x299f_31d0_a409_3822, 0x0370_7344_1319_8a2e, 0x85a3_08d3_243f_6a88),
        [0x4dfc_caba, 0x190a_87f0, 0xc473_62ba, 0xb6b5_242a]
    );
    let all = u64::MAX;
    assert_eq!(Philox::new(0, 0).at(0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    assert_eq!(Philox::new(all, all).at(all), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    assert_eq!(
        Philox::new(0x299f_31d0_a409_3822, 0x0370_7344_1319_8a2e).at(0x85a3_08d3_243f_6a88),
        [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
    );
}

#[test]
fn normal_and_uniform_numbers_have_their_moments() {
    let philox = Philox::new(7, 1);
    let n = 200_000u64;
    let normals: Vec<f64> = (0..n).map(|index| philox.normal(index)).collect();
    let moment = |power| normals.iter().map(|x| x.powi(power)).sum::<f64>() / n as f64;
    // Standard errors: 1, sqrt(2), sqrt(96) over sqrt(n); five of them are allowed.
    let root = (n as f64).sqrt();
    assert!(moment(1).abs() < 5.0 / root, "mean {}", moment(1));
    assert!((moment(2) - 1.0).abs() < 5.0 * 2f64.sqrt() / root, "variance {}", moment(2));
    assert!((moment(4) - 3.0).abs() < 5.0 * 96f64.sqrt() / root, "fourth {}", moment(4));
    let mean = (0..n).map(|index| philox.uniform_f64(index)).sum::<f64>() / n as f64;
    assert!((mean - 0.5).abs() < 5.0 / 12f64.sqrt() / root, "mean {mean}");
}

#[test]
fn filling_gives_the_numbers_of_asking_one_by_one() {
    let philox = Philox::new(3, 9);
    for (first, length) in [(0, 8), (1, 8), (5, 1), (4, 7), (9, 0)] {
        let mut filled = vec![0f32; length];
        philox.fill_normal(first, &mut filled);
        let asked: Vec<f32> = (first..).take(length).map(|i| philox.normal(i) as f32).collect();
        assert_eq!(filled, asked, "from {first}, {length} numbers");
    }
}
