//! The rules that both machines share, without a machine; then memory, streams, events, graphs and
//! launches on every machine that is here.

use std::ffi::OsString;

use cudarc::driver::sys::CUresult;
use isobath::Error;
use isobath::config::DeviceKind;
use isobath::cuda::host::{Asynchronous, Host, Options, Order};
use isobath::cuda::nvidia::{self, Nvidia};
use isobath::cuda::{
    self, Allocation, Arguments, Capture, DevicePointer, Driver, EventId, Fill, GraphId, KernelId,
    KernelInfo, L2Promotion, Launch, Ledger, Properties, StreamId, Swizzle, TensorMapSpec,
    TensorType,
};

use super::library;
use super::machines::ptx_machine;
use crate::support::normals;

/// That it is an error, and that its text contains every part.
#[track_caller]
pub fn assert_refused<T>(result: Result<T, Error>, parts: &[&str]) -> Error {
    let error = result.err().expect("this must be refused");
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "`{part}` is missing in:\n{text}");
    }
    assert!(text.contains("remedy: "), "{text}");
    error
}

// ------------------------------------------------------------------ arguments

#[test]
fn arguments_are_copied_bit_for_bit_to_aligned_places() {
    let pointer = DevicePointer(0x7f00_1234_5600);
    let arguments = Arguments::new()
        .with(pointer)
        .with(-5i32)
        .with(u32::MAX)
        .with(-0.0f32)
        .with(i64::MIN)
        .with(u64::MAX - 1)
        .with(Allocation { address: pointer.offset(16), bytes: 4 });
    let expected: [&[u8]; 7] = [
        &0x7f00_1234_5600u64.to_ne_bytes(),
        &(-5i32).to_ne_bytes(),
        &u32::MAX.to_ne_bytes(),
        &(-0.0f32).to_ne_bytes(),
        &i64::MIN.to_ne_bytes(),
        &(u64::MAX - 1).to_ne_bytes(),
        &0x7f00_1234_5610u64.to_ne_bytes(),
    ];
    // A clone owns its values: the original's end must not change them.
    let copied = arguments.clone();
    drop(arguments);
    let pointers = copied.pointers();
    assert_eq!((copied.len(), pointers.len()), (7, 7));
    for (pointer, expected) in pointers.into_iter().zip(expected) {
        assert_eq!(pointer as usize % 128, 0, "a tensor map may stand at any place");
        // SAFETY: `copied` is alive, and each place has 128 bytes.
        let bytes = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>(), expected.len()) };
        assert_eq!(bytes, expected);
    }
}

pub fn kernel(parameter_bytes: Option<Vec<u32>>) -> KernelInfo {
    KernelInfo {
        name: "norm_forward".to_string(),
        parameter_bytes,
        max_threads: 256,
        compiled_for: (9, 0),
        registers: None,
        local_bytes: 0,
        static_shared_bytes: None,
    }
}

#[test]
fn arguments_that_do_not_fit_the_parameters_are_refused() {
    let mut memory = Ledger::default();
    let buffer = Allocation { address: DevicePointer(4096), bytes: 100 };
    memory.add(buffer, "weights");
    let check = |parameters: Option<&[u32]>, arguments: Arguments| {
        let kernel = kernel(parameters.map(<[u32]>::to_vec));
        cuda::check_arguments("simt", &kernel, &arguments, &memory)
    };
    let last_byte = DevicePointer(4096 + 99);
    check(Some(&[8, 4]), Arguments::new().with(last_byte).with(1i32)).unwrap();
    check(Some(&[8]), Arguments::new().with(DevicePointer::NULL)).unwrap();
    check(None, Arguments::new().with(buffer).with(1u64)).unwrap();

    let named = ["kernel norm_forward on simt"];
    let too_few = check(Some(&[8, 4]), Arguments::new().with(buffer));
    assert_refused(too_few, &[named[0], "2 parameters, 1 arguments"]);
    let too_wide = check(Some(&[8, 4]), Arguments::new().with(buffer).with(1u64));
    assert_refused(too_wide, &["argument 1 is a u64 of 8 bytes, the parameter has 4"]);
    // What the driver cannot tell of the parameters does not make addresses unchecked.
    for parameters in [Some(&[8u32][..]), None] {
        for wrong in [4096 + 100, 4095] {
            let arguments = Arguments::new().with(DevicePointer(wrong));
            let shown = format!("argument 0 is {wrong:#x}, in no buffer");
            assert_refused(check(parameters, arguments), &[&shown]);
        }
    }
}

#[test]
fn a_map_is_for_the_buffer_that_it_was_made_for() {
    let mut memory = Ledger::default();
    let buffer = Allocation { address: CORRECT.address, bytes: 64 * 256 };
    memory.add(buffer, "matrix");
    let tensor = memory.tensor("simt", &CORRECT).unwrap();
    assert!(memory.has(&tensor));
    // The next one at the same address, of the same size: it is another.
    assert!(memory.remove(buffer) && !memory.has(&tensor));
    memory.add(buffer, "matrix");
    assert!(!memory.has(&tensor) && memory.has(&memory.tensor("simt", &CORRECT).unwrap()));
    let beyond = memory.tensor("simt", &TensorMapSpec { dimensions: &[128, 65], ..CORRECT });
    assert_refused(beyond, &["map a tensor of 16640 bytes from byte 0 of `matrix`"]);
}

