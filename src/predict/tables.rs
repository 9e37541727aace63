//! A prediction as the tables that people read.

use std::fmt;

use super::{Estimate, FusionTime, Kernel, Prediction};

impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Prediction { name, machine, dtype, micro_batch, sequence, .. } = self;
        writeln!(
            f,
            "{name} in {dtype}: the least that a training step of {} x {micro_batch} x {sequence} \
             tokens takes on one {machine}, and what is \
             expected; predicted, not measured\n",
            self.grad_accumulation
        )?;
        let width = |text: fn(&Kernel) -> &str| {
            self.kernels.iter().map(|kernel| text(kernel).len()).max().unwrap_or(0)
        };
        let (what, shape) = (width(|it| &it.cost.what), width(|it| &it.shape));
        write!(
            f,
            "{:<what$}  {:<shape$} {:>8} {:>9} {:>9}",
            "kernel", "shape", "launches", "MB", "GFLOP"
        )?;
        for (name, _) in self.estimates.iter() {
            write!(f, " {:>12}", format!("us, {name}"))?;
        }
        writeln!(f, " {:>7}  bound by", "share")?;
        for kernel in &self.kernels {
            write!(
                f,
                "{:<what$}  {:<shape$} {:>8} {:>9.2} {:>9.2}",
                kernel.cost.what,
                kernel.shape,
                kernel.launches,
                kernel.cost.bytes as f64 / 1e6,
                kernel.cost.flops as f64 / 1e9
            )?;
            for (_, microseconds) in kernel.microseconds.iter() {
                write!(f, " {microseconds:>12.2}")?;
            }
            let share =
                100.0 * kernel.milliseconds().datasheet / self.estimates.datasheet.milliseconds;
            writeln!(f, " {share:>5.1} %  {}", kernel.bound)?;
        }
        writeln!(
            f,
            "\nMB, GFLOP and us of one launch; a step moves {:.2} GB and multiplies for {:.2} \
             TFLOP",
            self.bytes as f64 / 1e9,
            self.flops as f64 / 1e12
        )?;
        writeln!(f)?;
        self.write_estimates(f)?;
        writeln!(f)?;
        self.write_fusions(f)
    }
}

impl Prediction {
    fn write_fusions(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<24} {:>8} {:>9}", "a step without", "launches", "GB")?;
        for (name, _) in self.estimates.iter() {
            write!(f, " {:>13}", format!("ms, {name}"))?;
        }
        let (tightest, Estimate { milliseconds: whole, .. }) = self.estimates.tightest();
        writeln!(f, "  of {} ms, {tightest}", whole.round())?;
        for FusionTime { fusion, more_launches, more_bytes, more_milliseconds } in &self.fusions {
            let more = format!("+{:.2}", *more_bytes as f64 / 1e9);
            write!(f, "{fusion:<24} {:>8} {more:>9}", format!("+{more_launches}"))?;
            for (_, milliseconds) in more_milliseconds.iter() {
                write!(f, " {:>13}", format!("+{milliseconds:.3}"))?;
            }
            let share = 100.0 * more_milliseconds.tightest().1 / whole;
            writeln!(f, " {:>7} %", format!("+{share:.1}"))?;
        }
        Ok(())
    }

    /// What takes how long, in a table without the single kernels.
    pub(super) fn write_families(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<10} {:>8} {:>9} {:>9}", "kernels", "launches", "GB", "TFLOP")?;
        for (name, _) in self.estimates.iter() {
            write!(f, " {:>13}", format!("ms, {name}"))?;
        }
        writeln!(f, " {:>7}", "share")?;
        for it in &self.families {
            write!(
                f,
                "{:<10} {:>8} {:>9.2} {:>9.2}",
                it.family,
                it.launches,
                it.bytes as f64 / 1e9,
                it.flops as f64 / 1e12
            )?;
            for (_, milliseconds) in it.milliseconds.iter() {
                write!(f, " {milliseconds:>13.2}")?;
            }
            let share = 100.0 * it.milliseconds.datasheet / self.estimates.datasheet.milliseconds;
            writeln!(f, " {share:>5.1} %")?;
        }
        Ok(())
    }

    /// A step's time by each way to estimate it, what follows from it, and where that comes from.
    pub(super) fn write_estimates(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<10} {:>10} {:>14} {:>8}", "estimate", "ms a step", "tokens/s", "MFU")?;
        for (name, estimate) in self.estimates.iter() {
            writeln!(
                f,
                "{name:<10} {:>10.2} {:>14.0} {:>6.1} %",
                estimate.milliseconds,
                estimate.tokens_per_second,
                100.0 * estimate.mfu
            )?;
        }
        writeln!(
            f,
            "MFU = ({}) * tokens/s / {:.1}e12",
            self.flops_formula,
            self.estimates.datasheet.flops_per_second / 1e12
        )?;
        self.estimates.iter().try_for_each(|(name, it)| writeln!(f, "{name}: {}", it.source))
    }
}
