"""Times training steps of isobath and of PyTorch on one GPU, alternately, each with the micro-batch
that is fastest for it and as many tokens in a step, and makes one table.

    python training.py --program ./isobath --preset 130m --out training.json --table training.md
    python training.py --program ./isobath --preset 1b --rows 64 --compile max-autotune
    python training.py --program ./isobath --preset 1b --micro-batch 8:4 --rounds 5
    python training.py --replay training.json          the table again, on any machine

Every measurement is one process: `isobath bench step --json`, or step.py, which compiles the model
of the very configuration that isobath reports. First each side's micro-batch is doubled until
memory runs out or the step is one micro-batch; the fastest one stays (--micro-batch OURS:PEER says
it instead). Then the sides take turns for --rounds rounds. Random tokens; CUDA events; medians of
all steps. MFU is isobath's formula over the same dense peak for both. The JSON has the versions, the
clocks, and peak memory: isobath's beside its plan, PyTorch's as max_memory_allocated.
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
NO_ROOM = "the plan needs", "no memory for"
COMPILE = ["default", "max-autotune", "max-autotune-no-cudagraphs", "none"]


class NoMemory(Exception):
    """A micro-batch that does not fit."""


# ------------------------------------------------------------------ the two sides

class Isobath:
    name = "isobath"

    def __init__(self, args, samples):
        self.args, self.samples = args, samples

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
            if any(words in str(error) for words in NO_ROOM):
                raise NoMemory(str(error)) from None
            raise
        [row] = report["rows"]
        return {
            "tokens_per_second": row["tokens_per_second"],
            "median_ms": row["median_microseconds"] / 1e3,
            "memory_bytes": row["memory"]["peak"] or row["memory"]["allocated"],
            "planned_bytes": row["memory"]["planned"], "clocks": row["conditions"],
            "report": report,
        }


class Peer:
    """step.py, for a configuration of isobath's report."""

    def __init__(self, args, mode, row):
        self.args, self.mode, self.row = args, mode, row
        self.name = "PyTorch eager" if mode == "none" else f"PyTorch, compiled ({mode})"

    def time(self, micro_batch, steps):
        """One report. Errors: NoMemory; ValueError, with what step.py said."""
        args, sizes = self.args, self.row["sizes"]
        work = {
            "config": {"model": sizes["model"], "optimizer": sizes["optimizer"],
                       "data": {"sequence": sizes["S"]}},
            "batch": micro_batch, "sequence": sizes["S"], "dtype": self.row["dtype"],
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


def fastest(side, args):
    """The micro-batch with the most tokens per second, and what was tried. Errors: ValueError: not
    even the first one fits."""
    tried = []
    for micro_batch in candidates(args.rows, args.first):
        if tried and late(args):
            break
        try:
            timed = side.time(micro_batch, args.search_steps)
        except NoMemory as error:
            tried.append({"micro_batch": micro_batch, "error": str(error).splitlines()[0]})
            break
        tried.append({"micro_batch": micro_batch, "tokens_per_second": timed["tokens_per_second"],
                      "memory_bytes": timed["memory_bytes"]})
        print(f"{side.name}: {micro_batch} rows, {timed['tokens_per_second']:.0f} tokens/s",
              file=sys.stderr)
    fitting = [it for it in tried if "error" not in it]
    if not fitting:
        raise ValueError(f"{side.name}: {args.first} rows do not fit; give --first a smaller number"
                         if tried else f"--first {args.first} does not divide {args.rows} rows")
    return max(fitting, key=lambda it: it["tokens_per_second"])["micro_batch"], tried


def late(args):
    return args.seconds is not None and time.monotonic() - args.started > args.seconds


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


def measure(args):
    """A record; it is written after every round. Errors: Skip, ValueError."""
    args.started = time.monotonic()
    torch_version = peer_version(args)
    step = prediction(args)
    args.rows = args.rows or step["micro_batch"] * step["grad_accumulation"]
    ours, theirs = args.micro_batch or (None, None)
    for micro_batch in filter(None, (ours, theirs)):
        if args.rows % micro_batch:
            raise ValueError(f"micro-batches of {micro_batch} make no step of {args.rows} rows")
    sides, tried, micro_batches = [Isobath(args, args.steps)], {}, {}
    if ours is None:
        ours, tried["isobath"] = fastest(sides[0], args)
    micro_batches["isobath"] = ours
    # What the peers are to compute is what isobath says that it computed.
    first = sides[0].time(ours, args.steps)
    row = first["report"]["rows"][0]
    row["tokens_per_step"] = args.rows * row["sizes"]["S"]
    sides += [Peer(args, mode, row) for mode in args.compile]
    for side in sides[1:]:
        micro_batches[side.name] = theirs
        if theirs is None:
            micro_batches[side.name], tried[side.name] = fastest(side, args)
    program = first["report"]["program"]
    record = {
        "date": kernels.datetime.date.today().isoformat(),
        "device": first["report"]["machine"]["name"], "driver": kernels.driver_version(),
        "torch": torch_version, "program": program,
        "commit": program["commit"] or kernels.commit_of(args.program),
        "preset": args.preset, "sets": args.set, "rows": args.rows,
        "tokens_per_step": row["tokens_per_step"], "dtype": row["dtype"],
        "flops_per_step": row["work"]["amount"], "flops_formula": row["work"]["formula"],
        "peak_source": first["report"]["peak_source"], "tried": tried, "rounds": 0,
        "sides": [{"name": side.name, "micro_batch": micro_batches[side.name], "runs": []}
                  for side in sides],
        "families": row["families"],
    }
    for round in range(args.rounds):
        if round and late(args):
            break
        for side, kept in zip(sides, record["sides"]):
            timed = side.time(kept["micro_batch"], args.steps)
            timed["mfu"] = mfu(timed["tokens_per_second"], row)
            kept["runs"].append(timed)
        record["rounds"] += 1
        kernels.write(record, args, table)
        print(f"round {round + 1} of {args.rounds}", file=sys.stderr)
    return record


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
        lines.append(
            f"| {side['name']} | {side['micro_batch']} | {median(side, 'median_ms'):.2f} "
            f"| {speed:.0f} | {kernels.percent(share)} | {gib(median(side, 'memory_bytes'))} "
            f"| {gib(median(side, 'planned_bytes'))} | {ours / speed:.2f} |")
    lines += ["", "The ratio is isobath's tokens/s over the program's: above 1 isobath is faster.",
              f"MFU = tokens/s x ({record['flops_formula']}) / the dense peak"
              + (f" ({record['peak_source']})." if record["peak_source"] else "."), "",
              "| isobath's kernels, one by one | launches | ms |", "|---|---:|---:|"]
    for it in record["families"]:
        lines.append(f"| {it['family']} | {it['launches']} | {it['microseconds'] / 1e3:.2f} |")
    total = sum(it["microseconds"] for it in record["families"]) / 1e3
    lines.append(f"| together | {sum(it['launches'] for it in record['families'])} | {total:.2f} |")
    for name, tried in record["tried"].items():
        words = [f"{it['micro_batch']} rows: {it['tokens_per_second']:.0f} tokens/s"
                 if "error" not in it else f"{it['micro_batch']} rows: {it['error']}"
                 for it in tried]
        lines += ["", f"Tried with {name}: {'; '.join(words)}."]
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
    parser.add_argument("--program", type=Path, help="the isobath to time")
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
                        help="no further micro-batch is tried, nor a round begun, after so many")
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