// ------------------------------------------------------------------ tensor maps

/// A correct map of a bf16 matrix [64 rows, 128 columns] in rows of 256 bytes.
const CORRECT: TensorMapSpec = TensorMapSpec {
    data_type: TensorType::Bf16,
    address: DevicePointer(1 << 20),
    dimensions: &[128, 64],
    stride_bytes: &[256],
    box_dimensions: &[64, 64],
    swizzle: Swizzle::Bytes128,
    l2_promotion: L2Promotion::Bytes256,
    fill: Fill::Zeros,
};

#[test]
fn a_correct_tensor_map_spans_its_tensor_and_no_more() {
    assert_eq!(CORRECT.extent_bytes().unwrap(), 63 * 256 + 128 * 2);
    // The last row need not be padded.
    let padded = TensorMapSpec { dimensions: &[120, 64], ..CORRECT };
    assert_eq!(padded.extent_bytes().unwrap(), 63 * 256 + 120 * 2);
    let line = TensorMapSpec {
        dimensions: &[1000],
        stride_bytes: &[],
        box_dimensions: &[256],
        swizzle: Swizzle::None,
        ..CORRECT
    };
    assert_eq!(line.extent_bytes().unwrap(), 2000);
    // Blocks of 64 columns one after the other: strides need not grow.
    let blocks = TensorMapSpec {
        dimensions: &[64, 64, 2],
        stride_bytes: &[256, 128],
        box_dimensions: &[64, 64, 2],
        ..CORRECT
    };
    assert_eq!(blocks.extent_bytes().unwrap(), 63 * 256 + 128 + 128);
    for (swizzle, columns) in
        [(Swizzle::Bytes32, 16), (Swizzle::Bytes64, 32), (Swizzle::Bytes128, 64)]
    {
        let widest = [columns, 64];
        TensorMapSpec { swizzle, box_dimensions: &widest, ..CORRECT }.extent_bytes().unwrap();
        let wider = [columns + 8, 64];
        let wider = TensorMapSpec { swizzle, box_dimensions: &wider, ..CORRECT };
        let span = format!("the swizzle's span {}", columns * 2);
        assert_refused(wider.extent_bytes(), &["a row of the box is", &span]);
    }
    let matrix = TensorMapSpec::matrix(
        TensorType::Bf16,
        CORRECT.address,
        &[128, 64],
        &[256],
        &[64, 64],
        Swizzle::Bytes128,
    );
    assert_eq!(matrix, CORRECT);
}

#[test]
fn each_broken_rule_of_a_tensor_map_is_named() {
    let six = [16u64; 6];
    let strides = [256u64; 5];
    let boxes = [16u32; 6];
    let broken: [(TensorMapSpec, &str); 19] = [
        (
            TensorMapSpec { dimensions: &[], stride_bytes: &[], box_dimensions: &[], ..CORRECT },
            "1 to 5 dimensions, this one has 0",
        ),
        (
            TensorMapSpec {
                dimensions: &six,
                stride_bytes: &strides,
                box_dimensions: &boxes,
                ..CORRECT
            },
            "1 to 5 dimensions, this one has 6",
        ),
        (TensorMapSpec { stride_bytes: &[2, 256], ..CORRECT }, "2 dimensions need 1 strides"),
        (TensorMapSpec { box_dimensions: &[64], ..CORRECT }, "2 dimensions need a box of 2"),
        (TensorMapSpec { address: DevicePointer::NULL, ..CORRECT }, "the address 0x0 is not"),
        (
            TensorMapSpec { address: DevicePointer(0x1008), ..CORRECT },
            "the address 0x1008 is not a multiple of 16",
        ),
        (TensorMapSpec { dimensions: &[128, 0], ..CORRECT }, "dimension 1 is 0"),
        (TensorMapSpec { dimensions: &[(1 << 32) + 1, 1], ..CORRECT }, "dimension 0 is 4294967297"),
        (
            TensorMapSpec { stride_bytes: &[250], ..CORRECT },
            "stride 0 is 250 bytes, not a multiple of 16",
        ),
        (TensorMapSpec { stride_bytes: &[0], ..CORRECT }, "stride 0 is 0 bytes"),
        (TensorMapSpec { stride_bytes: &[1 << 40], ..CORRECT }, "below 2^40"),
        (TensorMapSpec { box_dimensions: &[64, 0], ..CORRECT }, "box dimension 1 is 0"),
        (TensorMapSpec { box_dimensions: &[64, 257], ..CORRECT }, "box dimension 1 is 257"),
        (
            TensorMapSpec { box_dimensions: &[12, 64], ..CORRECT },
            "a row of the box is 24 bytes, not a multiple of 16",
        ),
        (
            TensorMapSpec { box_dimensions: &[128, 64], ..CORRECT },
            "a row of the box is 256 bytes, the swizzle's span 128",
        ),
        (
            TensorMapSpec { swizzle: Swizzle::Bytes64, ..CORRECT },
            "a row of the box is 128 bytes, the swizzle's span 64",
        ),
        (
            TensorMapSpec { swizzle: Swizzle::Bytes32, ..CORRECT },
            "a row of the box is 128 bytes, the swizzle's span 32",
        ),
        (
            TensorMapSpec { data_type: TensorType::U16, fill: Fill::Nans, ..CORRECT },
            "U16 has no NaN",
        ),
        (
            TensorMapSpec {
                dimensions: &[1 << 32; 5],
                stride_bytes: &[(1 << 40) - 16; 4],
                box_dimensions: &[16; 5],
                ..CORRECT
            },
            "the tensor spans",
        ),
    ];
    CORRECT.extent_bytes().unwrap();
    for (spec, rule) in broken {
        let error = assert_refused(spec.extent_bytes(), &["tensor map: ", rule]);
        assert!(matches!(error, Error::TensorMap { .. }));
    }
}

