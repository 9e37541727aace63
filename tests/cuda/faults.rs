//! What the CPU machine finds wrong in a kernel, and that it finds nothing in a right one.
//!
//! tests/kernels/faults.cu holds one small kernel for each rule. Each wrong one is launched alone,
//! and the error must say what happened, to whom, and on which lines, which are looked up by their
//! comments `here` and `there`. The same driver runs all of them, so that each fault is also a test
//! that the one before it left nothing behind.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use isobath::cuda::host::{Asynchronous, Host, Options, Order};
use isobath::cuda::{
    Allocation, Arguments, DevicePointer, Driver, Launch, StreamId, Swizzle, TensorMap,
    TensorMapSpec, TensorType,
};

use super::library;

const KERNELS: &str = include_str!("../kernels/faults.cu");
const FILE: &str = "faults.cu";

/// [`KERNELS`], compiled.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = LIBRARY.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = library::compile(folder.path(), "faults", &[("faults", KERNELS)]);
        (folder, path)
    });
    path
}

/// The machine with [`KERNELS`]; `None` where this build has none.
fn machine(options: Options) -> Option<Host> {
    if library::is_missing() {
        return None;
    }
    Some(Host::load(library(), options).unwrap())
}

fn race() -> Options {
    Options { race: true, workers: 1, ..Options::default() }
}

fn plain() -> Options {
    Options { race: false, ..race() }
}

// ------------------------------------------------------------------ one launch

/// A launch of one of the kernels: one block of one warp with zeros in 4 KiB of global memory,
/// unless it says otherwise.
#[derive(Clone, Copy)]
struct Case {
    kernel: &'static str,
    blocks: u32,
    threads: u32,
    cluster: u32,
    shared: u32,
    cooperative: bool,
    dependent: bool,
    global_bytes: usize,
    null: bool,
    n: i32,
}

fn case(kernel: &'static str) -> Case {
    Case {
        kernel,
        blocks: 1,
        threads: 32,
        cluster: 1,
        shared: 0,
        cooperative: false,
        dependent: false,
        global_bytes: 4096,
        null: false,
        n: 0,
    }
}

impl Case {
    fn threads(self, threads: u32) -> Self {
        Case { threads, ..self }
    }

    fn blocks(self, blocks: u32) -> Self {
        Case { blocks, ..self }
    }

    fn cluster(self, cluster: u32) -> Self {
        Case { cluster, blocks: self.blocks.max(cluster), ..self }
    }

    fn shared(self, shared: u32) -> Self {
        Case { shared, ..self }
    }

    fn cooperative(self, blocks: u32) -> Self {
        Case { cooperative: true, blocks, ..self }
    }

    fn dependent(self) -> Self {
        Case { dependent: true, ..self }
    }

    fn global_bytes(self, global_bytes: usize) -> Self {
        Case { global_bytes, ..self }
    }

    fn n(self, n: i32) -> Self {
        Case { n, ..self }
    }

    /// The lines of the kernel's text, as indices.
    fn lines(&self) -> Range<usize> {
        let begins = |line: &str| line == format!("TEST_KERNEL({}) {{", self.kernel);
        let ends = |line: &str| line == format!("EXPORT_KERNEL({})", self.kernel);
        let find = |wanted: &dyn Fn(&str) -> bool| KERNELS.lines().position(wanted).unwrap();
        find(&begins)..find(&ends)
    }

    /// "faults.cu:71", the line of the kernel with this comment.
    fn place(&self, comment: &str) -> String {
        let ending = format!("// {comment}");
        let marked = |at: &usize| KERNELS.lines().nth(*at).unwrap().ends_with(&ending);
        let mut found = self.lines().filter(marked);
        let at = found.next().unwrap_or_else(|| panic!("{}: no `{ending}`", self.kernel));
        assert_eq!(found.next(), None, "{}: two `{ending}`", self.kernel);
        format!("{FILE}:{}", at + 1)
    }

    /// The buffer as the kernel left it, or the error.
    fn run(&self, host: &mut Host) -> Result<Vec<u32>, String> {
        let driver: &mut dyn Driver = host;
        let (matrix, map) = matrix(driver);
        let global = driver.upload("global", &vec![0u8; self.global_bytes]).unwrap();
        let kernel = driver.kernel(self.kernel).unwrap();
        let mut launch = Launch::new(kernel, [self.blocks, 1, 1], [self.threads, 1, 1])
            .cluster([self.cluster, 1, 1])
            .shared_bytes(self.shared);
        if self.cooperative {
            launch = launch.cooperative();
        }
        if self.dependent {
            launch = launch.dependent();
        }
        let address = if self.null { DevicePointer::NULL } else { global.address };
        let arguments = Arguments::new().with(map).with(address).with(self.n);
        let launched = driver.launch(&launch, &arguments);
        let mut words = driver.download(global.address, self.global_bytes / 4).unwrap();
        if ["right_reduction", "right_clipped_store"].contains(&self.kernel) {
            words.extend(driver.download::<u32>(matrix.address, 64 * 32).unwrap());
        }
        driver.release(global).unwrap();
        driver.release(matrix).unwrap();
        // Without the folder's name.
        let folder = format!("{}/", library().parent().unwrap().display());
        launched.map(|()| words).map_err(|error| error.to_string().replace(&folder, ""))
    }

    /// Panics unless the launch fails and the error names the kernel and has all of `parts`, in
    /// which {here} and {there} are places, and {thread N} is that thread of the first block.
    #[track_caller]
    fn fails(&self, host: &mut Host, parts: &[&str]) {
        let error = match self.run(host) {
            Ok(_) => panic!("{}: nothing was found", self.kernel),
            Err(error) => error,
        };
        println!("{error}\n");
        let named = format!("kernel {} on simt: ", self.kernel);
        assert!(error.starts_with(&named), "`{named}` is missing: {error}");
        for part in parts {
            let mut part = part.to_string();
            for comment in ["here", "there"] {
                let mark = format!("{{{comment}}}");
                if part.contains(&mark) {
                    part = part.replace(&mark, &self.place(comment));
                }
            }
            while let Some((before, rest)) = part.split_once("{thread ") {
                let (id, behind) = rest.split_once('}').unwrap();
                let id: u32 = id.parse().unwrap();
                part = format!("{before}block (0,0,0) thread {id} {}{behind}", warp_and_lane(id));
            }
            assert!(error.contains(&part), "{}: `{part}` is missing:\n{error}", self.kernel);
        }
        assert!(!error.contains(['\x01', '\x02']), "an address was left: {error}");
    }
}

