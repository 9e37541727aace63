//! How long each launch of a training step takes: a driver in front of another one that puts an
//! event on either side of every kernel, fill and device copy.
//!
//! The step is launched kernel by kernel, because nothing lies between the kernels of a graph. A
//! time holds the launch's own latency where the device waits for the host, and no two launches
//! overlap; so the sum is more than the step takes as training runs it, and stands beside it.

use std::cell::RefCell;
use std::rc::Rc;

use serde::Serialize;

use super::timing::Timing;
use crate::cuda::{
    Allocation, Arguments, DevicePointer, Driver, EventId, GraphId, KernelId, KernelInfo, Launch,
    Properties, StreamId, TensorMap, TensorMapSpec,
};
use crate::error::Result;
use crate::predict::KernelFamily;
use crate::sensors::Sensors;

/// The share of a family of kernels in a training step.
#[derive(Serialize, Clone, PartialEq, Debug)]
pub struct FamilyShare {
    pub family: KernelFamily,
    /// Of a step.
    pub launches: usize,
    /// Of all of them, median over the steps.
    pub microseconds: f64,
}

/// What a driver launched since it was last asked.
#[derive(Clone, Default)]
pub(super) struct Launched {
    /// `None`: nothing is timed.
    timed: Rc<RefCell<Option<Vec<Timed>>>>,
    /// Events of earlier steps, to be recorded again.
    events: Rc<RefCell<Vec<EventId>>>,
}

#[derive(Clone, Copy)]
struct Timed {
    family: KernelFamily,
    begin: EventId,
    end: EventId,
}

impl Launched {
    pub fn start(&self) {
        *self.timed.borrow_mut() = Some(vec![]);
    }

    /// Launches and microseconds of each family since [`Launched::start`], which waits for them.
    pub fn finish(&self, driver: &mut dyn Driver) -> Result<Vec<(usize, f64)>> {
        let launched = self.timed.borrow_mut().take().unwrap_or_default();
        let mut found = vec![(0, 0.0); KernelFamily::NAMES.len()];
        for Timed { family, begin, end } in launched {
            let (launches, microseconds) = &mut found[family as usize];
            *launches += 1;
            *microseconds += driver.elapsed_ms(begin, end)? * 1e3;
            self.events.borrow_mut().extend([begin, end]);
        }
        Ok(found)
    }
}

/// `steps`: of each step, launches and microseconds of each family.
pub(super) fn shares(steps: &[Vec<(usize, f64)>]) -> Result<Vec<FamilyShare>> {
    let families = KernelFamily::NAMES.iter().map(|name| name.parse::<KernelFamily>());
    let share = |family: KernelFamily| {
        let of = |step: &Vec<(usize, f64)>| step[family as usize].1;
        let timing = Timing::new(steps.iter().map(of).collect(), 1);
        let launches = steps.first().map_or(0, |step| step[family as usize].0);
        FamilyShare { family, launches, microseconds: timing.median() }
    };
    families.map(|family| Ok(share(family?))).collect()
}

/// Another driver, with events around what it launches while that is timed.
pub(super) struct WithEvents {
    driver: Box<dyn Driver>,
    launched: Launched,
}

impl WithEvents {
    pub fn new(driver: Box<dyn Driver>) -> (Self, Launched) {
        let launched = Launched::default();
        (WithEvents { driver, launched: launched.clone() }, launched)
    }

    /// `op`: a kernel's name, or what a fill or copy is for.
    fn around(
        &mut self,
        op: &str,
        stream: StreamId,
        work: impl FnOnce(&mut dyn Driver) -> Result<()>,
    ) -> Result<()> {
        if self.launched.timed.borrow().is_none() {
            return work(&mut *self.driver);
        }
        let [begin, end] = [self.event()?, self.event()?];
        self.driver.record(begin, stream)?;
        work(&mut *self.driver)?;
        self.driver.record(end, stream)?;
        let timed = Timed { family: KernelFamily::of(op), begin, end };
        self.launched.timed.borrow_mut().iter_mut().for_each(|all| all.push(timed));
        Ok(())
    }

    fn event(&mut self) -> Result<EventId> {
        let used = self.launched.events.borrow_mut().pop();
        used.map_or_else(|| self.driver.new_event(), Ok)
    }
}