// ------------------------------------------------------------------ launches

pub fn hopper() -> Properties {
    Properties {
        name: "a Hopper".to_string(),
        compute_capability: (9, 0),
        multiprocessors: 132,
        memory_bytes: 80 << 30,
        l2_bytes: 50 << 20,
        shared_bytes_per_block: 232_448,
        shared_bytes_per_multiprocessor: 233_472,
        max_threads_per_block: 1024,
        max_threads_per_multiprocessor: 2048,
        clock_mhz: 1980,
        driver_version: "13.0".to_string(),
    }
}

#[test]
fn each_broken_rule_of_a_launch_is_named() {
    let launch = Launch::new(KernelId(0), [8, 4, 2], [256, 1, 1]);
    let kernel = KernelInfo { static_shared_bytes: Some(1024), ..kernel(None) };
    let check = |launch: Launch| cuda::check_launch("cuda", &hopper(), &kernel, &launch);
    check(launch).unwrap();
    check(launch.cluster([2, 2, 2]).shared_bytes(231_424)).unwrap();
    check(launch.dependent().cooperative()).unwrap();
    check(Launch { grid: [i32::MAX as u32, 65535, 65535], ..launch }).unwrap();
    check(Launch { block: [4, 4, 16], ..launch }).unwrap();

    let broken = [
        (Launch { grid: [8, 0, 1], ..launch }, "the grid is [8, 0, 1]"),
        (Launch { grid: [1 << 31, 1, 1], ..launch }, "the grid is [2147483648, 1, 1]"),
        (Launch { grid: [1, 65536, 1], ..launch }, "the grid is [1, 65536, 1]"),
        (Launch { grid: [1, 1, 65536], ..launch }, "the grid is [1, 1, 65536]"),
        (Launch { block: [0, 1, 1], ..launch }, "the block is [0, 1, 1]"),
        (Launch { block: [1, 1, 65], ..launch }, "the block is [1, 1, 65]"),
        (Launch { block: [257, 1, 1], ..launch }, "257 threads, the kernel allows 256"),
        (Launch { block: [32, 32, 1], ..launch }, "1024 threads, the kernel allows 256"),
        (launch.cluster([0, 1, 1]), "a cluster of [0, 1, 1] has 0 blocks"),
        (Launch { grid: [16, 1, 1], ..launch }.cluster([16, 1, 1]), "has 16 blocks; 1 to 8"),
        (launch.cluster([3, 1, 1]), "the grid [8, 4, 2] is not a multiple of the cluster"),
        (launch.cluster([1, 1, 4]), "the grid [8, 4, 2] is not a multiple of the cluster"),
        (launch.shared_bytes(231_425), "231425 bytes of dynamic and 1024 of static"),
        (launch.shared_bytes(u32::MAX), "at most 232448"),
        (
            Launch { grid: [132 * 8 + 1, 1, 1], ..launch }.cooperative(),
            "1057 blocks must be resident at once, at most 1056",
        ),
        (
            Launch { grid: [133, 1, 1], ..launch }.cooperative().shared_bytes(200_000),
            "133 blocks must be resident at once, at most 132",
        ),
    ];
    for (launch, rule) in broken {
        let error = assert_refused(check(launch), &["kernel norm_forward on cuda", rule]);
        assert!(matches!(error, Error::Launch { .. }));
    }

    let ampere = Properties { compute_capability: (8, 0), ..hopper() };
    let check = |launch: Launch| cuda::check_launch("cuda", &ampere, &kernel, &launch);
    check(launch).unwrap();
    assert_refused(check(launch.cluster([2, 1, 1])), &["clusters need compute capability 9.0"]);
    assert_refused(check(launch.dependent()), &["dependent launches need", "8.0"]);
}

#[test]
fn only_work_on_the_captured_stream_is_recorded() {
    let mut capture = Capture::default();
    assert!(!capture.records("simt", StreamId::MAIN).unwrap());
    capture.forbid("simt", "an allocation").unwrap();
    assert_refused(capture.end("simt", StreamId::MAIN), &["not being captured"]);
    capture.begin("simt", StreamId::MAIN).unwrap();
    assert!(capture.records("simt", StreamId::MAIN).unwrap());
    assert_refused(capture.forbid("simt", "an allocation"), &["an allocation cannot be recorded"]);
    assert_refused(capture.records("simt", StreamId(1)), &["work on another stream"]);
    assert_refused(capture.begin("simt", StreamId(1)), &["a second capture"]);
    assert_refused(capture.end("simt", StreamId(1)), &["not being captured"]);
    capture.end("simt", StreamId::MAIN).unwrap();
    assert!(!capture.records("simt", StreamId::MAIN).unwrap());
}