fn warp_and_lane(thread: u32) -> String {
    format!("(warp {}, lane {})", thread / 32, thread % 32)
}

/// A float matrix [64,32], zero, and its map with boxes of 8 rows.
fn matrix(driver: &mut dyn Driver) -> (Allocation, TensorMap) {
    let matrix = driver.upload("matrix", &[0f32; 64 * 32]).unwrap();
    let dimensions = [32, 64];
    let spec = TensorMapSpec::matrix(
        TensorType::F32,
        matrix.address,
        &dimensions,
        &[128],
        &[32, 8],
        Swizzle::None,
    );
    let map = driver.tensor_map(&spec).unwrap();
    (matrix, map)
}

// ------------------------------------------------------------------ races

#[test]
fn races_are_named_with_both_lines() {
    let Some(mut host) = machine(race()) else { return };
    let host = &mut host;
    case("shared_race").threads(64).fails(
        host,
        &[
            "data race on shared memory 0x",
            "of block (0,0,0)",
            // The thread that came to the barrier last goes on first.
            "write by {thread 31} at {here}",
            "after a read by {thread 63} at {there}",
            "with nothing that orders the two",
        ],
    );
    let both = ["write by {thread 1} at {here}", "after a read by {thread 0} at {there}"];
    case("lockstep").fails(host, &both);
    let both = ["read by {thread 30} at {here}", "after a write by {thread 31} at {there}"];
    case("shuffle_is_no_barrier").fails(host, &["data race on shared memory", both[0], both[1]]);
    case("global_race").fails(
        host,
        &[
            "data race on global memory at byte 0 of buffer \"global\" (4096 bytes)",
            "write by {thread 1} at {here}",
            "after a write by {thread 0} at {here}",
        ],
    );
    case("flag_before_value").cooperative(2).threads(1).fails(
        host,
        &["data race on global memory at byte 4 of", "at {here}", "at {there}", "block (1,0,0)"],
    );
    case("atomic_without_fence").cooperative(2).threads(1).fails(
        host,
        &[
            "data race on global memory at byte 4 of",
            "read by block (1,0,0) thread 0 (warp 0, lane 0) at {here}",
            "after a write by {thread 0} at {there}",
        ],
    );
    case("atomic_and_plain").fails(
        host,
        &["write by {thread 1} at {here}", "after an atomic access by {thread 0} at {there}"],
    );
    case("sums_in_no_order").fails(
        host,
        &["data race on global memory", "by {thread 1} at {here}", "by {thread 0} at {here}"],
    );
}

#[test]
fn blocks_race_whoever_runs_them() {
    let Some(mut host) = machine(race()) else { return };
    for workers in [1, 2, 0] {
        host.set_options(Options { workers, ..race() });
        case("blocks_race").blocks(2).threads(64).fails(
            &mut host,
            &[
                "data race on global memory at byte 0 of buffer \"global\"",
                "block (0,0,0) thread 0 (warp 0, lane 0) at {here}",
                "block (1,0,0) thread 0 (warp 0, lane 0) at {here}",
            ],
        );
        // Of one cluster, or of two.
        case("blocks_race").blocks(8).cluster(2).fails(
            &mut host,
            &["data race on global memory", "write by block (", "after a write by block ("],
        );
    }
}

#[test]
fn uninitialised_shared_memory_is_not_read() {
    let Some(mut host) = machine(race()) else { return };
    let parts = ["read of uninitialised shared memory 0x", "read by {thread 31} at {here}"];
    case("shared_uninitialised").fails(&mut host, &parts);
    let parts = ["read of uninitialised shared memory 0x400 of block", "{thread 0} at {here}"];
    case("dynamic_uninitialised").shared(64).fails(&mut host, &parts);
}

// ------------------------------------------------------------------ dependent launches

#[test]
fn nothing_is_touched_before_the_previous_kernel_has_ended() {
    let Some(mut host) = machine(race()) else { return };
    let early = "global memory is touched before grid_dependency_wait in a dependent launch: ";
    let word = |what: &str| {
        format!("{early}{what} of 4 bytes by {{thread 0}} at {{here}}: global memory at byte 0 of")
    };
    let cases = [
        ("dependent_read", word("a read")),
        ("dependent_write", format!("{early}a write of 4 bytes by {{thread 3}} at {{here}}")),
        ("dependent_on_another_thread", format!("{early}a write of 4 bytes by {{thread 31}}")),
    ];
    for (kernel, said) in &cases {
        case(kernel).dependent().fails(&mut host, &[said, "the previous kernel may still run"]);
    }
    // What goes through a wrapper is seen without the detector, too.
    let cases = [
        ("dependent_atomic", format!("{early}atomicAdd by {{thread 0}} at {{here}}")),
        ("dependent_reduction", format!("{early}reduce_add_f32x2 by {{thread 0}} at {{here}}")),
        ("dependent_flag", format!("{early}load_acquire by {{thread 0}} at {{here}}")),
        ("dependent_cp_async", format!("{early}cp.async by {{thread 0}} at {{here}}")),
        ("dependent_tma", format!("{early}tma_load by {{thread 0}} at {{here}};")),
        ("dependent_bulk", format!("{early}bulk_load by {{thread 0}} at {{here}}")),
        (
            "dependent_exit",
            "{thread 5} exits without grid_dependency_wait in a dependent launch".to_string(),
        ),
    ];
    for options in [race(), plain()] {
        host.set_options(options);
        for (kernel, said) in &cases {
            case(kernel).shared(1024).dependent().fails(&mut host, &[said]);
        }
    }
    // Where launches are ordinary ones there is nothing to wait for; unless all are to be checked.
    for options in [race(), plain()] {
        host.set_options(options);
        for kernel in ["dependent_read", "dependent_exit", "dependent_tma"] {
            case(kernel).shared(1024).run(&mut host).expect("no fault");
        }
        host.set_options(Options { dependent: true, ..options });
        case("dependent_exit").fails(&mut host, &["exits without grid_dependency_wait"]);
        let words = case("right_dependent").shared(1024).run(&mut host).expect("no fault");
        assert_eq!((words[0], words[5], words[31]), (31, 26, 1));
    }
}

// ------------------------------------------------------------------ addresses

