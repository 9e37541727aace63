"""Times training steps of isobath and of PyTorch on one GPU, alternately, each with the fastest of
the same micro-batches and as many tokens in a step, and makes one table.

    python training.py --program ./isobath --preset 130m --out training.json --table training.md
    python training.py --program ./isobath --preset 1b --rows 64 --compile max-autotune
    python training.py --program ./isobath --preset 1b --micro-batch 8:4 --rounds 5
    python training.py --replay training.json          the table again, on any machine

Every measurement is one process: `isobath bench step --json`, or step.py, which compiles the model
of the very configuration that isobath reports. First the micro-batch is doubled, and every side times
each in turn, until its memory runs out, the step is one micro-batch, or half of --seconds is over;
each side's fastest one stays (--micro-batch OURS:PEER says it instead). Then the sides take turns
for --rounds rounds. A peer that fails is recorded, and PyTorch goes on without compiling. Random
tokens; CUDA events; medians of all steps. MFU is isobath's formula over the same dense peak for
all. The JSON is written after every process; it has what was tried, the versions, the clocks, and
peak memory: isobath's beside its plan, PyTorch's as max_memory_allocated.
Needs a GPU and torch; without, it says so and exits with 2.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import kernels
from kernels import Skip

HERE = Path(__file__).resolve().parent
# step.py's exit status, and what isobath says.
OUT_OF_MEMORY = 3
NO_ROOM = "the plan needs", "no memory for", "CUDA_ERROR_OUT_OF_MEMORY"
COMPILE = ["default", "max-autotune", "max-autotune-no-cudagraphs", "none"]
# Of --seconds, those in which micro-batches are tried.
SEARCH_SHARE = 0.5


class NoMemory(Exception):
    """A micro-batch that does not fit."""


# ------------------------------------------------------------------ the two sides

class Side:
    """A program, and what the record has of it."""

    def __init__(self, name, micro_batch):
        self.name = name
        self.kept = {"name": name, "micro_batch": micro_batch, "tried": [], "runs": []}

    def failed(self):
        """Micro-batches."""
        return [it["micro_batch"] for it in self.kept["tried"] if "error" in it]

    def fitting(self):
        return [it for it in self.kept["tried"] if "error" not in it]

    def settle(self):
        """The micro-batch of all rounds: the one that is said, or the fastest that was tried. `None`:
        it failed."""
        if self.kept["micro_batch"] is None and self.fitting():
            best = max(self.fitting(), key=lambda it: it["tokens_per_second"])
            self.kept["micro_batch"] = best["micro_batch"]
        micro_batch = self.kept["micro_batch"]
        return None if micro_batch in self.failed() else micro_batch


class Isobath(Side):
    def __init__(self, args, micro_batch):
        super().__init__("isobath", micro_batch)
        self.args = args
        # The last one, and its row: what the peers are to do.
        self.report = self.row = None

    def time(self, micro_batch, steps):
        """One report. Errors: NoMemory; ValueError, with what isobath said."""
        args = self.args
        sets = [*args.set, f"train.micro_batch={micro_batch}",
                f"train.grad_accumulation={args.rows // micro_batch}"]
        extra = ["--preset", args.preset, "--samples", str(steps),
                 *[part for value in sets for part in ("--set", value)]]
        try:
            report = kernels.run_isobath(args.program, "step", args.device, extra)
        except ValueError as error:
            # After the rows that were timed before.
            why = [line for line in str(error).splitlines() if any(it in line for it in NO_ROOM)]
            if why:
                raise NoMemory(why[0]) from None
            raise
        [row] = report["rows"]
        row["tokens_per_step"] = args.rows * row["sizes"]["S"]
        self.report, self.row = report, row
        return {
            "tokens_per_second": row["tokens_per_second"],
            "median_ms": row["median_microseconds"] / 1e3,
            "memory_bytes": row["memory"]["peak"] or row["memory"]["allocated"],
            "planned_bytes": row["memory"]["planned"], "clocks": row["conditions"],
            "report": report,
        }


class Peer(Side):
    """step.py, for the configuration of isobath's last report."""

    def __init__(self, args, mode, isobath, micro_batch):
        name = "PyTorch eager" if mode == "none" else f"PyTorch, compiled ({mode})"
        super().__init__(name, micro_batch)
        self.args, self.mode, self.isobath = args, mode, isobath

    def time(self, micro_batch, steps):
        """One report. Errors: NoMemory; ValueError, with what step.py said."""
        args, row = self.args, self.isobath.row
        sizes = row["sizes"]
        work = {
            "config": {"model": sizes["model"], "optimizer": sizes["optimizer"],
                       "data": {"sequence": sizes["S"]}},
            "batch": micro_batch, "sequence": sizes["S"], "dtype": row["dtype"],
            "grad_accumulation": args.rows // micro_batch,
        }
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(work, file)
            file.flush()
            device = "cpu" if args.device == "simt" else args.device
            command = [args.python, str(HERE / "step.py"), file.name, "--device", device,
                       "--compile", self.mode, "--steps", str(steps)]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True)
        if done.returncode == OUT_OF_MEMORY:
            raise NoMemory(done.stderr.strip())
        if done.returncode != 0:
            raise ValueError(f"{self.name} failed with {done.returncode}: "
                             f"{done.stderr.strip()[-2000:]}")
        report = json.loads(done.stdout)
        return {
            "tokens_per_second": report["tokens_per_second"],
            "median_ms": report["median_ms"],
            "memory_bytes": report.get("max_memory_allocated"), "planned_bytes": None,
            "clocks": report.get("clocks"), "report": report,
        }