#[test]
fn a_range_must_lie_in_one_buffer() {
    let mut memory = Ledger::default();
    let weights = Allocation { address: DevicePointer(4096), bytes: 100 };
    let neighbour = Allocation { address: DevicePointer(4196), bytes: 28 };
    memory.add(weights, "weights");
    memory.add(neighbour, "neighbour");
    let check = |from: u64, bytes| memory.check("simt", "read", DevicePointer(from), bytes);
    check(4096, 100).unwrap();
    check(4195, 1).unwrap();
    check(4196, 28).unwrap();
    // Two neighbours are not one buffer.
    assert_refused(check(4096, 101), &["read 101 bytes from byte 0 of `weights`, which has 100"]);
    assert_refused(check(4195, 2), &["byte 99 of `weights`"]);
    assert_refused(check(4095, 1), &["0xfff, in no buffer"]);
    assert_refused(check(4224, 1), &["0x1080, in no buffer"]);
    assert_refused(check(4200, u64::MAX), &["byte 4 of `neighbour`"]);

    let copy = |from: u64, to: u64, bytes| {
        memory.check_copy("simt", DevicePointer(from), DevicePointer(to), bytes)
    };
    copy(4096, 4146, 50).unwrap();
    copy(4146, 4096, 50).unwrap();
    assert_refused(copy(4096, 4145, 50), &["overlaps"]);
    assert_refused(copy(4145, 4096, 50), &["overlaps"]);
    assert_refused(copy(4096, 4196, 29), &["copy to", "`neighbour`"]);

    assert!(!memory.remove(Allocation { bytes: 99, ..weights }));
    assert!(memory.remove(weights));
    assert!(!memory.remove(weights));
    assert!(!memory.holds(DevicePointer(4096), 1));
    assert_eq!(memory.bytes(), 28);
}

// ------------------------------------------------------------------ options, absent machines

fn options(variables: &[(&str, &str)]) -> Result<Options, Error> {
    Options::from_variables(|name| {
        let found = variables.iter().find(|(variable, _)| *variable == name);
        found.map(|(_, value)| OsString::from(value))
    })
}

#[test]
fn options_come_from_variables_and_bad_values_name_theirs() {
    assert_eq!(options(&[]).unwrap(), Options::default());
    let all = [
        ("SIMT_ORDER", "random"),
        ("SIMT_ASYNC", "anytime"),
        ("SIMT_SEED", "18446744073709551615"),
        ("SIMT_RACE", "1"),
        ("SIMT_WORKERS", "3"),
        ("SIMT_WATCHDOG_MS", "250"),
    ];
    let expected = Options {
        order: Order::Random,
        asynchronous: Asynchronous::Anytime,
        seed: u64::MAX,
        race: true,
        workers: 3,
        watchdog: std::time::Duration::from_millis(250),
        ..Options::default()
    };
    assert_eq!(options(&all).unwrap(), expected);
    assert!(!options(&[("SIMT_RACE", "0")]).unwrap().race);
    let bad = [
        ("SIMT_ORDER", "randum", "use `random`"),
        ("SIMT_ASYNC", "", "or `"),
        ("SIMT_SEED", "-1", "`-1` is not a number from 0"),
        ("SIMT_RACE", "yes", "`yes` is not a number from 0 to 1"),
        ("SIMT_RACE", "2", "`2` is not a number from 0 to 1"),
        ("SIMT_WORKERS", "1025", "from 0 to 1024"),
        ("SIMT_WATCHDOG_MS", "4294967296", "from 0 to 4294967295"),
    ];
    for (variable, value, part) in bad {
        let error = assert_refused(options(&[(variable, value)]), &[variable, part]);
        assert_eq!(error.exit_code(), 2);
    }
}

#[test]
fn a_missing_gpu_says_what_is_missing() {
    nvidia::kernels_present(&[("norm", &[1])], Ok("nvcc 13.0.88")).unwrap();
    let no_kernels = nvidia::kernels_present(&[], Err("no nvcc in PATH"));
    assert_refused(no_kernels, &["no kernels for GPUs: no nvcc in PATH", "tools/fetch-nvcc"]);

    let Err(missing) = nvidia::library_present() else {
        println!("skipped: this machine has libcuda");
        return;
    };
    let expected = ["device cuda: no NVIDIA driver: libcuda.so was not found", "--gpus all"];
    assert_refused::<()>(Err(missing), &expected);
    for error in [Nvidia::open(0).err(), cuda::open(DeviceKind::Cuda, Options::default()).err()] {
        assert_refused::<()>(Err(error.unwrap()), &expected);
    }
}

#[test]
fn a_gpu_or_driver_that_is_too_old_is_refused() {
    for version in [12_000, 13_000] {
        nvidia::check_driver(version).unwrap();
    }
    assert_refused(nvidia::check_driver(11_080), &["device cuda", "CUDA 11.8", "580 or newer"]);
    for capability in [(8, 0), (8, 6), (9, 0), (10, 0)] {
        nvidia::check_gpu("a GPU", capability).unwrap();
    }
    let parts = ["Tesla V100", "compute capability 7.0", "8.0 or newer"];
    assert_refused(nvidia::check_gpu("Tesla V100", (7, 0)), &parts);
    nvidia::check_index(1, 2).unwrap();
    let parts = ["no GPU 2: 2 can be seen", "CUDA_VISIBLE_DEVICES"];
    assert_refused(nvidia::check_index(2, 2), &parts);
    assert_refused(nvidia::check_index(0, 0), &["no GPU 0: 0 can be seen"]);
}

