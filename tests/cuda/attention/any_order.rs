//! Backward passes in one whose tiles of keys add to d_q in the order in which they come.

use super::*;

fn case() -> Case {
    Case::new(Dtype::Bf16, heads(4, 2, 32), 2, 700)
}

fn simt(multiprocessors: u32, order: Order, race: bool) -> Host {
    let (seed, asynchronous) = (u64::from(multiprocessors), Asynchronous::Anytime);
    let options =
        Options { multiprocessors, order, seed, asynchronous, race, ..Options::default() };
    Host::new(options).unwrap()
}

fn in_one_pass(any_order: bool) -> Kernels {
    Kernels { passes: Some(Passes::One), any_order, ..Kernels::default() }
}

#[test]
fn sums_in_any_order_are_right_and_free_of_races() {
    if !has_simt() {
        return;
    }
    for inputs in [case().inputs(), case().packed(&[70, 300, 129])] {
        let check = Check::new(case(), inputs);
        for (multiprocessors, order, race) in [
            (1, Order::Fifo, false),
            (5, Order::Lifo, false),
            (6, Order::Random, true),
            (13, Order::Random, false),
            (13, Order::Lifo, true),
        ] {
            check.run(&mut simt(multiprocessors, order, race), in_one_pass(true));
        }
    }
}

/// Where a team's blocks come to a tile of queries in another order than that of the keys, d_q has
/// other bits, and nothing else. Keys are large and nearly alike, so that sums nearly cancel (dS of
/// a row adds up to 0) and their last bits are seen in bf16.
#[test]
fn only_d_q_follows_who_comes_first() {
    if !has_simt() {
        return;
    }
    let mut inputs = case().inputs();
    let heads = case().spec.heads;
    for row in inputs.qkv.chunks_exact_mut(heads.qkv_columns()) {
        let keys = &mut row[k_column(heads, 0)..v_column(heads, 0)];
        keys.iter_mut().for_each(|value| *value = rounded(Dtype::Bf16, *value + 64.0));
    }
    let run = |any_order| {
        let mut driver = simt(13, Order::Fifo, false);
        on_device(&mut driver, in_one_pass(any_order), case(), &inputs).gradients(heads)
    };
    let ([in_order, others @ ..], [any_order, same @ ..]) = (run(false), run(true));
    assert!(others == same, "d_k or d_v");
    assert!(in_order != any_order, "nobody came in another order");
}
