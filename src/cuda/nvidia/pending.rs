//! Which launches an error that comes late may be due to.

use crate::cuda::driver::{KernelId, StreamId};

/// How many launches an error names.
const NAMED: usize = 8;
/// How many are kept: several micro-batches of a deep model; after them the same kernels come
/// again.
const KEPT: usize = 1 << 14;

/// Kernels that were launched and not seen to end.
#[derive(Default)]
pub struct Pending {
    /// In the order of their launches.
    launches: Vec<(KernelId, StreamId)>,
    /// Launches so far, those that are no longer pending among them.
    count: u64,
}

impl Pending {
    pub fn launched(&mut self, kernel: KernelId, stream: StreamId) {
        self.launches.push((kernel, stream));
        self.count += 1;
        if self.launches.len() > 2 * KEPT {
            self.launches.drain(..self.launches.len() - KEPT);
        }
    }

    /// Launches so far: what [`Pending::finished_before`] takes.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// A stream was waited for, and nothing was wrong: what ran on it is above suspicion.
    pub fn finished(&mut self, stream: StreamId) {
        self.finished_before(stream, self.count);
    }

    /// The same for what was among the first `count` launches.
    pub fn finished_before(&mut self, stream: StreamId, count: u64) {
        // Some that had finished may be missing among the pending ones: then fewer are acquitted.
        let behind = (self.count - count) as usize;
        let acquitted = self.launches.len().saturating_sub(behind);
        let mut place = 0;
        self.launches.retain(|&(_, on)| {
            place += 1;
            on != stream || place > acquitted
        });
    }

    /// All streams were waited for.
    pub fn all_finished(&mut self) {
        self.launches.clear();
    }

    pub fn is_empty(&self) -> bool {
        self.launches.is_empty()
    }

    pub fn latest_first(&self) -> impl Iterator<Item = KernelId> {
        self.launches.iter().rev().map(|&(kernel, _)| kernel)
    }
}

/// Whom an error that came late may be due to, of all that were launched since the last wait, the
/// latest first: the distinct names, as many as an error shows, and what it says of them.
pub fn suspects<'a>(latest_first: impl Iterator<Item = &'a str>) -> (String, String) {
    let mut names: Vec<&str> = vec![];
    for name in latest_first {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let hint = match names.len() {
        0 | 1 => String::new(),
        all if all <= NAMED => "; one of these, the latest first".to_string(),
        all => {
            format!("; one of these, the latest first, or of {} before them", all - NAMED)
        }
    };
    names.truncate(NAMED);
    (names.join(", "), hint)
}
