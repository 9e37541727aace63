//! Results with something missing, in which the tolerance must see it.

use super::*;

/// Late keys are seen by few queries, each with a small share: in the largest error of a whole tensor
/// their gradients do not count.
#[test]
fn late_rows_of_gradients_that_are_missing_are_seen() {
    let case = Case::new(Dtype::Bf16, heads(1, 1, 64), 1, 1024);
    let check = Check::new(case, case.inputs());
    let [plain, exact] = [&check.plain, &check.exact].map(|it| it.parts(case));
    for (of, late) in [(3, 1), (4, 16), (5, 1), (5, 71)] {
        let Part { name, dtype, of: rows, values } = &plain[of];
        let judged =
            |rows, found: &[f64]| exactness(*dtype, rows, found, values, &exact[of].values);
        let whole = Matrices { together: rows.rows, ..*rows };
        judged(*rows, values).unwrap();
        let mut found = values.clone();
        let from = found.len() - late * rows.columns;
        found[from..].fill(0.0);
        let seen = judged(*rows, &found).expect_err("rows are missing");
        println!("{late} rows of {name}: {seen}; in the whole: {:?}", judged(whole, &found));
        if *name == "d_v" {
            judged(whole, &found).expect("this is what rows by themselves are judged for");
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
