//! Bugs as people make them, each with what the machine has to say about it.

use std::fmt::Write as _;

use super::super::library;
use super::kernels::{ALL, Kernels, patched};
use super::{Mutant, Source, Verdict, judge_all};

/// A bug as people make it, and words of what must be said; "wrong": other bits, no fault.
struct Planted {
    kernels: Kernels,
    what: &'static str,
    edits: &'static [(&'static str, &'static str)],
    said: &'static [&'static str],
}

const fn planted(
    kernels: Kernels,
    what: &'static str,
    edits: &'static [(&'static str, &'static str)],
    said: &'static [&'static str],
) -> Planted {
    Planted { kernels, what, edits, said }
}

const WRONG: &[&str] = &[];

const PLANTED: &[Planted] = &[
    planted(
        Kernels::GemmSm90,
        "a wrong step of K inside the swizzle atom",
        &[(
            "(ROWS == ACROSS_K ? SPAN : sizeof(bf16)) / 16",
            "(ROWS == ALONG_K ? sizeof(bf16) : SPAN) / 32",
        )],
        WRONG,
    ),
    planted(
        Kernels::GemmSm90,
        "no barrier between the initialisation of the mbarriers and their use",
        &[(
            "    fence_mbarrier_init();\n  }\n  __syncthreads();",
            "    fence_mbarrier_init();\n  }",
        )],
        &["data race on shared memory", "after a write by block (0,0,0) thread 0 "],
    ),
    planted(
        Kernels::GemmSm90,
        "a wrong parity at the producer's wait",
        &[(
            "mbarrier_wait(&empty[at.stage], at.parity ^ 1)",
            "mbarrier_wait(&empty[at.stage], at.parity)",
        )],
        &["deadlock", "for mbarrier at shared 0x", "(4 of 4 arrivals and 0 bytes are missing"],
    ),
    planted(
        Kernels::GemmSm90,
        "a parity that never blocks in the first rounds: the producer overruns the consumers",
        &[(
            "mbarrier_wait(&empty[at.stage], at.parity ^ 1);",
            "if (step >= K::STAGES) mbarrier_wait(&empty[at.stage], at.parity);",
        )],
        &["mbarrier"],
    ),
    planted(
        Kernels::GemmSm90,
        "too few expected bytes",
        &[(
            "mbarrier_arrive_expect_tx(arrived, K::STAGE_BYTES)",
            "mbarrier_arrive_expect_tx(arrived, K::A_BYTES)",
        )],
        &["data race on shared memory", "by a copy that completes on the mbarrier at shared 0x"],
    ),
    planted(
        Kernels::GemmSm90,
        "a stage is handed back before the wgmma that reads it has finished",
        &[("wgmma_wait<1>();", "wgmma_wait<2>();")],
        &["data race on shared memory", "the wgmma of block (0,0,0) thread", "asynchronous read"],
    ),
    planted(
        Kernels::GemmSm90,
        "one thread releases a stage for four warps",
        &[
            (
                "    if (lane == 0) mbarrier_arrive(empty);",
                "    if (threadIdx.x % 128 == 0) mbarrier_arrive(empty);",
            ),
            ("(SHARED_TILES ? CONSUMERS : 1) * WARPGROUP / 32", "(SHARED_TILES ? CONSUMERS : 1)"),
        ],
        &["data race on shared memory", "the wgmma of block (0,0,0) thread", "asynchronous read"],
    ),
    planted(
        Kernels::GemmSm90,
        "the store tile is written without its swizzle",
        &[("swizzle<BOX_SPAN>(offset)", "offset")],
        WRONG,
    ),
    planted(
        Kernels::GemmSm90,
        "ordinary writes are not fenced before the TMA store reads them",
        &[(
            "  fence_proxy_async();\n  barrier_sync(out.barrier, WARPGROUP);",
            "  barrier_sync(out.barrier, WARPGROUP);",
        )],
        &[
            "no fence.proxy.async between an ordinary write and an asynchronous access",
            "bulk store",
        ],
    ),
    planted(
        Kernels::GemmSm90,
        "no barrier between the writes of the tile and its TMA store",
        &[(
            "fence_proxy_async();\n  barrier_sync(out.barrier, WARPGROUP);",
            "fence_proxy_async();",
        )],
        &["data race on shared memory", "bulk store of block (0,0,0) thread"],
    ),
    planted(
        Kernels::GemmSm90,
        "accumulators are used before the last group is complete",
        &[("  wgmma_wait<0>();\n  release(&empty[previous_stage], cluster);\n", "")],
        &["accumulator of the wgmma at", "is read at", "before wgmma_wait"],
    ),
    planted(
        Kernels::GemmSm90,
        "a store tile is written while the store before the last one still reads it",
        &[("if (storing) bulk_wait_read<STORES - 1>();", "")],
        &["data race on shared memory", "bulk store of block (0,0,0) thread"],
    ),
    planted(
        Kernels::GemmSm90,
        "the consumers share one barrier",
        &[("first * BUFFER_BYTES, 1 + consumer};", "first * BUFFER_BYTES, 1};")],
        &["data race on shared memory"],
    ),
    planted(
        Kernels::GemmSm90,
        "the last stores are not waited for",
        &[("    if (threadIdx.x % WARPGROUP == 0) bulk_wait<0>();\n", "")],
        &["exits although it never waited for the tma_store at"],
    ),
    planted(
        Kernels::GemmSm90,
        "the producers keep their registers",
        &[("    setmaxnreg_dec<PRODUCER_REGISTERS>();\n", "")],
        &["setmaxnreg: no registers are free"],
    ),
    planted(
        Kernels::GemmSm90,
        "a whole warp produces",
        &[("warp == 0 && elect_one()", "warp == 0")],
        &["mbarrier"],
    ),
    planted(
        Kernels::GemmSm90,
        "consumers that take tiles in turn do not wait for each other",
        &[("      mbarrier_wait(&order[consumer], (own + (consumer == 0 ? 1 : 0)) & 1);\n", "")],
        &["shared memory"],
    ),
    planted(
        Kernels::GemmSm90,
        "a producer waits for its own consumers, and not for those of its pair",
        &[("uint32_t(K::READERS * work->cluster)", "uint32_t(K::READERS)")],
        &["data race on shared memory", "of block (1,0,0)"],
    ),
    planted(
        Kernels::GemmSm90,
        "a split does not wait for its turn",
        &[("while (load_acquire(semaphore) != uint32_t(item.split)) __nanosleep(64);", ";")],
        &["data race on global memory"],
    ),
    planted(
        Kernels::GemmSm90,
        "the turn is passed on before all threads have added",
        &[(
            "                   barrier_sync(1 + consumer, WARPGROUP);\n                   const int \
             next",
            "                   const int next",
        )],
        &["data race on global memory"],
    ),
    planted(
        Kernels::GemmSm90,
        "the last split leaves its turn for the next launch",
        &[("uint32_t(next == item.splits ? 0 : next)", "uint32_t(next)")],
        &["the thread spins"],
    ),
    planted(
        Kernels::GemmSm90,
        "the addend is read before it is there",
        &[("    mbarrier_wait(&exchange.loaded[buffer], parity);\n", "")],
        &["shared memory 0x", "by block (0,0,0) thread"],
    ),
    planted(
        Kernels::GemmGradient,
        "gate and up are read before they are there",
        &[("    mbarrier_wait(&exchange.loaded[buffer], parity);\n", "")],
        &["shared memory 0x", "by block (0,0,0) thread"],
    ),
    planted(
        Kernels::GemmGradient,
        "gradients are stored that other lanes may not have written yet",
        &[("    fence_proxy_async();\n    __syncwarp();\n", "    fence_proxy_async();\n")],
        &["data race on shared memory", "an asynchronous read by a bulk store of"],
    ),
    planted(
        Kernels::GemmGradient,
        "what comes next is loaded over gradients that are still being stored",
        &[("  bulk_commit();\n  bulk_wait_read<0>();\n", "  bulk_commit();\n")],
        &["shared memory", "bulk store of block (0,0,0) thread"],
    ),
    planted(
        Kernels::GemmGradient,
        "one mover for both consumers",
        &[(
            "move<K>(epilogue, exchanges[consumer], *work, consumer)",
            "move<K>(epilogue, exchanges[consumer], *work, 0)",
        )],
        &["data race on global memory", "of buffer \"out\"", "by a bulk store of block (0,0,0)"],
    ),
    planted(
        Kernels::Norm,
        "no barrier before the sums of the warps are read",
        &[(
            "    __syncthreads();\n#pragma unroll\n    for (int i = 0; i < COUNT; ++i) {\n      \
             sums[i] = 0;",
            "#pragma unroll\n    for (int i = 0; i < COUNT; ++i) {\n      sums[i] = 0;",
        )],
        &["shared memory 0x", "by block (0,0,0) thread"],
    ),
    planted(
        Kernels::Norm,
        "one half for all sums: the next one is written while the last one is read",
        &[("    turn ^= 1;\n", "")],
        &["data race on shared memory", "write by block (0,0,0) thread", "after a read by"],
    ),
    planted(
        Kernels::Norm,
        "no barrier after the gains",
        &[("gain, four * 4, sqrt_depth);\n  __syncthreads();", "gain, four * 4, sqrt_depth);")],
        &["shared memory 0x", "by block (0,0,0) thread"],
    ),
    planted(
        Kernels::Norm,
        "no barrier between the rows that add up",
        &[("    if (row_slot < ROWS - 1) __syncthreads();\n", "")],
        &["shared memory 0x", "by block (0,0,0) thread"],
    ),
    planted(
        Kernels::Norm,
        "the tail of a row is not left out",
        &[(
            "held[i] = at < vectors ? row_of(inp, row, columns)[at] : make_uint4(0, 0, 0, 0);",
            "held[i] = row_of(inp, row, columns)[at];",
        )],
        &["read out of bounds", "buffer \"inp\" (34720 bytes)"],
    ),
    planted(
        Kernels::Loss,
        "parts of Z are added up before those of the other blocks are there",
        &[("  cluster_sync();\n", "  __syncthreads();\n")],
        &["shared memory 0x", "by block ("],
    ),
    planted(
        Kernels::Loss,
        "a block writes into another one that may not have begun",
        &[("  cluster_arrive_relaxed();\n", ""), ("  cluster_wait();\n", "")],
        &["write out of bounds: 8 bytes at shared address", "by block ("],
    ),
    planted(
        Kernels::Loss,
        "every block sends to itself",
        &[("cluster_map(partitions, uint32_t(lane))", "cluster_map(partitions, cluster_rank())")],
        &["data race on shared memory", "after a write by block (0,0,0) thread 0 "],
    ),
    planted(
        Kernels::Loss,
        "the parts of all blocks have one place",
        &[("[int(cluster_rank()) * WARPS + warp]", "[warp]")],
        &["data race on shared memory", "by block ("],
    ),
    planted(
        Kernels::Loss,
        "the first thread reads the target's logit while another block writes over it",
        &[(
            "vector % cluster_threads<THREADS>() == cluster_thread<THREADS>()",
            "cluster_thread<THREADS>() == (vector & 0)",
        )],
        &["data race on global memory", "of buffer \"logits\""],
    ),
    planted(
        Kernels::Loss,
        "each block takes the vectors of the first",
        &[("return int(cluster_rank()) * THREADS + int(threadIdx.x);", "return int(threadIdx.x);")],
        &["data race on global memory"],
    ),
    planted(
        Kernels::AttentionForward,
        "a query does not see its own key",
        &[("> mask.row + i / 2 % 2 * 8)", ">= mask.row + i / 2 % 2 * 8)")],
        WRONG,
    ),
    planted(
        Kernels::AttentionForward,
        "weighted values are multiplied by the sums' scale before they are there",
        &[("      wgmma_wait<0>();\n      release(&values_empty", "      release(&values_empty")],
        &["the accumulator of the wgmma at", "before wgmma_wait"],
    ),
    planted(
        Kernels::AttentionForward,
        "rows are stored that other lanes may not have written yet",
        &[("  fence_proxy_async();\n  __syncwarp();\n", "  fence_proxy_async();\n")],
        &["data race on shared memory", "an asynchronous read by a bulk store of"],
    ),
    planted(
        Kernels::AttentionBackward,
        "a stage is handed back by the first lane, while others read its statistics",
        &[(
            "DEVICE void release(uint64_t* empty) {\n  __syncwarp();\n",
            "DEVICE void release(uint64_t* empty) {\n",
        )],
        &["data race on shared memory", "after a read by block"],
    ),
    planted(
        Kernels::AttentionBackward,
        "a stage is full without its statistics",
        &[("init_ring<T, STAGES>(full, empty, 1 + 32);", "init_ring<T, STAGES>(full, empty, 1);")],
        &["data race on shared memory", "after a write by block (0,0,0) thread 36 (warp 1"],
    ),
    planted(
        Kernels::GemmSm90,
        "factors are loaded before the previous kernel has ended",
        &[(
            "  begin_after_previous();\n\n  if (threadIdx.x < WARPGROUP) {",
            "  if (threadIdx.x > 0) begin_after_previous();\n\n  if (threadIdx.x < WARPGROUP) {",
        )],
        &[
            "global memory is touched before grid_dependency_wait in a dependent launch: tma_load by",
            "block (0,0,0) thread 0 (warp 0, lane 0) at",
        ],
    ),
    planted(
        Kernels::AttentionOnePass,
        "threads without work do not wait for the previous kernel",
        &[(
            "  begin_after_previous();\n\n  const S shared",
            "  if (threadIdx.x != 69) begin_after_previous();\n\n  const S shared",
        )],
        &["block (0,0,0) thread 69 (warp 2, lane 5) exits without grid_dependency_wait"],
    ),
    planted(
        Kernels::GemmMma,
        "a stage is read before its copies are complete",
        &[("cp_async_wait<1>();", "cp_async_wait<2>();")],
        &["cp.async that was not waited for: shared memory 0x", "write by block (0,0,0) thread"],
    ),
    planted(
        Kernels::GemmMma,
        "a stage is loaded while it is read",
        &[("    __syncthreads();\n  }\n#pragma", "  }\n#pragma")],
        &["data race on shared memory", "after a read by block"],
    ),
];

