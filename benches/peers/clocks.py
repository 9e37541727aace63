"""What nvidia-smi says of the GPU while something runs: clocks, temperature, power, and what holds
the clocks down. Without nvidia-smi there is nothing to say, and that is no error."""

import os
import statistics
import subprocess
import tempfile

# nvidia-smi's names, and ours.
FIELDS = {
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "temperature.gpu": "temperature_celsius",
    "power.draw": "power_watts",
    "clocks_throttle_reasons.active": "throttle_reasons",
}
# As NVML numbers them.
REASONS = {
    0x1: "GPU_IDLE", 0x2: "APPLICATIONS_CLOCKS_SETTING", 0x4: "SW_POWER_CAP", 0x8: "HW_SLOWDOWN",
    0x10: "SYNC_BOOST", 0x20: "SW_THERMAL_SLOWDOWN", 0x40: "HW_THERMAL_SLOWDOWN",
    0x80: "HW_POWER_BRAKE_SLOWDOWN", 0x100: "DISPLAY_CLOCK_SETTING",
}
EVERY_MS = 200


def summary(text):
    """Least, mean and most of each field of nvidia-smi's lines, and the share of the lines in which
    each reason held the clocks down; None without lines."""
    values, reasons, lines = {name: [] for name in FIELDS.values()}, {}, 0
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != len(FIELDS):
            continue
        lines += 1
        for name, part in zip(FIELDS.values(), parts):
            try:
                values[name].append(int(part, 16) if part.startswith("0x") else float(part))
            except ValueError:
                pass  # "[N/A]": the GPU does not tell
    for mask in values.pop("throttle_reasons"):
        for bit, reason in REASONS.items():
            if int(mask) & bit:
                reasons[reason] = reasons.get(reason, 0) + 1
    if not lines:
        return None
    spans = {name: {"least": min(found), "mean": statistics.mean(found), "most": max(found)}
             if found else None for name, found in values.items()}
    return {"readings": lines, **spans,
            "throttled": {reason: count / lines for reason, count in reasons.items()}}


def gpu():
    """The one that CUDA calls 0, as nvidia-smi names it: an index or a UUID."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"


class Clocks:
    """`with Clocks(wanted) as clocks: ...`, then clocks.summary()."""

    def __init__(self, wanted):
        self.wanted, self.process, self.text = wanted, None, ""

    def __enter__(self):
        if self.wanted:
            command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", f"--id={gpu()}",
                       "--format=csv,noheader,nounits", f"--loop-ms={EVERY_MS}"]
            # A file, because nobody reads while the steps run.
            self.out = tempfile.TemporaryFile("w+")
            try:
                self.process = subprocess.Popen(command, stdout=self.out,
                                                stderr=subprocess.DEVNULL)
            except OSError:
                self.process = None
        return self

    def __exit__(self, *error):
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.out.seek(0)
            self.text = self.out.read()

    def summary(self):
        return summary(self.text)
