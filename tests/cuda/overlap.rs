//! Which launches are dependent, in a driver and in a training step.

use std::cell::Cell;
use std::rc::Rc;

use isobath::config::Dtype;
use isobath::cuda::host::{Host, Options};
use isobath::cuda::{
    Arguments, Cuda, Driver, KernelId, KernelInfo, Launch, Overlap, Properties, StreamId,
};

use super::counting::{Counting, Counts};
use super::driver::{hopper, kernel};
use super::machines::has_simt;
use super::replay::{assert_same, config, trained};

fn launch(stream: StreamId) -> Launch {
    Launch::new(KernelId(0), [8, 1, 1], [256, 1, 1]).on(stream)
}

#[test]
fn a_launch_is_dependent_where_machine_and_kernel_can_wait() {
    let old_code = |compiled_for| KernelInfo { compiled_for, ..kernel(None) };
    let machine = |compute_capability| Properties { compute_capability, ..hopper() };
    let dependent = |on: bool, machine: Properties, kernel: KernelInfo, second: Launch| {
        let mut overlap = Overlap::default();
        overlap.turn(on);
        overlap.launched(&launch(StreamId::MAIN));
        overlap.decide(&machine, &kernel, &second).dependent
    };
    let second = launch(StreamId::MAIN);
    assert!(dependent(true, hopper(), kernel(None), second));
    assert!(!dependent(false, hopper(), kernel(None), second));
    assert!(dependent(false, hopper(), kernel(None), second.dependent()), "as it was asked for");
    assert!(!dependent(true, hopper(), kernel(None), second.cooperative()));
    assert!(dependent(true, hopper(), kernel(None), second.cluster([2, 1, 1])));
    assert!(!dependent(true, hopper(), kernel(None), second.on(StreamId(1))), "another stream");
    // A GPU that is older, and a newer one that compiled PTX for an older one, without the wait.
    assert!(!dependent(true, machine((8, 9)), old_code((8, 0)), second));
    assert!(!dependent(true, machine((10, 0)), old_code((8, 0)), second));
    assert!(dependent(true, machine((10, 0)), old_code((9, 0)), second));
}

/// What simt ran dependent of: a kernel, what `between` does, and a kernel.
fn dependent_after(between: impl FnOnce(&mut Host, &dyn Fn(&mut Host, StreamId))) -> u64 {
    let mut host = Host::new(Options::default()).unwrap();
    host.overlap(true);
    let kernel = host.kernel("cast_to_bf16").unwrap();
    let driver: &mut dyn Driver = &mut host;
    let [from, to] = ["from", "to"].map(|label| driver.upload(label, &[0f32; 64]).unwrap());
    let arguments = Arguments::new().with(from.address).with(to.address).with(8u64);
    let run = |host: &mut Host, stream| {
        let launch = Launch::new(kernel, [1, 1, 1], [256, 1, 1]).on(stream);
        host.launch(&launch, &arguments).unwrap();
    };
    run(&mut host, StreamId::MAIN);
    between(&mut host, &run);
    run(&mut host, StreamId::MAIN);
    host.dependent_launches()
}

#[test]
fn only_what_is_directly_after_a_kernel_is_dependent() {
    if !has_simt() {
        return;
    }
    let address = |host: &mut Host| host.allocate("more", 256).unwrap().address;
    assert_eq!(dependent_after(|_, _| {}), 1);
    assert_eq!(dependent_after(|host, run| run(host, StreamId::MAIN)), 2);
    assert_eq!(dependent_after(|host, _| host.overlap(false)), 0);
    let fill = |host: &mut Host, stream: StreamId| {
        let to = address(host);
        host.fill(stream, to, 256, 1).unwrap();
    };
    assert_eq!(dependent_after(|host, _| fill(host, StreamId::MAIN)), 0);
    let elsewhere = |host: &mut Host, run: &dyn Fn(&mut Host, StreamId)| {
        let other = host.new_stream().unwrap();
        fill(host, other);
        run(host, other); // not after the kernel of the main stream, either
    };
    assert_eq!(dependent_after(elsewhere), 1);
    let copy = |host: &mut Host, _: &dyn Fn(&mut Host, StreamId)| {
        let (from, to) = (address(host), address(host));
        host.on_device(StreamId::MAIN, from, to, 256).unwrap();
    };
    assert_eq!(dependent_after(copy), 0);
    let host_copies = |host: &mut Host, run: &dyn Fn(&mut Host, StreamId)| {
        let at = address(host);
        host.to_device(StreamId::MAIN, &[0; 256], at).unwrap();
        run(host, StreamId::MAIN);
        host.to_host(StreamId::MAIN, at, &mut [0; 256]).unwrap();
    };
    assert_eq!(dependent_after(host_copies), 0);
    let events = |host: &mut Host, run: &dyn Fn(&mut Host, StreamId)| {
        let event = host.new_event().unwrap();
        host.record(event, StreamId::MAIN).unwrap();
        run(host, StreamId::MAIN);
        host.wait(StreamId::MAIN, event).unwrap();
    };
    assert_eq!(dependent_after(events), 0, "nothing overtakes an event");
    // In a graph, all but the first kernel; nothing before a graph or after it.
    let graph = |host: &mut Host, run: &dyn Fn(&mut Host, StreamId)| {
        host.begin_capture(StreamId::MAIN).unwrap();
        (0..4).for_each(|_| run(host, StreamId::MAIN));
        let graph = host.end_capture(StreamId::MAIN).unwrap();
        (0..2).for_each(|_| host.launch_graph(graph, StreamId::MAIN).unwrap());
    };
    assert_eq!(dependent_after(graph), 2 * 3);
}

/// Kernels of a step, and those of them that are dependent.
fn launches(overlap: bool, graphs: bool) -> (u64, u64) {
    let config = config(Dtype::Bf16, 1);
    let (counts, dependent) = (Counts::default(), Rc::new(Cell::new(0)));
    let counting = Counting::new(Host::new(Options::default()).unwrap());
    let driver = Counting { counts: counts.clone(), dependent: dependent.clone(), ..counting };
    let backend = Cuda::new(Box::new(driver), config.dtype, None).unwrap();
    trained(&config, 1, backend.with_graphs(graphs).with_overlap(overlap));
    let other = ["copy", "copy and wait", "fill", "graph"];
    let counts = counts.borrow();
    let kernels = counts.iter().filter(|(name, _)| !other.contains(&name.as_str()));
    (kernels.map(|(_, count)| count).sum(), dependent.get())
}

/// All kernels of a step but those after a copy or a fill.
#[test]
fn most_kernels_of_a_step_are_dependent() {
    if !has_simt() {
        return;
    }
    let (kernels, dependent) = launches(true, false);
    println!("{dependent} of {kernels} kernels of a step are dependent");
    assert!(dependent < kernels && dependent * 10 >= kernels * 9, "{dependent} of {kernels}");
    assert_eq!(launches(true, true).1, dependent, "replayed");
    assert_eq!(launches(false, false), (kernels, 0));
}

#[test]
fn overlap_changes_no_bit() {
    if !has_simt() {
        return;
    }
    let config = config(Dtype::Bf16, 2);
    let on = |overlap: bool| {
        let host = Box::new(Host::new(Options::default()).unwrap());
        Cuda::new(host, config.dtype, None).unwrap().with_overlap(overlap)
    };
    assert_same("overlap", &trained(&config, 3, on(true)), &trained(&config, 3, on(false)));
}