#[test]
fn global_memory_has_exact_bounds() {
    let Some(mut host) = machine(race()) else { return };
    let host = &mut host;
    for (bytes, n, place) in [
        (4000, 4000, "byte 4000 of buffer \"global\" (4000 bytes)"),
        (4096, 4096, "byte 4096 of buffer \"global\" (4096 bytes)"),
        (4000, -1, "1 bytes before buffer \"global\""),
        (1001, 1001, "byte 1001 of buffer \"global\" (1001 bytes)"),
        (1001, 1007, "byte 1007 of buffer \"global\" (1001 bytes)"),
        (1001, 1 << 30, "not in any device buffer"),
    ] {
        let at = case("global_write").threads(1).global_bytes(bytes).n(n);
        at.fails(host, &["write out of bounds: 1 bytes by {thread 0} at {here}", place]);
        let at = case("global_read").threads(1).global_bytes(bytes).n(n);
        at.fails(host, &["read out of bounds: 1 bytes by {thread 0} at {here}", place]);
    }
    // Without the detector, the page after the buffer is what stops it.
    host.set_options(plain());
    for n in [4096, 1 << 30] {
        let at = case("global_write").threads(1).n(n);
        at.fails(host, &["{thread 0} makes an access out of bounds at {here}"]);
    }
}

#[test]
fn addresses_are_aligned() {
    let Some(mut host) = machine(race()) else { return };
    let host = &mut host;
    let one = |kernel| case(kernel).threads(1).shared(64);
    one("global_misaligned").n(2).fails(
        host,
        &["misaligned access by {thread 0} at {here}", "4 bytes", "byte 2 of buffer \"global\""],
    );
    one("shared_misaligned").n(1).fails(
        host,
        &["misaligned access by {thread 0} at {here}", "of 4 bytes", "shared address 0x401"],
    );
    let vectors =
        ["global_misaligned_vector", "global_misaligned_vector_write", "shared_misaligned_vector"];
    for kernel in vectors {
        let n = if kernel.starts_with("shared") { 8 } else { 1 }; // bytes, or words
        one(kernel).n(n).fails(host, &["misaligned access by {thread 0} at {here}", "of 16 bytes"]);
    }
    for options in [race(), plain()] {
        host.set_options(options);
        let parts = ["reduce_add_f32x2 at {here}", "is not a multiple of 8", "{thread 0}"];
        one("reduction_misaligned").n(1).fails(host, &parts);
        let parts = ["reduce_add_f32x2 at {here}", "is of shared memory"];
        one("reduction_of_shared_memory").fails(host, &parts);
        let parts = ["reduce_add_f32x2 at {here}", "out of bounds", "byte 4096 of"];
        one("reduction_misaligned").n(1024).fails(host, &parts);
    }
    // Without the detector, the processor finds what the compiler has left in one piece.
    host.set_options(plain());
    one("global_misaligned_vector_write")
        .n(1)
        .fails(host, &["{thread 0} makes a misaligned vector access", "at {here}"]);
}

#[test]
fn null_pointers_are_named() {
    let Some(mut host) = machine(race()) else { return };
    let host = &mut host;
    let null = Case { null: true, ..case("null_argument").threads(1) };
    null.fails(host, &["write of 4 bytes by {thread 0} at {here}", "(a null pointer)"]);
    for options in [race(), plain()] {
        host.set_options(options);
        case("null_constant").threads(1).fails(host, &["{thread 0}", "at {here}", "null pointer"]);
    }
    null.fails(host, &["{thread 0}", "at {here}", "null pointer"]);
}

#[test]
fn shared_memory_is_what_the_launch_gave() {
    let Some(mut host) = machine(race()) else { return };
    let host = &mut host;
    for n in [256, 300, -1, 70_000] {
        let place = format!("at shared address {:#x}", 1024 + n);
        let at = case("shared_bounds").threads(1).shared(256).n(n);
        at.fails(
            host,
            &[
                "write out of bounds: 1 bytes",
                &place,
                "by {thread 0} at {here}",
                "256 bytes of dynamic shared memory, from 0x400 on",
            ],
        );
    }
    let at = case("static_shared_bounds").threads(1).n(64);
    at.fails(host, &["write out of bounds: 1 bytes", "by {thread 0} at {here}"]);
    case("too_much_shared").threads(1).shared(100_000).fails(
        host,
        &["100000 bytes of dynamic", "200000 bytes of static", "232448", "{thread 0}"],
    );
    host.set_options(plain());
    let at = case("shared_bounds").threads(1).shared(256).n(256);
    at.fails(host, &["block (0,0,0) wrote past its 256 bytes of dynamic shared memory"]);
    let at = case("static_shared_bounds").threads(1).n(64);
    at.fails(host, &["block (0,0,0) wrote past its static shared memory"]);
}

// ------------------------------------------------------------------ collectives

#[test]
fn warps_and_blocks_stay_together() {
    let Some(mut host) = machine(race()) else { return };
    let host = &mut host;
    for options in [race(), plain()] {
        host.set_options(options);
        case("divergent_calls").fails(
            host,
            &[
                "shuffle at {here}: the warp has diverged",
                "lanes 0000ffff wait in __syncwarp (mask ffffffff) at {there}",
                "by {thread 16}",
            ],
        );
        case("not_in_mask").fails(
            host,
            &["__syncwarp at {here}", "the calling lane is not in the mask 0000ffff", "thread 16"],
        );
        case("lane_is_missing").threads(64).fails(
            host,
            &[
                "deadlock: no thread can go on",
                "block (0,0,0): threads 0-6,8-31 wait at {here} for warp collective",
                "thread 7 waits at {there} for barrier 1, which the lanes ffffff7f of its warp",
            ],
        );
        case("skipped_barrier").threads(64).fails(
            host,
            &[
                "threads 0-4,6-63 wait at {here} for barrier 0, where 63 of 64 threads arrived",
                "thread 5 waits at {there} for warp collective",
            ],
        );
        case("barrier_counts").threads(96).fails(
            host,
            &[
                "barrier_sync at {here}",
                "barrier 1 is used with 96 threads while 32 threads wait at it with 64",
                "by {thread 32}",
            ],
        );
        case("barrier_id").fails(host, &["barrier_sync at {here}: there is no barrier 16"]);
        case("barrier_of_part_of_a_warp")
            .threads(64)
            .fails(host, &["barrier_sync at {here}: 40 threads: a multiple of 32"]);
        case("barrier_half_full").threads(96).fails(
            host,
            &["block (0,0,0) ends with 32 of 64 threads arrived at barrier 1", "at {here}"],
        );
    }
}