#[test]
fn no_memory_has_the_same_remedy_wherever_it_is_noticed() {
    let remedy = |error| nvidia::remedy_of(error, "update the driver");
    let of_memory = remedy(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
    for part in ["train.micro_batch", "train.recompute", "optimizer.offload"] {
        assert!(of_memory.contains(part), "{part} is not in {of_memory}");
    }
    assert_eq!(remedy(CUresult::CUDA_ERROR_INVALID_IMAGE), "update the driver");
}

#[test]
fn a_late_error_names_the_latest_kernels_and_says_how_many_more_it_may_be() {
    let of = |names: &[&str]| nvidia::suspects(names.iter().copied());
    assert_eq!(of(&["loss", "loss"]), ("loss".to_string(), String::new()));
    let (names, hint) = of(&["loss", "norm", "loss", "gemm"]);
    assert_eq!(
        (names.as_str(), hint.as_str()),
        ("loss, norm, gemm", "; one of these, the latest first")
    );
    let (names, hint) = of(&["a", "b", "c", "a", "d", "e", "f", "g", "h", "i", "j", "a"]);
    assert_eq!(names, "a, b, c, d, e, f, g, h");
    assert_eq!(hint, "; one of these, the latest first, or of 2 before them");
}

/// Kernels 0, 1, 2 ... on the streams 0 and 1 in turn.
#[test]
fn what_was_waited_for_is_above_suspicion() {
    let launched = |count: u32| {
        let mut pending = nvidia::Pending::default();
        (0..count).for_each(|i| pending.launched(KernelId(i), StreamId(i % 2)));
        pending
    };
    let left = |pending: &nvidia::Pending| -> Vec<u32> {
        pending.latest_first().map(|kernel| kernel.0).collect()
    };
    let mut pending = launched(6);
    pending.finished_before(StreamId(0), 3);
    assert_eq!(left(&pending), [5, 4, 3, 1], "0 and 2 ran on that stream, among the first three");
    pending.launched(KernelId(6), StreamId(0));
    pending.finished(StreamId(1));
    assert_eq!(left(&pending), [6, 4]);
    // Counted are all that were launched, not those that are left.
    assert_eq!(pending.count(), 7);
    pending.finished_before(StreamId(0), 6);
    assert_eq!(left(&pending), [6]);
    pending.all_finished();
    assert!(pending.is_empty() && left(&pending).is_empty());

    // A session launches millions: the latest ones are kept, and nobody is acquitted for another.
    let most = 100_000;
    let mut pending = launched(most);
    let kept = left(&pending);
    assert!(kept.len() < 40_000 && kept.len() > 10_000, "{}", kept.len());
    assert_eq!(kept[..3], [most - 1, most - 2, most - 3]);
    pending.finished_before(StreamId(0), u64::from(most) - 10);
    assert_eq!(left(&pending)[..6], [most - 1, most - 2, most - 3, most - 4, most - 5, most - 6]);
    assert!(left(&pending)[10..].iter().all(|kernel| kernel % 2 == 1));
}

#[test]
fn the_device_cpu_has_no_kernels() {
    let opened = cuda::open(DeviceKind::Cpu, Options::default());
    assert_refused(opened.map(|_| ()), &["device cpu", "--device simt"]);
}

#[test]
fn a_build_without_the_machine_says_why() {
    let opened = cuda::open(DeviceKind::Simt, Options::default());
    assert_eq!(opened.is_ok(), cfg!(simt));
    match opened {
        Ok(driver) => assert_eq!(driver.device(), "simt"),
        Err(error) => {
            assert_refused::<()>(
                Err(error),
                &["device simt: this build has no CPU machine", "CXX"],
            );
        }
    }
}

// ------------------------------------------------------------------ on the machines

/// Every machine that is here. Says which is not.
fn machines() -> Vec<Box<dyn Driver>> {
    let kinds = [DeviceKind::Simt, DeviceKind::Cuda];
    let opened = kinds.map(|kind| cuda::open(kind, Options::default()));
    let here = opened.into_iter().filter_map(|driver| match driver {
        Ok(driver) => Some(driver),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    });
    let ptx = ptx_machine(0).map(|machine| Box::new(machine) as Box<dyn Driver>);
    here.chain(ptx).collect()
}

fn f32s(seed: u64, count: usize) -> Vec<f32> {
    normals(seed, count).iter().map(|&value| value as f32).collect()
}

#[test]
fn memory_is_aligned_and_copies_are_exact() {
    for mut driver in machines() {
        let driver = &mut *driver;
        let values = f32s(1, 1031);
        let (a, b) = (driver.upload("a", &values).unwrap(), driver.allocate("b", 5000).unwrap());
        for buffer in [a, b] {
            assert_eq!(buffer.address.0 % 256, 0);
        }
        assert_eq!(driver.download::<f32>(a.address, 1031).unwrap(), values);

        driver.fill(StreamId::MAIN, b.address, 5000, 0x7b).unwrap();
        driver.on_device(StreamId::MAIN, a.address.offset(8), b.address.offset(4), 4).unwrap();
        let bytes = driver.download::<u8>(b.address, 5000).unwrap();
        let mut expected = vec![0x7b; 5000];
        expected[4..8].copy_from_slice(&values[2].to_ne_bytes());
        assert_eq!(bytes, expected);

        let beyond = driver.download::<u8>(b.address.offset(4999), 2).map(|_| ());
        assert_refused(beyond, &["read 2 bytes from byte 4999 of `b`, which has 5000"]);
        let beyond = driver.fill(StreamId::MAIN, a.address, 4125, 0);
        assert_refused(beyond, &["fill 4125 bytes from byte 0 of `a`"]);
        assert_refused(driver.allocate("nothing", 0), &["`nothing` has no bytes"]);
        assert_refused(driver.allocate("all", 1 << 50), &["no memory for", "`all`"]);

        let spec = TensorMapSpec { address: a.address, dimensions: &[64, 8], ..CORRECT };
        let map = driver.tensor_map(&TensorMapSpec { stride_bytes: &[512], ..spec }).unwrap();
        let again = driver.tensor_map(&TensorMapSpec { stride_bytes: &[512], ..spec }).unwrap();
        assert_eq!(map, again);
        // 7 * 576 + 128 = 4160 > 4124
        let beyond = driver.tensor_map(&TensorMapSpec { stride_bytes: &[576], ..spec });
        assert_refused(beyond, &["map a tensor of 4160 bytes from byte 0 of `a`"]);

        driver.release(a).unwrap();
        assert_refused(driver.release(a), &["of another driver"]);
        assert_refused(driver.download::<f32>(a.address, 1).map(|_| ()), &["in no buffer"]);
    }
}

/// A buffer in host memory is one of the driver's like any other, but for where it lies.
#[test]
fn host_memory_begins_as_zeros_and_is_copied_to_and_from() {
    for mut driver in machines() {
        let driver = &mut *driver;
        let values = f32s(1, 1031);
        let device = driver.upload("device", &values).unwrap();
        let host = driver.allocate_host("host", 4 * 1040).unwrap();
        assert_eq!((host.bytes, host.address.0 % 256), (4160, 0));
        assert_eq!(driver.download::<f32>(host.address, 1040).unwrap(), [0.0; 1040]);
        let bytes = device.bytes;
        driver.on_device(StreamId::MAIN, device.address, host.address.offset(16), bytes).unwrap();
        driver.fill(StreamId::MAIN, device.address, bytes, 0xff).unwrap();
        driver.on_device(StreamId::MAIN, host.address.offset(16), device.address, bytes).unwrap();
        assert_eq!(driver.download::<f32>(device.address, 1031).unwrap(), values);
        let found = driver.download::<f32>(host.address, 1040).unwrap();
        assert!(found[..4] == [0.0; 4] && found[4..1035] == values && found[1035..] == [0.0; 5]);

        let beyond =
            driver.on_device(StreamId::MAIN, device.address, host.address.offset(40), bytes);
        assert_refused(beyond, &["write", "of `host`, which has 4160"]);
        assert_refused(driver.allocate_host("nothing", 0), &["`nothing` has no bytes"]);
        assert_refused(driver.allocate_host("all", 1 << 50), &["memory", "`all`"]);
        driver.release(host).unwrap();
        assert_refused(driver.release(host), &["of another driver"]);
    }
}

#[test]
fn events_measure_and_streams_wait() {
    for mut driver in machines() {
        let driver = &mut *driver;
        let side = driver.new_stream().unwrap();
        let buffer = driver.allocate("buffer", 32 << 20).unwrap();
        let [start, end] = [(); 2].map(|()| driver.new_event().unwrap());
        assert_refused(driver.elapsed_ms(start, end), &["never recorded"]);
        driver.record(start, StreamId::MAIN).unwrap();
        for value in 0..20 {
            driver.fill(StreamId::MAIN, buffer.address, buffer.bytes, value).unwrap();
        }
        driver.record(end, StreamId::MAIN).unwrap();
        driver.wait(side, end).unwrap();
        // 640 MB at no more than 10 TB/s.
        let elapsed = driver.elapsed_ms(start, end).unwrap();
        assert!((0.06..10_000.0).contains(&elapsed), "{elapsed} ms");
        let reversed = driver.elapsed_ms(end, start).unwrap();
        assert!((elapsed + reversed).abs() < 1e-3, "{elapsed} {reversed}");
        driver.fill(side, buffer.address, 1, 99).unwrap();
        driver.synchronize().unwrap();
        assert_eq!(driver.download::<u8>(buffer.address, 2).unwrap(), [99, 19]);
        assert_refused(
            driver.fill(StreamId(7), buffer.address, 1, 0),
            &["this stream is of another"],
        );
        assert_refused(driver.wait(side, EventId(2)), &["this event is of another"]);
    }
}

#[test]
fn a_graph_runs_what_was_recorded_and_nothing_before() {
    for mut driver in machines() {
        let driver = &mut *driver;
        let stream = driver.new_stream().unwrap();
        let [a, b] = [[1u8; 64], [2; 64]].map(|bytes| driver.upload("bytes", &bytes).unwrap());
        let event = driver.new_event().unwrap();
        driver.record(event, stream).unwrap();
        driver.begin_capture(stream).unwrap();
        driver.on_device(stream, a.address, b.address, 32).unwrap();
        driver.fill(stream, a.address, 16, 9).unwrap();
        assert_refused(driver.allocate("more", 16), &["an allocation cannot be recorded"]);
        let on_main = driver.fill(StreamId::MAIN, a.address, 16, 9);
        assert_refused(on_main, &["work on another stream"]);
        assert_refused(driver.synchronize(), &["cannot be recorded"]);
        assert_refused(driver.release_graph(GraphId(0)), &["release of a graph cannot be rec"]);
        assert_refused(driver.elapsed_ms(event, event), &["waiting for an event cannot be rec"]);
        assert_refused(driver.download::<u8>(a.address, 1).map(|_| ()), &["to host memory"]);
        let graph = driver.end_capture(stream).unwrap();

        let contents = |driver: &mut dyn Driver| {
            driver.synchronize().unwrap();
            [a, b].map(|buffer| driver.download::<u8>(buffer.address, 64).unwrap())
        };
        assert_eq!(contents(driver), [vec![1; 64], vec![2; 64]]);
        driver.launch_graph(graph, stream).unwrap();
        let filled = [vec![9; 16], vec![1; 48]].concat();
        assert_eq!(contents(driver), [filled.clone(), [vec![1; 32], vec![2; 32]].concat()]);
        driver.launch_graph(graph, stream).unwrap();
        let copied = [vec![9; 16], vec![1; 16], vec![2; 32]].concat();
        assert_eq!(contents(driver), [filled, copied]);
        assert_refused(driver.launch_graph(GraphId(1), stream), &["this graph is of another"]);

        driver.release(a).unwrap();
        assert_refused(driver.launch_graph(graph, stream), &["32 bytes from", "in no buffer"]);
        driver.release_graph(graph).unwrap();
        assert_refused(driver.launch_graph(graph, stream), &["this graph is of another"]);
        assert_refused(driver.release_graph(graph), &["this graph is of another"]);
    }
}

#[test]
fn a_kernel_that_does_not_exist_gets_the_nearest_names() {
    for mut driver in machines() {
        let first = driver.kernel("norm_backward_gain").unwrap();
        assert_eq!(driver.kernel("norm_backward_gain").unwrap(), first);
        let info = driver.kernel_info(first).unwrap();
        assert_eq!(info.parameter_bytes, Some(vec![8, 8, 4, 4, 4]));
        assert_eq!((info.max_threads, info.local_bytes), (256, 0));
        assert!(driver.kernel_names().contains(&info.name));
        let wrong = driver.kernel("norm_backward_gian");
        assert_refused(wrong, &["`norm_backward_gian`", "use `norm_backward_gain`"]);
        let foreign = KernelId(driver.kernel_names().len() as u32);
        assert_refused(driver.kernel_info(foreign).map(|_| ()), &["this kernel is of another"]);
    }
}

// ------------------------------------------------------------------ kernels of the test's own

const KERNELS: &str = r#"
#include "isobath.cuh"

KERNEL(pass_every_type, 32)(uint64_t* out, int a, uint32_t b, float c, long long d, uint64_t e,
                            const __grid_constant__ TensorMap map) {
  if (threadIdx.x) return;
  out[0] = uint64_t(int64_t(a));
  out[1] = b;
  out[2] = __float_as_uint(c);
  out[3] = uint64_t(d);
  out[4] = e;
  out[5] = reinterpret_cast<uint64_t>(&map) % 64;
  for (int i = 0; i < 16; ++i) out[6 + i] = map.opaque[i];
}
EXPORT_KERNEL(pass_every_type)

KERNEL(add_one, 64)(float* out, int count) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) out[i] += 1;
}
EXPORT_KERNEL(add_one)