# ------------------------------------------------------------------ measuring

def candidates(rows, first):
    """Micro-batches that a step of so many rows is made of, each twice the one before."""
    while first <= rows and rows % first == 0:
        yield first
        first *= 2


def late(args, share=1.0):
    elapsed = time.monotonic() - args.started
    return args.seconds is not None and elapsed > share * args.seconds


def mfu(tokens_per_second, row):
    """By the formula and the peak of isobath's row; None where the peak is not known."""
    if not row["percent_of_peak"]:
        return None
    per_token = row["work"]["amount"] / row["tokens_per_step"]
    peak = 100 * row["per_second"] / row["percent_of_peak"]
    return tokens_per_second * per_token / peak


def prediction(args):
    """What isobath makes of the settings: rows and tokens of a step, and its formula."""
    command = [str(args.program), "bench", "--predict", "--preset", args.preset, "--json",
               *[part for value in args.set for part in ("--set", value)]]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise ValueError(f"{args.program} does not start: {error.strerror}") from None
    if done.returncode != 0:
        raise ValueError(done.stderr.strip())
    return json.loads(done.stdout)


def peer_version(args):
    """Errors: Skip: no torch, no GPU."""
    if args.device == "simt" and not args.cpu_twins:
        raise Skip("the twin is timed on a GPU, and this is simt")
    script = "import torch; print(torch.__version__, torch.cuda.is_available())"
    try:
        done = subprocess.run([args.python, "-c", script], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True)
    except OSError as error:
        raise Skip(f"no PyTorch: {args.python}: {error.strerror}") from None
    if done.returncode != 0:
        raise Skip(f"no PyTorch: {args.python} has none; name an interpreter that has it")
    version, has_gpu = done.stdout.split()
    if args.device == "cuda" and has_gpu != "True":
        raise Skip("PyTorch finds no GPU: see nvidia-smi and torch.version.cuda")
    return version


