//! A driver between a test and simt: it counts what runs, notes what takes the machine's memory,
//! can leave kernels out, can fail as a GPU does, and can watch that streams wait for each other.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use isobath::cuda::host::Host;
use isobath::cuda::{
    Allocation, Arguments, DevicePointer, Driver, EventId, GraphId, KernelId, KernelInfo, Launch,
    Properties, StreamId, TensorMap, TensorMapSpec,
};
use isobath::{Error, Result};

use super::order::Order;

/// What a driver was asked to run or to record: kernels by name, "copy", "copy and wait" (from or
/// to the program's own memory), "fill" and "graph".
pub type Counts = Rc<RefCell<BTreeMap<String, u64>>>;

/// What takes memory of a machine.
#[derive(Clone, PartialEq, Debug)]
pub enum Taken {
    Buffer {
        label: String,
        bytes: u64,
    },
    Graph,
    /// A kernel's code.
    Kernel(String),
    Event,
    Stream,
}

/// "launch", "event", "elapsed" and "synchronize", in their order.
pub type Calls = Rc<RefCell<Vec<&'static str>>>;

/// Sees, and may change, what comes to the host.
pub type OnItsWay = Box<dyn FnMut(&mut [u8])>;

/// In the order in which it was taken.
pub type TakenSoFar = Rc<RefCell<Vec<Taken>>>;

/// simt, and a count of what it runs.
pub struct Counting {
    pub host: Host,
    pub counts: Counts,
    pub taken: TakenSoFar,
    pub calls: Calls,
    /// Kernels whose names begin so are not in this build.
    pub lacks: Option<&'static str>,
    /// What the machine says of itself.
    pub device: &'static str,
    pub properties: Properties,
    /// This kernel faults; from then on nothing can be asked of the machine.
    pub faults: Option<String>,
    pub gone: bool,
    /// So many bytes are free, of which the driver takes so many for itself.
    pub memory: Option<[u64; 2]>,
    pub on_its_way: Option<OnItsWay>,
    pub order: Option<Rc<RefCell<Order>>>,
    /// Launches that ran dependent, replayed ones included.
    pub dependent: Rc<Cell<u64>>,
    /// All that is counted takes one millisecond; else the times are the host's.
    pub one_ms_each: bool,
    /// What was counted before each event.
    pub recorded: BTreeMap<u32, u64>,
}

impl Counting {
    pub fn new(host: Host) -> Self {
        let (device, properties) = (host.device(), host.properties().clone());
        let (counts, taken) = (Counts::default(), TakenSoFar::default());
        Counting {
            host,
            counts,
            taken,
            calls: Calls::default(),
            lacks: None,
            device,
            properties,
            faults: None,
            gone: false,
            memory: None,
            on_its_way: None,
            order: None,
            dependent: Rc::default(),
            one_ms_each: false,
            recorded: BTreeMap::new(),
        }
    }

    fn call(&self, what: &'static str) {
        self.calls.borrow_mut().push(what);
    }

    fn take(&self, what: Taken) {
        self.taken.borrow_mut().push(what);
    }

    fn is_there(&self) -> Result<()> {
        match self.gone {
            false => Ok(()),
            true => Err(Error::Device {
                device: self.device.to_string(),
                what: "an illegal memory access was encountered".to_string(),
                remedy: "start the program again".to_string(),
            }),
        }
    }

    fn count(&self, name: &str) {
        *self.counts.borrow_mut().entry(name.to_string()).or_default() += 1;
    }

    fn watch(&self, happens: impl FnOnce(&mut Order)) {
        if let Some(order) = &self.order {
            happens(&mut order.borrow_mut());
        }
    }
}

