//! The longest rows that the kernels are for, of short documents, so that the work is linear in
//! them.

use super::*;

/// Documents of a stretch of this length, repeated to the end of the row. All tiles but those of
/// 192 rows begin it anew.
const STRETCH: usize = 1024;
const LENGTHS: [usize; 14] = [64, 1, 127, 100, 30, 2, 128, 5, 133, 90, 70, 66, 61, 110];

/// `of`, [rows,S,columns] with S = [`STRETCH`], in sequences of `times` as much.
fn repeated(of: &[f64], columns: usize, times: usize) -> Vec<f64> {
    of.chunks_exact(STRETCH * columns).flat_map(|rows| rows.repeat(times)).collect()
}

fn check(sequence: usize) -> Check {
    let (of, times) = (heads(1, 1, 32), sequence / STRETCH);
    let case = |sequence| Case::new(Dtype::Bf16, of, 1, sequence);
    let Check { inputs, plain, exact, .. } =
        Check::new(case(STRETCH), case(STRETCH).packed(&LENGTHS));
    let starts = inputs.document_starts.unwrap();
    let starts = (0..sequence).map(|at| (at - at % STRETCH) as i32 + starts[at % STRETCH]);
    let (qkv, out) = (of.qkv_columns(), of.head_dim);
    let longer = |outputs: Outputs| Outputs {
        out: repeated(&outputs.out, out, times),
        log_sum_exp: repeated(&outputs.log_sum_exp, 1, times),
        delta: repeated(&outputs.delta, 1, times),
        d_qkv: repeated(&outputs.d_qkv, qkv, times),
    };
    Check {
        case: case(sequence),
        inputs: Inputs {
            qkv: repeated(&inputs.qkv, qkv, times),
            document_starts: Some(starts.collect()),
            d_out: repeated(&inputs.d_out, out, times),
        },
        plain: longer(plain),
        plain_of_rounded: OnceLock::new(),
        exact: longer(exact),
        whole: false,
    }
}

/// On simt and on a GPU; the machine for PTX is too slow. As documents are run: in two passes.
#[test]
fn rows_of_131072_tokens() {
    let check = check(131_072);
    for mut driver in machines() {
        check.run(&mut *driver, Kernels::default());
    }
}

#[test]
#[ignore = "takes half a minute"]
fn rows_of_131072_tokens_in_every_way() {
    let check = check(131_072);
    for mut driver in machines() {
        for kernels in every_kernel(&mut *driver, check.case) {
            check.run(&mut *driver, kernels);
        }
    }
}