#[test]
fn a_warp_comes_to_a_barrier_as_one() {
    let Some(mut host) = machine(race()) else { return };
    let host = &mut host;
    for options in [race(), plain()] {
        host.set_options(options);
        let diverged = "the warp has diverged: its lanes 00000007 are at the";
        case("divergent_barrier").threads(64).fails(
            host,
            &["barrier_sync at {there}", diverged, "barrier_sync at {here}", "{thread 3}"],
        );
        let parts = ["barrier_arrive at {there}", diverged, "barrier_arrive at {here}"];
        case("divergent_arrival").threads(64).fails(host, &parts);
        let parts = ["__syncthreads at {there}", diverged, "__syncthreads at {here}"];
        case("divergent_syncthreads").threads(64).fails(host, &parts);
        let parts = ["cluster_arrive at {there}", diverged, "cluster_arrive at {here}"];
        case("divergent_cluster_arrival").cluster(2).fails(host, &parts);
        let parts = ["cluster_wait at {there}", "its lanes 0", "cluster_wait at {here}"];
        case("divergent_cluster_wait").cluster(2).fails(host, &parts);
    }
}

#[test]
fn what_needs_a_thread_that_exited_is_a_fault() {
    let Some(mut host) = machine(race()) else { return };
    let host = &mut host;
    for (order, race_mode) in [(Order::Fifo, true), (Order::Lifo, false), (Order::Random, true)] {
        host.set_options(Options { order, race: race_mode, ..race() });
        case("barrier_of_a_warp_that_exited").threads(64).fails(
            host,
            &[
                "threads 32-63 wait at {here} for barrier 1, where 32 of 64 threads arrived",
                "32 threads have exited",
            ],
        );
        case("shuffle_from_an_exited_lane")
            .fails(host, &["shuffle at {here}: lane 24, whose value it takes, has exited"]);
        let parts = ["mma at {here}: it needs all 32 lanes"];
        case("mma_without_a_lane").fails(host, &parts);
    }
}

// ------------------------------------------------------------------ mbarriers

#[test]
fn mbarriers_are_kept_in_balance() {
    let Some(mut host) = machine(race()) else { return };
    let host = &mut host;
    for options in [race(), plain()] {
        host.set_options(options);
        case("arrival_is_missing").fails(
            host,
            &[
                "deadlock: no thread can go on",
                "threads 0-31 wait at {here} for mbarrier at shared 0x",
                "to complete its phase of parity 0 (1 of 2 arrivals and 0 bytes are missing",
            ],
        );
        let parts = ["mbarrier_arrive at {here}: more arrivals than the count 1", "{thread 0}"];
        case("too_many_arrivals").fails(host, &parts);
        case("mbarrier_uninitialised")
            .fails(host, &["mbarrier_arrive at {here}", "holds no initialised mbarrier"]);
        case("mbarrier_overwritten").fails(
            host,
            match options.race {
                true => &["write of the mbarrier at shared 0x", "by {thread 0} at {there}"],
                false => &["mbarrier_arrive at {here}", "holds no initialised mbarrier"],
            },
        );
        for asynchronous in [Asynchronous::Late, Asynchronous::Early] {
            host.set_options(Options { asynchronous, ..options });
            let early = asynchronous == Asynchronous::Early;
            // A copy that has happened is missed by the race detector only.
            if !early || options.race {
                let what = if early { "completes on it" } else { "16 bytes of its phase" };
                case("mbarrier_invalidated_early")
                    .fails(host, &["mbarrier_invalidate at {here}", what, "{thread 0}"]);
            }
        }
        case("mbarrier_initialised_twice")
            .fails(host, &["mbarrier_init at {here}", "is in use: invalidate it first"]);
        case("mbarrier_count_zero")
            .fails(host, &["mbarrier_init at {here}", "a count of 0 is not possible"]);
        case("wrong_bytes").n(32).fails(
            host,
            &["wait at {here} for mbarrier", "(0 of 1 arrivals and 16 bytes are missing"],
        );
        case("wrong_bytes")
            .n(8)
            .fails(host, &["wait at {here} for mbarrier", "8 bytes more than expected have come"]);
        case("bytes_never_come").fails(
            host,
            &["block (0,0,0) ends while its mbarrier", "out of balance by 16 bytes", "{here}"],
        );
    }
    host.set_options(race());
    case("mbarrier_read").fails(host, &["read of the mbarrier at shared 0x", "at {here}"]);
    case("mbarrier_init_not_fenced")
        .fails(host, &["bulk_load at {here}", "no fence_mbarrier_init followed", "{thread 0}"]);
    case("mbarrier_init_not_ordered").threads(64).fails(
        host,
        &[
            "mbarrier_arrive at {here}",
            "data race",
            "was initialised by {thread 0} at {there}",
            "by {thread 32}",
        ],
    );
}

// ------------------------------------------------------------------ asynchronous work

#[test]
fn proxies_are_fenced() {
    let Some(mut host) = machine(race()) else { return };
    let host = &mut host;
    for asynchronous in [Asynchronous::Late, Asynchronous::Early] {
        host.set_options(Options { asynchronous, ..race() });
        let parts = [
            "no fence.proxy.async between an ordinary write and an asynchronous access",
            "at {here}",
            "write by block (0,0,0) thread",
            "at {there}",
        ];
        case("store_not_fenced").fails(host, &parts);
        case("store_after_the_wrong_fence").fails(host, &parts);
        case("store_fenced_too_early").fails(host, &parts);
        case("tensor_store_not_fenced").shared(1024).fails(host, &parts);
        case("wgmma_not_fenced").threads(128).shared(2304).fails(host, &parts);
        case("load_of_ordinary_writes").fails(host, &parts);
    }
}

#[test]
fn copies_are_waited_for() {
    let Some(mut host) = machine(race()) else { return };
    let host = &mut host;
    for asynchronous in [Asynchronous::Late, Asynchronous::Early, Asynchronous::Anytime] {
        host.set_options(Options { asynchronous, ..race() });
        let not_waited = ["cp.async that was not waited for", "{here}", "{there}"];
        case("cp_async_read_early").fails(host, &not_waited);
        case("cp_async_not_committed").fails(host, &not_waited);
        case("cp_async_of_another_thread").fails(host, &["shared memory", "{here}", "{there}"]);
        let parts = ["exits although it never waited for the cp.async at {here}", "{thread 0}"];
        case("cp_async_at_exit").fails(host, &parts);

        let both = ["data race on shared memory", "bulk store of {thread 0}", "{here}", "{there}"];
        case("store_source_overwritten").fails(host, &both);
        case("store_not_committed").fails(host, &both);
        case("clipped_source_overwritten").shared(1024).fails(host, &both);
        let both = ["data race on global memory", "{here}", "bulk store of {thread 0}", "{there}"];
        case("store_result_read_early").threads(64).fails(host, &both);
        case("load_read_early")
            .fails(host, &["data race on shared memory", "completes on the mbarrier", "{here}"]);

        let parts = ["exits although it never waited for the bulk_store at {here}", "{thread 0}"];
        case("store_at_exit").fails(host, &parts);
        case("load_at_exit").fails(host, &["block (0,0,0)", "bulk_load at {here}"]);
    }
    case("cp_async_misaligned").n(1).fails(host, &["cp.async at {here}", "multiples of 16"]);
    case("cp_async_out_of_bounds")
        .n(1024)
        .fails(host, &["cp.async at {here}", "byte 4096 of buffer \"global\"", "{thread 0}"]);
}