class Race:
    """All sides, and the record."""

    def __init__(self, args, torch_version):
        self.args = args
        ours, theirs = args.micro_batch or (None, None)
        self.isobath = Isobath(args, ours)
        self.sides = [self.isobath,
                      *[Peer(args, mode, self.isobath, theirs) for mode in args.compile]]
        self.record = {
            "date": kernels.datetime.date.today().isoformat(), "driver": kernels.driver_version(),
            "torch": torch_version, "preset": args.preset, "sets": args.set, "rows": args.rows,
            "rounds": 0, "sides": [side.kept for side in self.sides],
        }

    def time(self, side, micro_batch, steps):
        """One process. `None`: it failed, and the record says how."""
        try:
            timed = side.time(micro_batch, steps)
        except NoMemory as error:
            said = str(error).splitlines()[0]
        except ValueError as error:
            said = str(error)
            # A machine without a C compiler has PyTorch all the same.
            if side is not self.isobath and not side.fitting():
                self.add_eager(side.kept["micro_batch"])
        else:
            if side is self.isobath:
                self.describe(side.report, side.row)
            print(f"{side.name}: {micro_batch} rows, {timed['tokens_per_second']:.0f} tokens/s",
                  file=sys.stderr)
            return timed
        side.kept["tried"].append({"micro_batch": micro_batch, "error": said})
        print(f"{side.name}: {micro_batch} rows: {said}", file=sys.stderr)
        return None

    def add_eager(self, micro_batch):
        eager = Peer(self.args, "none", self.isobath, micro_batch)
        if all(side.name != eager.name for side in self.sides):
            self.sides.append(eager)
            self.record["sides"].append(eager.kept)

    def describe(self, report, row):
        program = report["program"]
        self.record.update({
            "device": report["machine"]["name"], "program": program,
            "commit": program["commit"] or kernels.commit_of(self.args.program),
            "tokens_per_step": row["tokens_per_step"], "dtype": row["dtype"],
            "flops_per_step": row["work"]["amount"], "flops_formula": row["work"]["formula"],
            "peak_source": report["peak_source"], "families": row["families"],
        })

    def search(self):
        """Every side times each micro-batch, until there is no time."""
        for micro_batch in candidates(self.args.rows, self.args.first):
            if self.isobath.kept["tried"] and late(self.args, SEARCH_SHARE):
                break
            # An eager one comes in after the one that it stands for.
            for side in self.sides:
                if side.failed() or side is not self.isobath and self.isobath.row is None:
                    continue
                timed = self.time(side, micro_batch, self.args.search_steps)
                if timed:
                    kept = {name: timed[name] for name in ("tokens_per_second", "memory_bytes")}
                    side.kept["tried"].append({"micro_batch": micro_batch, **kept})
                self.write()

    def round(self):
        for side in self.sides:
            micro_batch = side.settle()
            if micro_batch is None or side is not self.isobath and self.isobath.row is None:
                continue
            timed = self.time(side, micro_batch, self.args.steps)
            if timed:
                timed["mfu"] = mfu(timed["tokens_per_second"], self.isobath.row)
                side.kept["runs"].append(timed)
            self.write()
        self.record["rounds"] += 1

    def write(self):
        """Nothing, as long as isobath has not said what it computes."""
        if self.isobath.row:
            kernels.write(self.record, self.args, table)


def measure(args):
    """A record. Errors: Skip, ValueError."""
    args.started = time.monotonic()
    torch_version = peer_version(args)
    step = prediction(args)
    args.rows = args.rows or step["micro_batch"] * step["grad_accumulation"]
    for micro_batch in args.micro_batch or ():
        if args.rows % micro_batch:
            raise ValueError(f"micro-batches of {micro_batch} make no step of {args.rows} rows")
    if not args.micro_batch and args.rows % args.first:
        raise ValueError(f"--first {args.first} does not divide {args.rows} rows")
    race = Race(args, torch_version)
    if not args.micro_batch:
        race.search()
    for round in range(args.rounds):
        if race.isobath.settle() is None or round and late(args):
            break
        race.round()
        print(f"round {round + 1} of {args.rounds}", file=sys.stderr)
    if not race.isobath.kept["runs"]:
        raise ValueError(f"isobath, {race.isobath.kept['tried'][-1]['error']}; where it does not fit, "
                         "give --first or --micro-batch a smaller number")
    return race.record


# ------------------------------------------------------------------ the table

