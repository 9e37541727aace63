//! What a person sees while a run trains: a bar on a terminal, plain lines elsewhere; all on
//! stderr.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::metrics::{Evaluation, StepRecord};

/// Plain lines come at most this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Weight of the newest loss in the shown, smoothed one.
const SMOOTHING: f64 = 0.05;

pub struct Console {
    bar: Option<ProgressBar>,
    quiet: bool,
    steps: u64,
    last_line: Option<Instant>,
    smoothed: Option<f64>,
}

impl Console {
    /// A bar if stderr is a terminal.
    pub fn new() -> Self {
        Console {
            bar: std::io::stderr()
                .is_terminal()
                .then(|| ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr())),
            quiet: false,
            steps: 0,
            last_line: None,
            smoothed: None,
        }
    }

    /// Says nothing.
    pub fn quiet() -> Self {
        Console { bar: None, quiet: true, ..Console::new() }
    }

    /// A line of its own, above the bar.
    pub fn say(&self, line: impl AsRef<str>) {
        match &self.bar {
            _ if self.quiet => {}
            Some(bar) => bar.suspend(|| eprintln!("{}", line.as_ref())),
            None => eprintln!("{}", line.as_ref()),
        }
    }

    /// The loop starts after step `done` of `steps`.
    pub fn start(&mut self, done: u64, steps: u64) {
        self.steps = steps;
        if let Some(bar) = &self.bar {
            bar.set_length(steps);
            bar.set_position(done);
            bar.reset_eta();
            let template = "step {pos}/{len} [{bar:28}] {msg}, {eta} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
        }
    }

    /// After each step of `tokens`; `rate`: tokens per second of late, `None` while none counts.
    pub fn step(&mut self, record: &StepRecord, tokens: u64, rate: Option<f64>) {
        let smoothed = match self.smoothed {
            Some(loss) => loss + SMOOTHING * (record.loss - loss),
            None => record.loss,
        };
        self.smoothed = Some(smoothed);
        let speed = rate.map_or("warming up".to_string(), |rate| format!("{rate:.0} tokens/s"));
        let message = format!("loss {smoothed:.3}, {speed}");
        if let Some(bar) = &self.bar {
            bar.set_message(message);
            bar.set_position(record.step);
            return;
        }
        let due = self.last_line.is_none_or(|last| last.elapsed() >= LINE_EVERY);
        if due || record.step == self.steps {
            self.last_line = Some(Instant::now());
            let tokens_left = (self.steps - record.step) as f64 * tokens as f64;
            let left = rate.map_or(String::new(), |it| format!(", {:.0} s left", tokens_left / it));
            self.say(format!("step {}/{}: {message}{left}", record.step, self.steps));
        }
    }

    pub fn evaluation(&self, step: u64, evaluation: &Evaluation) {
        let Evaluation { val_loss, val_perplexity, val_bits_per_byte, val_tokens } = evaluation;
        self.say(format!(
            "step {step}: held-out loss {val_loss:.4}, perplexity {val_perplexity:.2}, \
             {val_bits_per_byte:.4} bits per byte ({val_tokens} tokens)"
        ));
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Default for Console {
    fn default() -> Self {
        Console::new()
    }
}