KERNEL(stop, 32)(float* out) {
  if (blockIdx.x == 1 && threadIdx.x == 3) __trap();
}
EXPORT_KERNEL(stop)

// Every thread reads what its neighbour writes, without a barrier in between.
KERNEL(race, 64)(float* out) {
  SHARED(float, values, 64);
  const int i = int(threadIdx.x);
  values[i] = 0;
  __syncthreads();
  values[i] = float(i);
  out[i] = values[i ^ 32];
}
EXPORT_KERNEL(race)
"#;

/// A machine with [`KERNELS`]; `None` where this build has none.
fn with_kernels(options: Options) -> Option<Host> {
    use std::sync::OnceLock;
    static LIBRARY: OnceLock<(tempfile::TempDir, std::path::PathBuf)> = OnceLock::new();
    if library::is_missing() {
        return None;
    }
    let (_, path) = LIBRARY.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = library::compile(folder.path(), "kernels", &[("driver_test", KERNELS)]);
        (folder, path)
    });
    Some(Host::load(path, options).unwrap())
}

#[test]
fn a_kernel_gets_every_argument_bit_for_bit() {
    let Some(mut host) = with_kernels(Options::default()) else { return };
    let driver: &mut dyn Driver = &mut host;
    let out = driver.allocate("out", 22 * 8).unwrap();
    let tensor = driver.allocate("tensor", 64 * 256).unwrap();
    let spec = TensorMapSpec { address: tensor.address, ..CORRECT };
    let map = driver.tensor_map(&spec).unwrap();
    let kernel = driver.kernel("pass_every_type").unwrap();
    let expected = vec![8, 4, 4, 4, 8, 8, 128];
    assert_eq!(driver.kernel_info(kernel).unwrap().parameter_bytes, Some(expected));
    let arguments = Arguments::new()
        .with(out.address)
        .with(-2i32)
        .with(0xfedc_ba98u32)
        .with(-1.5f32)
        .with(i64::MIN + 1)
        .with(u64::MAX - 2)
        .with(map);
    // SAFETY: the last argument's place holds a tensor map of 128 bytes.
    let encoded = unsafe { arguments.pointers()[6].cast::<[u64; 16]>().read() };
    driver.launch(&Launch::new(kernel, [1; 3], [32, 1, 1]), &arguments).unwrap();
    let mut expected =
        vec![-2i64 as u64, 0xfedc_ba98, (-1.5f32).to_bits().into(), 1 << 63 | 1, u64::MAX - 2, 0];
    expected.extend(encoded);
    assert_eq!(driver.download::<u64>(out.address, 22).unwrap(), expected);
}