#[test]
fn bulk_copies_keep_their_rules() {
    let Some(mut host) = machine(plain()) else { return };
    let host = &mut host;
    for n in [0, 8, 20] {
        case("bulk_bytes").n(n).fails(host, &["bulk_store at {here}", "bytes"]);
    }
    case("bulk_bytes").n(1024).fails(host, &["bulk_store at {here}", "out of bounds"]);
    case("bulk_out_of_bounds").n(1024).fails(host, &["bulk_store at {here}", "byte 4096 of"]);
    case("bulk_out_of_bounds").n(1).fails(host, &["bulk_store at {here}", "multiples of 16"]);
    let tile = |kernel| case(kernel).shared(2048);
    tile("tensor_tile_misaligned").n(64).fails(host, &["tma_load at {here}", "multiple of 128"]);
    tile("tensor_rank").fails(host, &["tma_load at {here}", "3 coordinates", "rank 2"]);
    let too_little = case("tensor_load").shared(1008);
    too_little.fails(host, &["tma_load at {here}", "1008 bytes of dynamic shared memory"]);
}

#[test]
fn wgmma_keeps_its_rules() {
    let Some(mut host) = machine(race()) else { return };
    let host = &mut host;
    let group = |kernel| case(kernel).threads(128).shared(2304);
    for (kernel, what) in [
        ("wgmma_accumulators_written", "accumulators were written at {there} after the last"),
        ("wgmma_accumulators_read", "accumulators were read at {there} after the last wgmma_fence"),
        ("wgmma_operand_written", "register operand were written at {there} after the last"),
        ("wgmma_of_another_shape", "those of the wgmma of another shape at {there}"),
    ] {
        group(kernel).fails(host, &["wgmma at {here}", what]);
    }
    for kernel in ["wgmma_read_early", "wgmma_not_committed"] {
        group(kernel).fails(
            host,
            &[
                "block (0,0,0) thread",
                "accumulator of the wgmma at {there} is read at {here} before",
            ],
        );
    }
    group("wgmma_operand_overwritten").fails(
        host,
        &["{thread 127}", "register operand of the wgmma at {there} is written at {here} before"],
    );
    for options in [race(), plain()] {
        host.set_options(options);
        group("wgmma_without_wgmma_fence").fails(host, &["wgmma at {here}", "no wgmma_fence"]);
        group("wgmma_at_exit")
            .fails(host, &["exits although it never waited for the wgmma at {here}"]);
        group("descriptors_diverge")
            .fails(host, &["wgmma at {here}", "all 128 must agree", "by block (0,0,0) thread"]);
        group("warp_skips_a_wgmma")
            .fails(host, &["wgmma_wait at {here}", "has diverged", "by {thread 64}"]);
        group("wgmma_out_of_bounds")
            .n(128)
            .fails(host, &["wgmma at {here}", "2304 bytes of dynamic shared memory"]);
        group("half_a_warpgroup")
            .threads(64)
            .fails(host, &["wgmma at {here}", "belongs to no whole warpgroup"]);
    }
}

#[test]
fn a_stage_is_released_when_every_warp_has_read_it() {
    let Some(mut host) = machine(race()) else { return };
    for (order, asynchronous) in [
        (Order::Fifo, Asynchronous::Late),
        (Order::Lifo, Asynchronous::Early),
        (Order::Random, Asynchronous::Anytime),
    ] {
        host.set_options(Options { order, asynchronous, ..race() });
        for kernel in ["stage_released_early", "stage_released_by_one_thread"] {
            case(kernel).threads(160).shared(2304).global_bytes(8192).fails(
                &mut host,
                &[
                    "data race on shared memory",
                    "the wgmma of {thread 0} and the 127 after it",
                    "a copy that completes on the mbarrier at shared 0x",
                ],
            );
        }
    }
}

#[test]
fn registers_are_given_back_before_they_are_taken() {
    let Some(mut host) = machine(plain()) else { return };
    let host = &mut host;
    case("registers_never_fit")
        .threads(384)
        .fails(host, &["setmaxnreg: no registers are free", "at {here}", "spins"]);
    case("registers_wrong_way")
        .threads(384)
        .fails(host, &["setmaxnreg at {here}", "has 168 registers", "cannot make it 232"]);
}

#[test]
fn clusters_keep_their_rules() {
    let Some(mut host) = machine(race()) else { return };
    let host = &mut host;
    for order in [Order::Fifo, Order::Lifo, Order::Random] {
        host.set_options(Options { order, ..race() });
        case("block_has_exited")
            .cluster(2)
            .fails(host, &["{here}", "shared memory of block (1,0,0)", "exited"]);
    }
    host.set_options(race());
    case("peer_not_ordered")
        .cluster(2)
        .fails(host, &["data race on shared memory", "{here}", "{there}"]);
    case("relaxed_arrival").cluster(2).fails(
        host,
        &[
            "data race on shared memory",
            "read by block (1,0,0)",
            "{here}",
            "{thread 30} at {there}",
        ],
    );
    case("cluster_arrive_twice").cluster(2).fails(host, &["cluster_arrive at {here}", "already"]);
    case("cluster_wait_alone").cluster(2).fails(host, &["cluster_wait at {here}", "not arrive"]);
    case("cluster_never_waits").cluster(2).fails(host, &["{thread 0}", "{here}", "cluster_wait"]);
    case("rank_is_not_in_the_cluster")
        .cluster(2)
        .fails(host, &["cluster_map at {here}", "rank 2 of a cluster of 2"]);
    for n in [0, 4, 7] {
        case("multicast_mask")
            .cluster(2)
            .n(n)
            .fails(host, &["bulk_load_multicast at {here}", "in a cluster of 2"]);
    }
}

