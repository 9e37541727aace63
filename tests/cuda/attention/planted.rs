//! Results with something missing, in which the tolerance must see it.

use super::*;

/// Late keys are seen by few queries, each with a small share: in the largest error of a whole
/// tensor their gradients do not count.
#[test]
fn late_rows_of_gradients_that_are_missing_are_seen() {
    let case = Case::new(Dtype::Bf16, heads(1, 1, 64), 1, 1024);
    let check = Check::new(case, case.inputs());
    let [plain, exact] = [&check.plain, &check.exact].map(|it| it.parts(case));
    let judged = |of: usize, late: usize, together: Option<usize>| {
        let Part { dtype, of: rows, values, .. } = &plain[of];
        let mut found = values.clone();
        let from = found.len() - late * rows.columns;
        found[from..].fill(0.0);
        let together = together.unwrap_or(rows.together);
        exactness(*dtype, Matrices { together, ..*rows }, &found, values, &exact[of].values)
    };
    for (of, least) in [(3, 1), (4, 16), (5, 1)] {
        let name = plain[of].name;
        judged(of, 0, None).unwrap();
        let overlooked = (1..1024).take_while(|&late| judged(of, late, Some(1024)).is_ok()).count();
        println!("{name}: in the whole, {overlooked} late rows may be missing");
        assert!(name != "d_v" || overlooked > 0, "nothing would be gained");
        for late in least..=overlooked.max(least) {
            judged(of, late, None).expect_err(name);
        }
    }
}

/// A tile of 16 rows anywhere, and any one row of what is judged row by row.
#[test]
fn a_missing_tile_is_seen_anywhere() {
    let case = Case::new(Dtype::Bf16, heads(2, 1, 32), 1, 300);
    let check = Check::new(case, case.packed(&[1, 127, 64]));
    let [plain, exact] = [&check.plain, &check.exact].map(|it| it.parts(case));
    for (part, exact) in plain.iter().zip(&exact) {
        let Part { name, dtype, of, values } = part;
        if !["out", "d_q", "d_k", "d_v"].contains(name) {
            continue;
        }
        let rows = values.len() / of.columns;
        let missing = if of.together == 1 { 1 } else { 16 };
        for first in (0..=rows - missing).step_by(missing) {
            let mut found = values.clone();
            found[first * of.columns..][..missing * of.columns].fill(0.0);
            let judged = exactness(*dtype, *of, &found, values, &exact.values);
            assert!(judged.is_err(), "{name}: rows from {first} on are missing: {judged:?}");
        }
    }
}