#[test]
fn launches_are_checked_before_they_run_and_replayed_with_their_arguments() {
    let Some(mut host) = with_kernels(Options::default()) else { return };
    let driver: &mut dyn Driver = &mut host;
    let out = driver.upload("out", &[0f32; 100]).unwrap();
    let kernel = driver.kernel("add_one").unwrap();
    let launch = Launch::new(kernel, [2, 1, 1], [64, 1, 1]);
    let arguments = |count: i32| Arguments::new().with(out.address).with(count);

    let refused = driver.launch(&launch, &Arguments::new().with(out.address));
    assert_refused(refused, &["kernel add_one on simt", "2 parameters, 1 arguments"]);
    let refused = driver.launch(&Launch { block: [65, 1, 1], ..launch }, &arguments(100));
    assert_refused(refused, &["65 threads, the kernel allows 64"]);
    let refused = driver.launch(&launch.on(StreamId(3)), &arguments(100));
    assert_refused(refused, &["this stream is of another driver"]);

    driver.launch(&launch, &arguments(100)).unwrap();
    driver.begin_capture(StreamId::MAIN).unwrap();
    driver.launch(&launch, &arguments(50)).unwrap();
    driver.launch(&launch, &arguments(10)).unwrap();
    let graph = driver.end_capture(StreamId::MAIN).unwrap();
    for _ in 0..3 {
        driver.launch_graph(graph, StreamId::MAIN).unwrap();
    }
    let expected = [vec![7.0; 10], vec![4.0; 40], vec![1.0; 50]].concat();
    assert_eq!(driver.download::<f32>(out.address, 100).unwrap(), expected);

    driver.release(out).unwrap();
    assert_refused(driver.launch(&launch, &arguments(1)), &["argument 0 is", "in no buffer"]);
    let replayed = driver.launch_graph(graph, StreamId::MAIN);
    assert_refused(replayed, &["kernel add_one", "in no buffer"]);
}

