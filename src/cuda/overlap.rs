//! Which launches may begin while the previous kernel still runs ("programmatic dependent launch").
//! The one place that decides it, for both machines.
//!
//! A dependent launch begins when every block of the previous kernel has begun: it sets itself up
//! beside the last of them, and each of its threads waits (begin_after_previous in
//! kernels/isobath.cuh) until that kernel has ended. Every kernel of a build has this wait, but for
//! those of conformance*.cu, which run on drivers that [`Driver::overlap`] was not called on; the
//! machine code is tested for it (tests/build.rs), and simt checks it in every launch.
//!
//! Only a kernel that is directly after another one on its stream is dependent. After a copy, a
//! fill, an event, a wait for one, a graph, and at the beginning of a graph, a launch waits for
//! everything before it, as it always did; so none can overtake an event. Cooperative launches are
//! ordinary, and so is what comes after them: NVIDIA's documentation says of neither that they
//! may be part of such a pair.
//!
//! [`Driver::overlap`]: super::Driver::overlap

use super::driver::{KernelInfo, Launch, Properties, StreamId};

/// The first with the instructions for it.
const COMPUTE_CAPABILITY: (u32, u32) = (9, 0);

/// What was enqueued last on each stream of a driver, as far as it matters here.
#[derive(Default, Debug)]
pub struct Overlap {
    on: bool,
    /// Streams on which a kernel was enqueued last that another one may be dependent on.
    after_kernel: Vec<StreamId>,
}

impl Overlap {
    pub fn turn(&mut self, on: bool) {
        self.on = on;
    }

    /// The launch as it is to be enqueued.
    pub fn decide(&self, machine: &Properties, kernel: &KernelInfo, launch: &Launch) -> Launch {
        let able = machine.compute_capability.min(kernel.compiled_for) >= COMPUTE_CAPABILITY;
        let after_kernel = self.after_kernel.contains(&launch.stream);
        let allowed = self.on && able && after_kernel && !launch.cooperative;
        Launch { dependent: launch.dependent || allowed, ..*launch }
    }

    /// It was enqueued.
    pub fn launched(&mut self, launch: &Launch) {
        self.interrupted(launch.stream);
        if !launch.cooperative {
            self.after_kernel.push(launch.stream);
        }
    }

    /// Something else was enqueued on the stream, or its capture began or ended.
    pub fn interrupted(&mut self, stream: StreamId) {
        self.after_kernel.retain(|other| *other != stream);
    }
}