#[test]
fn a_peers_address_is_not_ones_own() {
    let Some(mut host) = machine(race()) else { return };
    let instructions = [
        "cp.async",
        "ldmatrix",
        "stmatrix",
        "mbarrier_init",
        "mbarrier_invalidate",
        "mbarrier_arrive",
        "mbarrier_arrive_expect_tx",
        "mbarrier_expect_tx",
        "mbarrier_try_wait",
        "mbarrier_wait",
        "tma_load",
        "tma_store",
        "tma_reduce_add",
        "bulk_load",
        "bulk_store",
        "bulk_copy_cluster",
    ];
    for options in [race(), plain()] {
        host.set_options(options);
        for (n, instruction) in instructions.into_iter().enumerate() {
            let at = case("peer_address").cluster(2).shared(1024).n(n as i32);
            let what = format!("{instruction} at {}: shared address 0x", at.place(instruction));
            at.fails(&mut host, &[&what, "is that of block (", "own block only"]);
        }
    }
}

#[test]
fn the_source_of_a_copy_outlives_it() {
    let Some(mut host) = machine(race()) else { return };
    for asynchronous in [Asynchronous::Late, Asynchronous::Early, Asynchronous::Anytime] {
        host.set_options(Options { asynchronous, ..race() });
        case("source_has_exited").cluster(2).fails(&mut host, &["block (0,0,0)", "{here}"]);
    }
    host.set_options(plain());
    let parts = ["block (0,0,0) exits while the bulk_copy_cluster at {here}", "from its shared"];
    case("source_has_exited").cluster(2).fails(&mut host, &parts);
}

#[test]
fn shared_functions_name_the_line_of_their_call() {
    let Some(mut host) = machine(race()) else { return };
    for n in [0, 1] {
        case("lines_of_sums").n(n).fails(&mut host, &["shuffle at {here}", "has exited"]);
    }
    let parts = ["threads 0-31 wait at {here} for cluster_wait"];
    case("line_of_a_cluster_barrier").cluster(2).fails(&mut host, &parts);
}

#[test]
fn threads_that_have_no_stacks_are_refused() {
    if library::is_missing() {
        return;
    }
    let many = Options { multiprocessors: 16, ..plain() };
    let mut host = Host::load(library(), many).unwrap();
    let launch = case("many_threads").cooperative(32).threads(1024);
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    match limit.trim().parse::<u64>().unwrap() / 3 {
        most if most < 32 * 1024 => launch.fails(
            &mut host,
            &["no stacks for the 32768 threads", &most.to_string(), "raise", "vm.max_map_count"],
        ),
        _ => assert_eq!(launch.run(&mut host).unwrap()[0], 32),
    }
    // Large launches give back what they took.
    for _ in 0..4 {
        let found = case("many_threads").cooperative(8).threads(1024).run(&mut host).unwrap();
        assert_eq!(found[0], 8);
    }
    // Helpers without stacks leave all clusters to the launching thread.
    let mut host = Host::load(library(), Options { workers: 6, ..plain() }).unwrap();
    let found = case("many_threads").blocks(48).cluster(8).threads(1024).run(&mut host).unwrap();
    assert_eq!(found[0], 48);
}

// ------------------------------------------------------------------ time and arithmetic

#[test]
fn endless_threads_are_stopped() {
    let watchdog = Duration::from_millis(100);
    let Some(mut host) = machine(race()) else { return };
    let host = &mut host;
    for options in [race(), plain()] {
        host.set_options(Options { watchdog, ..options });
        for kernel in ["endless_reads", "endless_arithmetic"] {
            case(kernel).threads(1).fails(host, &["{thread 0} runs without end", "{here}"]);
        }
        for (kernel, what) in [
            ("spin_on_a_flag", "load_acquire"),
            ("spin_on_an_exchange", "atomicCAS"),
            ("spin_on_an_addition", "atomicAdd"),
            ("spin_on_a_maximum", "atomicMax"),
            ("spin_on_an_mbarrier", "mbarrier_try_wait"),
        ] {
            let what = format!("{what} at {{here}}: the thread spins, and nothing else happens");
            case(kernel).fails(host, &[&what, "block (0,0,0) thread"]);
        }
        // Blocks that are not resident together must not wait for each other.
        let apart = case("spin_on_a_flag").blocks(4).threads(1);
        apart.fails(host, &["load_acquire at {here}", "need a cooperative launch"]);
    }
}

#[test]
fn repeated_atomics_are_no_endless_loop() {
    let Some(mut host) = machine(race()) else { return };
    for options in [race(), plain()] {
        host.set_options(options);
        let words = case("right_repetition").threads(4).run(&mut host).unwrap();
        assert_eq!(words[0], 5);
    }
}

#[test]
fn what_the_processor_refuses_is_a_fault() {
    let Some(mut host) = machine(race()) else { return };
    let host = &mut host;
    for options in [race(), plain()] {
        host.set_options(options);
        case("division").fails(host, &["{thread 0} divides an integer by zero at {here}"]);
        let parts = ["{thread 0} uses more than 64 KiB of local memory at", FILE];
        case("stack_overflow").threads(1).fails(host, &parts);
        case("trap")
            .blocks(3)
            .fails(host, &["__trap at {here}", "block (1,0,0) thread 3 (warp 0, lane 3)"]);
    }
}

// ------------------------------------------------------------------ what a launch says