def median(side, key):
    found = [run[key] for run in side["runs"] if run[key] is not None]
    return statistics.median(found) if found else None


def gib(value):
    return "" if value is None else f"{value / 2**30:.2f}"


def table(record):
    """Markdown."""
    ours = median(record["sides"][0], "tokens_per_second")
    lines = [
        f"{record['device']}, driver {record['driver']}, PyTorch {record['torch']}, isobath "
        f"{record['commit'] or 'of an unknown commit'}, {record['date']}; {record['preset']} in "
        f"{record['dtype']}, {record['tokens_per_step']} tokens in a step; medians of "
        f"{record['rounds']} alternating rounds.",
        "",
        "| program | micro-batch | ms | tokens/s | MFU | peak memory, GiB | planned | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for side in record["sides"]:
        speed, share = median(side, "tokens_per_second"), median(side, "mfu")
        if speed is None:
            continue
        ratio = f"{ours / speed:.2f}" if ours else ""
        lines.append(
            f"| {side['name']} | {side['micro_batch']} | {median(side, 'median_ms'):.2f} "
            f"| {speed:.0f} | {kernels.percent(share)} | {gib(median(side, 'memory_bytes'))} "
            f"| {gib(median(side, 'planned_bytes'))} | {ratio} |")
    lines += ["", "The ratio is isobath's tokens/s over the program's: above 1 isobath is faster.",
              f"MFU = tokens/s x ({record['flops_formula']}) / the dense peak"
              + (f" ({record['peak_source']})." if record["peak_source"] else "."), "",
              "| isobath's kernels, one by one | launches | ms |", "|---|---:|---:|"]
    for it in record["families"]:
        lines.append(f"| {it['family']} | {it['launches']} | {it['microseconds'] / 1e3:.2f} |")
    total = sum(it["microseconds"] for it in record["families"]) / 1e3
    lines.append(f"| together | {sum(it['launches'] for it in record['families'])} | {total:.2f} |")
    for side in record["sides"]:
        words = [f"{it['micro_batch']} rows: {it['tokens_per_second']:.0f} tokens/s"
                 if "error" not in it
                 else f"{it['micro_batch']} rows: {it['error'].splitlines()[-1]}"
                 for it in side["tried"]]
        if words:
            lines += ["", f"Tried with {side['name']}: {'; '.join(words)}."]
    return "\n".join(lines) + "\n"


def two_numbers(text):
    """OURS:PEER"""
    ours, peer = map(int, text.split(":"))
    if min(ours, peer) < 1:
        raise ValueError(text)
    return ours, peer


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", type=kernels.program, help="the isobath to time")
    parser.add_argument("--replay", metavar="FILE",
                        help="make the table from a record; nothing is timed")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has torch")
    parser.add_argument("--preset", default="130m")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rows", type=positive, help="of an optimizer step [the preset's]")
    parser.add_argument("--compile", action="append", choices=COMPILE,
                        help="torch.compile's mode; may be repeated [default]")
    parser.add_argument("--micro-batch", type=two_numbers, metavar="OURS:PEER",
                        help="rows; nothing is searched")
    parser.add_argument("--first", type=positive, default=1,
                        help="rows of the first micro-batch that is tried [1]")
    parser.add_argument("--search-steps", type=positive, default=5)
    parser.add_argument("--steps", type=positive, default=20, help="of each run of a round [20]")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--seconds", type=float,
                        help="no round is begun after so many, no micro-batch after half of them")
    parser.add_argument("--device", choices=["cuda", "simt"], default="cuda")
    parser.add_argument("--cpu-twins", action="store_true",
                        help="with --device simt: run the twin on the CPU, to see that it works")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record, JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table, markdown")
    args = parser.parse_args()
    if (args.program is None) == (args.replay is None):
        parser.error("give either --program or --replay")
    args.compile = args.compile or ["default"]
    replayed = lambda: kernels.load(args.replay, table, "training.py")
    return kernels.finish(args, replayed, measure, table)


if __name__ == "__main__":
    sys.exit(main())