#[test]
fn planted_bugs_are_found_and_named() {
    if library::is_missing() {
        return;
    }
    let used = |kernels: &Kernels| PLANTED.iter().any(|bug| bug.kernels == *kernels);
    let unchanged = ALL.into_iter().filter(used).map(|it| Source::new(it, it.text()));
    let mut sources: Vec<Source> = unchanged.collect();
    let true_sources: Vec<usize> = (0..sources.len()).collect();
    let mut mutants = vec![];
    for bug in PLANTED {
        let name = format!("{}: {}", bug.kernels.name(), bug.what);
        mutants.push(Mutant { source: sources.len(), choice: 0, name });
        sources.push(Source::new(bug.kernels, patched(&bug.kernels.text(), bug.edits)));
    }
    let mut missed = String::new();
    for (bug, verdict) in PLANTED.iter().zip(judge_all(&sources, &true_sources, &mutants)) {
        let named = match &verdict {
            Verdict::Fault(said) => {
                !bug.said.is_empty() && bug.said.iter().all(|part| said.contains(part))
            }
            Verdict::Wrong(_) => bug.said.is_empty(),
            _ => false,
        };
        if !named {
            let _ = writeln!(missed, "{:?}: {}: {verdict:?}", bug.kernels, bug.what);
        }
    }
    assert!(missed.is_empty(), "{missed}");
}