#[test]
fn launches_are_checked() {
    let Some(mut host) = machine(plain()) else { return };
    let driver: &mut dyn Driver = &mut host;
    let unknown = driver.kernel("global_wriet").unwrap_err().to_string();
    assert!(unknown.contains("`global_write`"), "{unknown}");

    let kernel = driver.kernel("global_write").unwrap();
    let global = driver.allocate("global", 64).unwrap();
    let (matrix, map) = matrix(driver);
    let launch = Launch::new(kernel, [1; 3], [32, 1, 1]);
    let right = Arguments::new().with(map).with(global).with(0i32);
    let mut refused = |launch: Launch, arguments: &Arguments, parts: &[&str]| {
        let error = driver.launch(&launch, arguments).expect_err("refused").to_string();
        for part in parts {
            assert!(error.contains(part), "`{part}` is missing: {error}");
        }
    };
    let too_few = Arguments::new().with(map).with(global);
    refused(launch, &too_few, &["kernel global_write", "3 parameters, 2 arguments"]);
    let too_wide = Arguments::new().with(map).with(global).with(0i64);
    refused(launch, &too_wide, &["argument 2 is a i64 of 8 bytes, the parameter has 4"]);
    let no_map = Arguments::new().with(global).with(global).with(0i32);
    refused(launch, &no_map, &["argument 0 is a pointer of 8 bytes, the parameter has 128"]);
    let threads = Launch { block: [1024, 2, 1], ..launch };
    refused(threads, &right, &["2048 threads, the kernel allows 1024"]);
    refused(launch.cluster([2, 1, 1]), &right, &["not a multiple of the cluster"]);
    refused(launch.shared_bytes(232_449), &right, &["at most 232448"]);
    driver.launch(&launch, &right).unwrap();

    let spec = |address, box_dimensions| {
        let mut map = TensorMapSpec::matrix(
            TensorType::F32,
            address,
            &[32, 64],
            &[128],
            &[32, 8],
            Swizzle::Bytes128,
        );
        map.box_dimensions = box_dimensions;
        driver.tensor_map(&map).expect_err("refused").to_string()
    };
    let mut spec = spec;
    assert!(spec(matrix.address, &[64, 8]).contains("swizzle's span 128"));
    assert!(spec(matrix.address.offset(4), &[32, 8]).contains("multiple of 16"));
    assert!(spec(matrix.address.offset(128), &[32, 8]).contains("matrix"));
}

#[test]
fn a_map_of_a_released_buffer_is_not_used() {
    let Some(mut host) = machine(plain()) else { return };
    for (bytes, again) in [(8192, 8192), (8192, 16384), (16 << 20, 1)] {
        let driver: &mut dyn Driver = &mut host;
        let matrix = driver.allocate("matrix", bytes).unwrap();
        let dimensions = [32, 64];
        let spec = TensorMapSpec::matrix(
            TensorType::F32,
            matrix.address,
            &dimensions,
            &[128],
            &[32, 8],
            Swizzle::None,
        );
        let map = driver.tensor_map(&spec).unwrap();
        let global = driver.allocate("global", 64).unwrap();
        let kernel = driver.kernel("tensor_load").unwrap();
        let launch = Launch::new(kernel, [1; 3], [32, 1, 1]).shared_bytes(1024);
        let arguments = Arguments::new().with(map).with(global).with(0i32);
        driver.launch(&launch, &arguments).unwrap();
        driver.begin_capture(StreamId::MAIN).unwrap();
        driver.launch(&launch, &arguments).unwrap();
        let graph = driver.end_capture(StreamId::MAIN).unwrap();
        driver.launch_graph(graph, StreamId::MAIN).unwrap();
        driver.release(matrix).unwrap();
        // Another buffer may now have the address: the map is not for it.
        let other = driver.allocate("other", again).unwrap();
        println!("at {:?}, then at {:?}", matrix.address, other.address);
        let launched = driver.launch(&launch, &arguments);
        for refused in [launched, driver.launch_graph(graph, StreamId::MAIN)] {
            let error = refused.expect_err("refused").to_string();
            for part in ["kernel tensor_load", "argument 0 maps a tensor of 8192", "was released"] {
                assert!(error.contains(part), "`{part}` is missing: {error}");
            }
        }
        for buffer in [other, global] {
            driver.release(buffer).unwrap();
        }
    }
}

// ------------------------------------------------------------------ right kernels

/// A case, the words of the global buffer that it writes, and what word i of them must be.
type RightCase = (Case, Range<usize>, fn(u32) -> u32);

/// What right_early_exit leaves in word 64 + i.
fn early_exit(i: u32) -> u32 {
    let (other, voted) = (i ^ 1, 0x55);
    (other + other + 32) + other + voted + if i.is_multiple_of(32) { 1000 } else { 0 }
}

fn right_cases() -> Vec<RightCase> {
    vec![
        (case("right_flag").cooperative(2).threads(64), 128..192, |i| i ^ 33),
        (case("right_early_exit").threads(128).cluster(2), 64..104, early_exit),
        (case("right_polls").cooperative(2).threads(1), 128..129, |_| 400),
        (case("right_last_block").blocks(9), 128..137, |i| (i + 1) % 9 + 1),
        (case("right_neighbours"), 0..32, |i| if i == 1 { 10 } else { 11 }),
        (case("right_syncwarp").threads(64), 0..192, |i| i / 64 * 64 + ((i % 64) ^ 5)),
        (case("right_named_barriers").threads(128), 0..192, |i| i / 64 * 64 + ((i % 64) ^ 40)),
        (case("right_cluster").blocks(8).cluster(4), 0..256, |i| {
            i / 128 * 128 + (i / 32 + 1) % 4 * 32 + ((i % 32) ^ 3)
        }),
        (case("right_remote_arrival").blocks(8).cluster(4), 0..256, |i| {
            i / 128 * 4 + (i / 32 + 3) % 4
        }),
        (case("right_grid_barrier").cooperative(2), 576..768, |i| (i / 64 + 1) * 100 + i % 32),
        (case("right_bulk_copies"), 800..832, |i| 1000 + (i ^ 9)),
        (case("right_reduction").blocks(12).shared(1024), 0..32, |_| 24f32.to_bits()),
        // The tile begins at row 8 of the matrix, which stands after the buffer.
        (case("right_reduction").blocks(12).shared(1024), 1280..1536, |_| 78f32.to_bits()),
        (case("right_clipped_store").shared(1024), 2944..3072, |i| (i as f32).to_bits()),
        (case("right_wgmma_fences").threads(128).shared(2304), 0..512, |_| 121f32.to_bits()),
        (case("right_invalidation"), 128..129, |_| 77),
        (case("right_copy_to_a_peer").cluster(2), 128..132, |i| i),
        (case("right_cp_async"), 512..608, |_| 0),
        (case("right_ring").threads(160).shared(2304).global_bytes(8192), 1024..1536, |_| 0),
        (case("right_ring").threads(160).shared(2304).global_bytes(8192).n(1), 1024..1536, |_| 0),
    ]
}