#[rustfmt::skip]
impl Driver for WithEvents {
    fn device(&self) -> &'static str { self.driver.device() }
    fn properties(&self) -> &Properties { self.driver.properties() }
    fn allocate(&mut self, label: &str, bytes: u64) -> Result<Allocation> {
        self.driver.allocate(label, bytes)
    }
    fn allocate_host(&mut self, label: &str, bytes: u64) -> Result<Allocation> {
        self.driver.allocate_host(label, bytes)
    }
    fn allocated_bytes(&self) -> u64 { self.driver.allocated_bytes() }
    fn release(&mut self, buffer: Allocation) -> Result<()> { self.driver.release(buffer) }
    fn process_bytes(&self) -> u64 { self.driver.process_bytes() }
    fn free_bytes(&self) -> Result<u64> { self.driver.free_bytes() }
    fn reserve_bytes(&self) -> u64 { self.driver.reserve_bytes() }
    fn peak_bytes(&self) -> Option<u64> { self.driver.peak_bytes() }
    fn own_free_bytes(&self) -> Option<u64> { self.driver.own_free_bytes() }
    fn sensors(&self) -> Option<Sensors> { self.driver.sensors() }
    fn kernel(&mut self, name: &str) -> Result<KernelId> { self.driver.kernel(name) }
    fn kernel_info(&self, kernel: KernelId) -> Result<&KernelInfo> {
        self.driver.kernel_info(kernel)
    }
    fn kernel_names(&self) -> Vec<String> { self.driver.kernel_names() }
    fn tensor_map(&mut self, spec: &TensorMapSpec) -> Result<TensorMap> {
        self.driver.tensor_map(spec)
    }
    fn overlap(&mut self, on: bool) { self.driver.overlap(on) }
    fn is_asynchronous(&self) -> bool { self.driver.is_asynchronous() }
    fn launch(&mut self, launch: &Launch, arguments: &Arguments) -> Result<()> {
        let name = self.driver.kernel_info(launch.kernel)?.name.clone();
        self.around(&name, launch.stream, |driver| driver.launch(launch, arguments))
    }
    fn to_device(&mut self, stream: StreamId, from: &[u8], to: DevicePointer) -> Result<()> {
        self.driver.to_device(stream, from, to)
    }
    fn to_host(&mut self, stream: StreamId, from: DevicePointer, to: &mut [u8]) -> Result<()> {
        self.driver.to_host(stream, from, to)
    }
    fn host_bytes(&mut self, at: DevicePointer, bytes: u64) -> Result<&mut [u8]> {
        self.driver.host_bytes(at, bytes)
    }
    fn on_device(
        &mut self, stream: StreamId, from: DevicePointer, to: DevicePointer, bytes: u64,
    ) -> Result<()> {
        self.around("copy", stream, |driver| driver.on_device(stream, from, to, bytes))
    }
    fn fill(&mut self, stream: StreamId, to: DevicePointer, bytes: u64, value: u8) -> Result<()> {
        self.around("zero", stream, |driver| driver.fill(stream, to, bytes, value))
    }
    fn new_stream(&mut self) -> Result<StreamId> { self.driver.new_stream() }
    fn new_event(&mut self) -> Result<EventId> { self.driver.new_event() }
    fn record(&mut self, event: EventId, stream: StreamId) -> Result<()> {
        self.driver.record(event, stream)
    }
    fn wait(&mut self, stream: StreamId, event: EventId) -> Result<()> {
        self.driver.wait(stream, event)
    }
    fn elapsed_ms(&mut self, from: EventId, to: EventId) -> Result<f64> {
        self.driver.elapsed_ms(from, to)
    }
    fn await_event(&mut self, event: EventId) -> Result<()> { self.driver.await_event(event) }
    fn synchronize(&mut self) -> Result<()> { self.driver.synchronize() }
    fn begin_capture(&mut self, stream: StreamId) -> Result<()> {
        self.driver.begin_capture(stream)
    }
    fn end_capture(&mut self, stream: StreamId) -> Result<GraphId> {
        self.driver.end_capture(stream)
    }
    fn launch_graph(&mut self, graph: GraphId, stream: StreamId) -> Result<()> {
        self.driver.launch_graph(graph, stream)
    }
    fn release_graph(&mut self, graph: GraphId) -> Result<()> { self.driver.release_graph(graph) }
}