#[test]
fn a_fault_is_the_error_of_its_launch_and_names_the_line() {
    let Some(mut host) = with_kernels(Options::default()) else { return };
    let out = (&mut host as &mut dyn Driver).upload("out", &[0f32; 64]).unwrap();
    let arguments = Arguments::new().with(out.address);
    let line = |text: &str| {
        let number = KERNELS.lines().position(|line| line.contains(text)).unwrap() + 1;
        format!("driver_test.cu:{number}")
    };

    let stop = host.kernel("stop").unwrap();
    let error = host.launch(&Launch::new(stop, [2, 1, 1], [32, 1, 1]), &arguments);
    let parts = ["kernel stop on simt", "thread 3", &line("__trap()"), "SIMT_ORDER=fifo"];
    let error = assert_refused(error, &parts);
    assert_eq!(error.exit_code(), 1);

    // The driver is as good as new: the fault was that launch's alone.
    let add_one = host.kernel("add_one").unwrap();
    let launch = Launch::new(add_one, [1; 3], [64, 1, 1]);
    host.launch(&launch, &Arguments::new().with(out.address).with(64i32)).unwrap();
    let values = (&mut host as &mut dyn Driver).download::<f32>(out.address, 64).unwrap();
    assert_eq!(values, [1.0; 64]);

    // Without race mode nobody looks; with it, both lines are named through the debug information.
    let race = host.kernel("race").unwrap();
    let launch = Launch::new(race, [1; 3], [64, 1, 1]);
    host.set_options(Options { race: true, order: Order::Random, seed: 5, ..Options::default() });
    let error = host.launch(&launch, &arguments);
    let parts = [
        "kernel race on simt",
        &line("values[i] = float(i)"),
        &line("values[i ^ 32]"),
        "SIMT_SEED=5 SIMT_RACE=1",
    ];
    let error = assert_refused(error, &parts);
    assert!(!error.to_string().contains(['\x01', '\x02']), "an address was left: {error}");
}

#[test]
fn a_library_that_is_no_machine_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nothing.so");
    let missing = Host::load(&path, Options::default()).map(|_| ());
    assert_refused(missing, &["device simt: cannot load", "nothing.so"]);
}
