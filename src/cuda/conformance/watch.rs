//! A clock beside the cases: nobody can take a kernel off a GPU that does not end.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::{Case, Golden, Goldens, Report};

/// Waits, on a thread of its own, for a case that takes too long.
pub struct Watch(Arc<Mutex<Option<UnderWay>>>);

struct UnderWay {
    since: Instant,
    case: Case,
    /// Whose output it is compared with.
    source: String,
    goldens: Goldens,
    report: Report,
}

impl Watch {
    /// `hung`: called once, on the watch's thread, with what is known when a case has taken more
    /// than `limit`. Its failure is in the report.
    pub fn start(limit: Duration, hung: impl FnOnce(&Goldens, &Report) + Send + 'static) -> Self {
        let watch = Watch(Arc::default());
        let seen = Watch(Arc::clone(&watch.0));
        thread::spawn(move || {
            while Arc::strong_count(&seen.0) > 1 {
                thread::sleep(limit / 50);
                let late = seen.under_way().take_if(|it| it.since.elapsed() > limit);
                let Some(UnderWay { case, source, goldens, mut report, .. }) = late else {
                    continue;
                };
                report.hangs(&case, limit, &source);
                return hung(&goldens, &report);
            }
        });
        watch
    }

    /// The next case; see [`Progress`](super::Progress).
    pub fn begins(&self, case: &Case, golden: &Golden, goldens: &Goldens, report: &Report) {
        *self.under_way() = Some(UnderWay {
            since: Instant::now(),
            case: case.clone(),
            source: golden.source.clone(),
            goldens: goldens.clone(),
            report: report.clone(),
        });
    }

    /// No case is under way any more.
    pub fn ends(&self) {
        *self.under_way() = None;
    }

    fn under_way(&self) -> MutexGuard<'_, Option<UnderWay>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
