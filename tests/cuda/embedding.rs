//! kernels/embedding.cu against the f64 CPU backend, with texts of every kind.

use isobath::backend::{self, Backend};
use isobath::config::Dtype;
use isobath::cpu::Cpu;
use isobath::cuda::embedding::{Embedding, EmbeddingBackward, EmbeddingForward};
use isobath::cuda::host::{self, Host, Options};
use isobath::cuda::{DevicePointer, Driver, StreamId};

use super::machines::*;
use crate::support::tokens;

#[test]
fn rows_are_looked_up_as_they_are() {
    on_every_machine(|driver| {
        let mut all = vec![];
        for dtype in DTYPES {
            // Around one task of 128 vectors, and enough rows that a warp takes several.
            for (vectors, rows, vocab) in
                [(1, 401, 53), (31, 7, 1), (128, 5, 300), (129, 130, 11), (300, 3, 2)]
            {
                let columns = vectors * vector(dtype);
                let table = draws(dtype, 1, vocab * columns);
                let ids = tokens(2, rows, vocab);
                let embedding = Embedding::new(driver, dtype, columns).unwrap();
                let out = unwritten(driver, "out", dtype, rows * columns);
                let args = EmbeddingForward {
                    tokens: driver.upload("tokens", &ids).unwrap().address,
                    table: upload(driver, "table", dtype, &table).address,
                    out: out.address,
                };
                embedding.forward(driver, StreamId::MAIN, rows, vocab, &args).unwrap();
                let found = download(driver, dtype, out);
                for (row, &id) in ids.iter().enumerate() {
                    let expected = &table[id as usize * columns..][..columns];
                    let found = &found[row * columns..][..columns];
                    assert_eq!(found, expected, "{dtype}, {vectors} vectors, row {row}");
                }
                all.extend(bits(&found));
            }
        }
        all
    });
}

// ------------------------------------------------------------------ backward

fn check_backward(
    driver: &mut dyn Driver,
    dtype: Dtype,
    columns: usize,
    vocab: usize,
    ids: &[i32],
) -> Vec<u8> {
    let rows = ids.len();
    let d_out = draws(dtype, 3, rows * columns);
    let before = draws(Dtype::F32, 4, vocab * columns);
    let embedding = Embedding::new(driver, dtype, columns).unwrap();
    let d_table = upload(driver, "d_table", Dtype::F32, &before);
    let args = EmbeddingBackward {
        tokens: driver.upload("tokens", ids).unwrap().address,
        d_out: upload(driver, "d_out", dtype, &d_out).address,
        d_table: d_table.address,
    };
    embedding.backward(driver, StreamId::MAIN, rows, vocab, &args).unwrap();
    let found = download(driver, Dtype::F32, d_table);

    // What stands outside the table is left out.
    let inside: Vec<usize> =
        (0..rows).filter(|&row| (0..vocab as i32).contains(&ids[row])).collect();
    let row_of = |row: usize| &d_out[row * columns..][..columns];
    let mut plain: Vec<f32> = before.iter().map(|&value| value as f32).collect();
    for &row in &inside {
        let to = &mut plain[ids[row] as usize * columns..][..columns];
        to.iter_mut().zip(row_of(row)).for_each(|(to, &d)| *to += d as f32);
    }
    let plain: Vec<f64> = plain.into_iter().map(f64::from).collect();
    let cpu = &mut Cpu::<f64>::new();
    let cpu_d_table = filled(cpu, &[vocab, columns], &before);
    if !inside.is_empty() {
        let kept: Vec<i32> = inside.iter().map(|&row| ids[row]).collect();
        let d_out: Vec<f64> = inside.iter().flat_map(|&row| row_of(row).to_vec()).collect();
        let cpu_tokens = filled_index(cpu, &kept);
        let cpu_d_out = filled(cpu, &[kept.len(), columns], &d_out);
        cpu.embedding_backward(backend::EmbeddingBackward {
            tokens: cpu_tokens,
            d_out: cpu_d_out,
            d_table: cpu_d_table,
        })
        .unwrap();
    }
    let what = format!("{dtype} d_table [{vocab},{columns}] of {rows} tokens");
    assert_exact(&what, Dtype::F32, &found, &plain, cpu.values(cpu_d_table));
    for id in 0..vocab {
        if !ids.contains(&(id as i32)) {
            let row = id * columns..(id + 1) * columns;
            assert_eq!(found[row.clone()], before[row], "{what}: no token {id}, no change");
        }
    }
    bits(&found).collect()
}

#[test]
fn gradients_of_every_width_and_number_of_tokens() {
    on_every_machine(|driver| {
        let mut all = vec![];
        for dtype in DTYPES {
            // Around one group of 32 vectors, more groups than blocks fit, and all tails of the
            // scan's vectors of four tokens and steps of 1024.
            for (vectors, vocab, rows) in [
                (1, 53, 1),
                (1, 300, 1023),
                (5, 7, 1026),
                (31, 40, 3),
                (32, 64, 70),
                (33, 1, 9),
                (96, 11, 130),
                (420, 3, 6),
            ] {
                let ids = tokens(vocab as u64, rows, vocab);
                let columns = vectors * vector(dtype);
                all.extend(check_backward(driver, dtype, columns, vocab, &ids));
            }
        }
        all
    });
}

