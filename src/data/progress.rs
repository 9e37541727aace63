//! How far the reading of files is, on stderr.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// By bytes: a bar on a terminal, a line now and then elsewhere.
pub(crate) struct Progress {
    /// Bytes done.
    pub done: AtomicU64,
    total: u64,
    what: &'static str,
    bar: Option<ProgressBar>,
    start: Instant,
    /// Milliseconds since the start at which the last line was printed; `None`: no lines.
    printed: Option<AtomicU64>,
}

impl Progress {
    const LINE_EVERY: Duration = Duration::from_secs(10);

    pub fn new(what: &'static str, total: u64, shown: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = (shown && terminal).then(|| {
            let style = ProgressStyle::with_template(
                "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} eta {eta}",
            );
            let bar = ProgressBar::new(total).with_message(what);
            match style {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        Progress {
            done: AtomicU64::new(0),
            total,
            what,
            bar,
            start: Instant::now(),
            printed: (shown && !terminal).then(AtomicU64::default),
        }
    }

    pub fn show(&self) {
        let done = self.done.load(Ordering::Relaxed);
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
        if let Some(printed) = &self.printed {
            let elapsed = self.start.elapsed();
            let last = Duration::from_millis(printed.load(Ordering::Relaxed));
            if elapsed >= last + Self::LINE_EVERY {
                printed.store(elapsed.as_millis() as u64, Ordering::Relaxed);
                let share = 100.0 * done as f64 / self.total.max(1) as f64;
                let rate = done as f64 / elapsed.as_secs_f64() / 1e6;
                let (done, total) = (done >> 20, self.total >> 20);
                eprintln!("{} {done}/{total} MiB ({share:.0} %), {rate:.1} MB/s", self.what);
            }
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