#[rustfmt::skip]
impl Driver for Counting {
    fn device(&self) -> &'static str { self.device }
    fn properties(&self) -> &Properties { &self.properties }
    fn allocate(&mut self, label: &str, bytes: u64) -> Result<Allocation> {
        self.is_there()?;
        self.take(Taken::Buffer { label: label.to_string(), bytes });
        let buffer = self.host.allocate(label, bytes)?;
        self.watch(|order| order.allocated(buffer));
        Ok(buffer)
    }
    fn allocate_host(&mut self, label: &str, bytes: u64) -> Result<Allocation> {
        self.take(Taken::Buffer { label: label.to_string(), bytes });
        let buffer = self.host.allocate_host(label, bytes)?;
        self.watch(|order| order.allocated(buffer));
        Ok(buffer)
    }
    fn allocated_bytes(&self) -> u64 { self.host.allocated_bytes() }
    fn release(&mut self, buffer: Allocation) -> Result<()> { self.host.release(buffer) }
    fn free_bytes(&self) -> Result<u64> {
        self.memory.map_or_else(|| self.host.free_bytes(), |[free, _]| Ok(free))
    }
    fn reserve_bytes(&self) -> u64 { self.memory.map_or(0, |[_, reserve]| reserve) }
    fn kernel(&mut self, name: &str) -> Result<KernelId> {
        self.take(Taken::Kernel(name.to_string()));
        match self.lacks {
            Some(prefix) if name.starts_with(prefix) => self.host.kernel(&format!("no_{name}")),
            _ => self.host.kernel(name),
        }
    }
    fn process_bytes(&self) -> u64 { self.host.process_bytes() }
    fn kernel_info(&self, kernel: KernelId) -> Result<&KernelInfo> { self.host.kernel_info(kernel) }
    fn kernel_names(&self) -> Vec<String> { self.host.kernel_names() }
    fn tensor_map(&mut self, spec: &TensorMapSpec) -> Result<TensorMap> {
        self.host.tensor_map(spec)
    }
    fn overlap(&mut self, on: bool) { self.host.overlap(on) }
    fn launch(&mut self, launch: &Launch, arguments: &Arguments) -> Result<()> {
        let name = self.kernel_info(launch.kernel)?.name.clone();
        self.count(&name);
        self.call("launch");
        self.gone |= self.faults == Some(name);
        self.watch(|order| order.launched(launch.stream, arguments));
        let launched = self.host.launch(launch, arguments);
        self.dependent.set(self.host.dependent_launches());
        launched
    }
    fn to_device(&mut self, stream: StreamId, from: &[u8], to: DevicePointer) -> Result<()> {
        self.count("copy and wait");
        self.watch(|order| order.copied(stream, None, Some(to), from.len() as u64, true));
        self.host.to_device(stream, from, to)
    }
    fn to_host(&mut self, stream: StreamId, from: DevicePointer, to: &mut [u8]) -> Result<()> {
        self.count("copy and wait");
        self.watch(|order| order.copied(stream, Some(from), None, to.len() as u64, true));
        self.host.to_host(stream, from, to)?;
        self.on_its_way.iter_mut().for_each(|changes| changes(to));
        Ok(())
    }
    fn host_bytes(&mut self, at: DevicePointer, bytes: u64) -> Result<&mut [u8]> {
        self.watch(|order| order.touched_by_host(at, bytes));
        self.host.host_bytes(at, bytes)
    }
    fn on_device(
        &mut self, stream: StreamId, from: DevicePointer, to: DevicePointer, bytes: u64,
    ) -> Result<()> {
        self.count("copy");
        self.watch(|order| order.copied(stream, Some(from), Some(to), bytes, false));
        self.host.on_device(stream, from, to, bytes)
    }
    fn fill(&mut self, stream: StreamId, to: DevicePointer, bytes: u64, value: u8) -> Result<()> {
        self.count("fill");
        self.watch(|order| order.copied(stream, None, Some(to), bytes, false));
        self.host.fill(stream, to, bytes, value)
    }
    fn new_stream(&mut self) -> Result<StreamId> {
        self.take(Taken::Stream);
        self.host.new_stream()
    }
    fn new_event(&mut self) -> Result<EventId> {
        self.take(Taken::Event);
        self.host.new_event()
    }
    fn record(&mut self, event: EventId, stream: StreamId) -> Result<()> {
        self.call("event");
        self.watch(|order| order.recorded(event, stream));
        self.recorded.insert(event.0, self.counts.borrow().values().sum());
        self.host.record(event, stream)
    }
    fn wait(&mut self, stream: StreamId, event: EventId) -> Result<()> {
        self.watch(|order| order.waited(stream, event));
        self.host.wait(stream, event)
    }
    fn elapsed_ms(&mut self, from: EventId, to: EventId) -> Result<f64> {
        self.call("elapsed");
        match self.one_ms_each {
            true => Ok(self.recorded[&to.0] as f64 - self.recorded[&from.0] as f64),
            false => self.host.elapsed_ms(from, to),
        }
    }
    fn await_event(&mut self, event: EventId) -> Result<()> {
        self.watch(|order| order.awaited(event));
        self.host.await_event(event)
    }
    fn synchronize(&mut self) -> Result<()> {
        self.call("synchronize");
        self.is_there()?;
        self.host.synchronize()
    }
    fn begin_capture(&mut self, stream: StreamId) -> Result<()> { self.host.begin_capture(stream) }
    fn end_capture(&mut self, stream: StreamId) -> Result<GraphId> {
        self.take(Taken::Graph);
        self.host.end_capture(stream)
    }
    fn launch_graph(&mut self, graph: GraphId, stream: StreamId) -> Result<()> {
        self.count("graph");
        let launched = self.host.launch_graph(graph, stream);
        self.dependent.set(self.host.dependent_launches());
        launched
    }
    fn release_graph(&mut self, graph: GraphId) -> Result<()> { self.host.release_graph(graph) }
}