/// One id only, one id in half of the text, an id per token, and ids in runs: more matches of one
/// block than its list holds, and ids that reach over the parts of its warps.
#[test]
fn gradients_of_skewed_texts() {
    on_every_machine(|driver| {
        let rows = 2300;
        let uniform = tokens(1, rows, 1000);
        let half = |row: usize| if row.is_multiple_of(2) { 8 } else { uniform[row] };
        let texts: [(usize, Vec<i32>); 5] = [
            (17, vec![13; rows]),
            (1000, (0..rows).map(half).collect()),
            // All of one block's ids: each its own row.
            (8 * rows, (0..rows).map(|row| 8 * (rows - 1 - row) as i32).collect()),
            (16, (0..rows).map(|row| (row / 350) as i32).collect()),
            (3, uniform.iter().map(|id| id % 3).collect()),
        ];
        let mut all = vec![];
        for (dtype, columns) in [(Dtype::Bf16, 8), (Dtype::F32, 4)] {
            for (vocab, ids) in &texts {
                all.extend(check_backward(driver, dtype, columns, *vocab, ids));
            }
        }
        all
    });
}

/// Tokens outside the table, such as IGNORE_INDEX, change nothing, and two calls add up.
#[test]
fn tokens_outside_the_table_have_no_gradient() {
    on_each_machine(|driver| {
        let ids = [3, -100, 2, 5, -1, i32::MAX, i32::MIN, 3, 0];
        check_backward(driver, Dtype::Bf16, 16, 5, &ids);
        check_backward(driver, Dtype::F32, 16, 5, &[-100; 6]);

        let embedding = Embedding::new(driver, Dtype::F32, 4).unwrap();
        let d_table = upload(driver, "d_table", Dtype::F32, &[0.0; 8]);
        let args = EmbeddingBackward {
            tokens: driver.upload("tokens", &[1i32, 1, 0]).unwrap().address,
            d_out: upload(driver, "d_out", Dtype::F32, &[1.0; 12]).address,
            d_table: d_table.address,
        };
        for _ in 0..2 {
            embedding.backward(driver, StreamId::MAIN, 3, 2, &args).unwrap();
        }
        let found = download(driver, Dtype::F32, d_table);
        assert_eq!(found, [2.0, 2.0, 2.0, 2.0, 4.0, 4.0, 4.0, 4.0]);
    });
}

/// On the CPU machine only: on a GPU a trap ends the whole context.
#[test]
fn looking_up_a_token_outside_the_table_is_a_fault() {
    if let Err(error) = host::present() {
        println!("skipped: no simt: {error}");
        return;
    }
    for outside in [-1, -100, 5, i32::MAX] {
        let driver: &mut dyn Driver = &mut Host::new(Options::default()).unwrap();
        let embedding = Embedding::new(driver, Dtype::F32, 4).unwrap();
        let args = EmbeddingForward {
            tokens: driver.upload("tokens", &[0i32, outside]).unwrap().address,
            table: unwritten(driver, "table", Dtype::F32, 5 * 4).address,
            out: unwritten(driver, "out", Dtype::F32, 2 * 4).address,
        };
        let error = embedding.forward(driver, StreamId::MAIN, 2, 5, &args).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("trap") && error.contains("embedding.cu"), "{outside}: {error}");
    }
}

#[test]
fn what_cannot_be_embedded_is_refused() {
    on_each_machine(|driver| {
        for (dtype, columns, why) in [
            (Dtype::Bf16, 12, "model.hidden as a multiple of 8"),
            (Dtype::F32, 6, "model.hidden as a multiple of 4"),
            (Dtype::F32, 0, "model.hidden as a multiple of 4"),
            (Dtype::Bf16, 65536 * 32 * 8, "model.hidden up to 16776960"),
        ] {
            let error = Embedding::new(driver, dtype, columns).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let embedding = Embedding::new(driver, Dtype::F32, 8).unwrap();
        let all = driver.allocate("all", 4096).unwrap().address;
        let main = StreamId::MAIN;
        let forward = |table: DevicePointer| EmbeddingForward { tokens: all, table, out: all };
        let backward =
            |tokens: DevicePointer| EmbeddingBackward { tokens, d_out: all, d_table: all };
        let many = i32::MAX as usize;
        for (refused, why) in [
            (embedding.forward(driver, main, 1, 1, &forward(all.offset(4))), "let table begin"),
            (embedding.forward(driver, main, many, 1, &forward(all)), "train.micro_batch"),
            (embedding.forward(driver, main, 1, many + 1, &forward(all)), "model.vocab"),
            (embedding.backward(driver, main, 1, 1, &backward(all.offset(4))), "let tokens begin"),
            (embedding.backward(driver, main, many, 1, &backward(all)), "train.micro_batch"),
            (embedding.backward(driver, main, 1, many + 1, &backward(all)), "model.vocab"),
        ] {
            let error = refused.unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        // Nothing to do, and nothing that a driver could refuse.
        let null = DevicePointer::NULL;
        embedding.forward(driver, main, 0, 5, &forward(null)).unwrap();
        embedding.backward(driver, main, 0, 5, &backward(null)).unwrap();
    });
}