#[test]
fn right_kernels_pass_on_every_schedule() {
    let Some(mut host) = machine(race()) else { return };
    let mut launches = 0;
    for race in [true, false] {
        for order in [Order::Fifo, Order::Lifo, Order::Random] {
            for asynchronous in [Asynchronous::Late, Asynchronous::Early, Asynchronous::Anytime] {
                let seeds = match (order, asynchronous) {
                    (Order::Random, Asynchronous::Anytime) => 200,
                    (Order::Random, _) => 5,
                    _ => 1,
                };
                for seed in 0..seeds {
                    for workers in [1, 2] {
                        let options =
                            Options { race, order, asynchronous, seed, workers, ..plain() };
                        host.set_options(options);
                        for (case, words, expected) in right_cases() {
                            let found = case.run(&mut host);
                            let found = found.unwrap_or_else(|error| panic!("{error}"));
                            for (i, at) in words.enumerate() {
                                let (found, expected) = (found[at], expected(i as u32));
                                let what = format!("{} {options:?} word {at}", case.kernel);
                                assert_eq!(found, expected, "{what}");
                            }
                            launches += 1;
                        }
                    }
                }
            }
        }
    }
    println!("{launches} launches");
}

// ------------------------------------------------------------------ one launch and the others

/// Wrong and right launches at once, from several threads and drivers: each has its own verdict.
#[test]
fn a_fault_harms_no_other_launch() {
    let Some(first) = machine(race()) else { return };
    drop(first);
    let watchdog = Duration::from_millis(500);
    std::thread::scope(|scope| {
        for thread in 0..6u32 {
            scope.spawn(move || {
                let mut host = machine(race()).unwrap();
                let host = &mut host;
                for round in 0..12u32 {
                    let options = if (thread + round) % 2 == 0 { race() } else { plain() };
                    host.set_options(Options { workers: 2, watchdog, ..options });
                    match (thread + round) % 6 {
                        0 => case("trap").blocks(3).fails(host, &["__trap at {here}"]),
                        1 => case("global_write")
                            .n(1 << 30)
                            .fails(host, &["out of bounds", "{here}", "not in any device buffer"]),
                        2 => case("division").fails(host, &["by zero at {here}"]),
                        3 => case("skipped_barrier").fails(host, &["deadlock", "{here}"]),
                        4 => case("stack_overflow").threads(1).fails(host, &["local memory"]),
                        _ => case("endless_reads").threads(1).fails(host, &["without end"]),
                    }
                    let rights = right_cases();
                    let (right, words, expected) =
                        &rights[(thread + round) as usize % rights.len()];
                    let found = right.run(host).unwrap_or_else(|error| panic!("{error}"));
                    for (i, at) in words.clone().enumerate() {
                        assert_eq!(found[at], expected(i as u32), "{} word {at}", right.kernel);
                    }
                }
            });
        }
    });
}

/// Every wrong kernel of the file is launched above: a test of its own for the list.
#[test]
fn every_kernel_of_the_file_is_used() {
    let this = include_str!("faults.rs");
    let named = KERNELS.lines().filter_map(|line| line.strip_prefix("EXPORT_KERNEL("));
    for name in named.map(|rest| rest.trim_end_matches(')')) {
        assert!(this.contains(&format!("\"{name}\"")), "no test launches {name}");
    }
}

// ------------------------------------------------------------------ what the shadow remembers

#[test]
fn every_reader_counts_and_every_source_is_kept() {
    let Some(mut host) = machine(race()) else { return };
    for workers in [1, 2] {
        host.set_options(Options { workers, ..race() });
        case("readers_of_another_block").blocks(2).fails(
            &mut host,
            &[
                "data race on global memory at byte 32 of",
                "write by block (1,0,0) thread 0 (warp 0, lane 0) at {here}",
                "after a read by {thread 1} at {there}",
            ],
        );
    }
    host.set_options(race());
    case("fence_after_the_barrier").fails(
        &mut host,
        &["no fence.proxy.async", "at {here}", "after a write by {thread 1} at {there}"],
    );
    for name in [
        "cp_async_source_overwritten",
        "cp_async_source_overwritten_by_itself",
        "cp_async_source_overwritten_between_barriers",
    ] {
        let race = "data race on global memory at byte";
        case(name).fails(&mut host, &[race, "a write by", "at {here}", "a read by", "{there}"]);
    }
    case("cp_async_fenced_before_its_wait")
        .fails(&mut host, &["no fence.proxy.async", "at {here}", "after a write by", "{there}"]);
    case("right_cp_async_fence").run(&mut host).expect("no fault");
}

/// Two blocks that wait for each other and are no cooperative launch: a worker that comes late
/// makes the other one give up, which is no verdict.
#[test]
fn knowledge_comes_back() {
    let Some(mut host) = machine(race()) else { return };
    host.set_options(Options { workers: 2, ..race() });
    for _ in 0..200 {
        match case("right_return").blocks(2).threads(64).run(&mut host) {
            Ok(words) => return assert_eq!(words[16], 7),
            Err(error) => assert!(error.contains("the thread spins"), "{error}"),
        }
    }
    panic!("two workers never ran at once");
}

#[test]
fn blocks_hand_over_on_every_schedule() {
    let Some(mut host) = machine(race()) else { return };
    let cases: Vec<RightCase> = vec![
        (case("right_additions").blocks(24), 0..64, |i| match i {
            0..32 => 72f32.to_bits(),
            _ => 0x41c0_41c0, // twice 24
        }),
        (case("right_sums_in_turn").blocks(9), 32..96, |i| match i % 2 {
            0 => 16_777_216f32.to_bits(),
            _ => 9f32.to_bits(),
        }),
        (case("right_chain").blocks(9), 128..152, |i| i * (i + 1) / 2),
        (case("right_handoff").blocks(8).threads(64), 128..640, |i| i / 64 + 1),
        (case("right_short_warp").threads(40), 0..104, |i| match i {
            0..40 => i ^ 1,
            40..64 => 0,
            64..96 => u32::MAX,
            _ => 0xff,
        }),
        (case("right_many_stores").global_bytes(48000), 0..12000, |i| {
            40 + i % 4 + u32::from(i % 400 == 0)
        }),
    ];
    for race in [true, false] {
        for order in [Order::Fifo, Order::Lifo, Order::Random] {
            for asynchronous in [Asynchronous::Late, Asynchronous::Early, Asynchronous::Anytime] {
                for seed in 0..if order == Order::Random { 10 } else { 1 } {
                    for workers in [1, 2] {
                        let options =
                            Options { race, order, asynchronous, seed, workers, ..plain() };
                        host.set_options(options);
                        for (case, words, expected) in &cases {
                            let found = case.run(&mut host);
                            let found = found.unwrap_or_else(|error| panic!("{error}"));
                            for (i, at) in words.clone().enumerate() {
                                let what = format!("{} {options:?} word {at}", case.kernel);
                                assert_eq!(found[at], expected(i as u32), "{what}");
                            }
                        }
                    }
                }
            }
        }
    }
}
