"""Times isobath's kernels and their PyTorch twins on one GPU, alternately, and makes one table.

    python kernels.py --program ./isobath --out kernels.json --table kernels.md
    python kernels.py --program ./isobath --bench gemm --bench norm --rounds 5
    python kernels.py --replay kernels.json            the table again, on any machine

Each round is one process of `isobath bench NAME --json`, then the twins of its rows (twins.py) with
as many samples. As there: a sample is one launch on each of several copies of the buffers, enough
for 4 times the L2; random normals; CUDA events; medians of all samples. The GPU is kept busy until
a sample is queued, so that Python's time to launch does not count. The ratio is PyTorch's time over
isobath's: above 1 isobath is faster. Needs a GPU and torch; without, it says so and exits with 2.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

BENCHMARKS = ["gemm", "attention", "norm", "loss", "adamw", "step"]
# As in src/bench/timing.rs.
L2_SIZES, MOST_COPIES = 4, 64
WARM_UP_SAMPLES = 2
# Of the copies of one twin; the rest of the GPU's memory is others'.
MEMORY_SHARE = 0.6


class Skip(Exception):
    """What this machine lacks."""


# ------------------------------------------------------------------ joining

def key(row):
    """What makes two rows the same work."""
    parts = [row.get("op"), row.get("dtype"), row.get("sizes"), row["what"], row["shape"]]
    return json.dumps(parts, sort_keys=True)


def twin_key(row):
    """What makes the twins of two rows the same: kernels of isobath's that do the same attention
    share theirs."""
    if row.get("op", "").startswith("attention"):
        return json.dumps([row["op"], row["dtype"], row["sizes"]], sort_keys=True)
    return key(row)


def join(reports):
    """One row for each work of isobath's reports, in their order, with the times of all rounds.
    Rows that keep their samples (`sample_microseconds`) give those, others their medians."""
    joined = {}
    for report in reports:
        for row in report["rows"]:
            fields = "op", "dtype", "sizes", "what", "shape", "variant", "work"
            common = {name: row[name] for name in fields
                      if name in row}
            entry = joined.setdefault(key(row), {
                "benchmark": report["benchmark"], **common, "samples": row["samples"],
                "isobath": {"microseconds": [], "of": "medians of rounds"}, "peers": []})
            samples = row.get("sample_microseconds")
            if samples:
                entry["isobath"]["of"] = "samples"
            entry["isobath"]["microseconds"] += samples or [row["median_microseconds"]]
    return joined


def ceiling_unit(row):
    """Which ceiling a row is held against."""
    unit = row["work"]["unit"]
    return f"{unit} {row['dtype']}" if unit == "flops" and "dtype" in row else unit


# ------------------------------------------------------------------ the table

def compared(row, ceilings):
    """Medians, ratio and shares of the ceiling, of a joined row."""
    ours = statistics.median(row["isobath"]["microseconds"])
    timed = [(statistics.median(peer["microseconds"]), peer["name"])
             for peer in row["peers"] if peer.get("microseconds")]
    ceiling = ceilings.get(ceiling_unit(row), {}).get("per_second")

    def share(microseconds):
        if not ceiling:
            return None
        return row["work"]["amount"] / microseconds * 1e6 / ceiling

    best, name = min(timed, default=(None, None))
    return {
        "isobath_us": ours, "isobath_share": share(ours),
        "peer": name, "peer_us": best, "peer_share": best and share(best),
        "ratio": best and best / ours,
        "slower": sorted(timed)[1:],
        "errors": [f"{peer['name']}: {peer['error']}" for peer in row["peers"]
                   if peer.get("error")],
    }


def percent(share):
    return "" if share is None else f"{100 * share:.1f}%"


def tera(row, us):
    """Of a row's own FLOPs or bytes, in a second."""
    return "" if us is None else f"{row['work']['amount'] / us / 1e6:.4g}"


PASSES = {"attention_forward": "forward", "attention_backward": "backward", "attention": "both"}


def attention_table(record):
    """Causal attention as others print it, a line for each pass and shape: TFLOP/s of isobath's
    fastest kernels, which these are, and of every twin; nothing where none was timed."""
    found = {}
    for row in record["rows"]:
        if row.get("op") not in PASSES or row.get("dtype") != "bf16":
            continue
        line = found.setdefault((PASSES[row["op"]], row["shape"]), {"ours": [], "twins": {}})
        us = statistics.median(row["isobath"]["microseconds"])
        line["ours"].append((us, row.get("variant") or "", row))
        for peer in row["peers"]:
            if peer.get("microseconds"):
                line["twins"][peer["name"]] = statistics.median(peer["microseconds"])
    if not found:
        return []
    names = sorted({name for line in found.values() for name in line["twins"]})
    lines = ["", "Attention, TFLOP/s:", "",
             f"| pass | shape | isobath | variant | {' | '.join(names)} |" if names else
             "| pass | shape | isobath | variant |",
             "|---|---|---:|---|" + "---:|" * len(names)]
    for (name, shape), line in found.items():
        us, variant, row = min(line["ours"], key=lambda it: it[0])
        cells = [name, shape, tera(row, us), variant]
        cells += [tera(row, line["twins"].get(twin)) for twin in names]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def microseconds(value):
    return "" if value is None else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def table(record):
    """Markdown."""
    lines = [
        f"{record['device']}, driver {record['driver']}, PyTorch {record['torch']}, isobath "
        f"{record['commit'] or 'of an unknown commit'}, {record['date']}; medians of "
        f"{record['rounds']} alternating rounds.",
        "",
        "| work | shape | isobath, us | T/s | of ceiling | fastest twin | us | T/s | of ceiling "
        "| ratio |",
        "|---|---|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    # Twins' errors, and whose: rows that share their twins share these.
    slower, errors = [], {}
    for row in record["rows"]:
        it = compared(row, record["ceilings"])
        ratio = "" if it["ratio"] is None else f"{it['ratio']:.2f}"
        lines.append(
            f"| {row['what']} | {row['shape']} | {microseconds(it['isobath_us'])} "
            f"| {tera(row, it['isobath_us'])} | {percent(it['isobath_share'])} "
            f"| {it['peer'] or 'none'} | {microseconds(it['peer_us'])} "
            f"| {tera(row, it['peer_us'])} | {percent(it['peer_share'])} | {ratio} |")
        place = f"{row['what']}, {row['shape']}"
        slower += [f"- {place}: {name}, {microseconds(us)} us" for us, name in it["slower"]]
        for error in it["errors"]:
            errors.setdefault(error, []).append(place)
    errors = [f"- {places[0]}: {error}" if len(places) == 1
              else f"- {places[0]} and {len(places) - 1} more: {error}"
              for error, places in errors.items()]
    lines += attention_table(record)
    lines += ["", "The ratio is the twin's time over isobath's: above 1 isobath is faster; T/s are "
                  "10^12 FLOPs or bytes a second of the row's own count."]
    for unit, ceiling in record["ceilings"].items():
        lines.append(f"Ceiling of {unit}: {ceiling['per_second'] / 1e12:.4g} T/s, "
                     f"measured with {ceiling['what']}.")
    for title, part in ("Slower twins", slower), ("Twins that did not run", errors):
        if part:
            lines += ["", f"{title}:", "", *part]
    return "\n".join(lines) + "\n"


def load(path, as_text=table, writer="kernels.py"):
    """A record that an earlier run of `writer` wrote. Errors: SystemExit with the remedy."""
    try:
        record = json.loads(Path(path).read_text())
        as_text(record)
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        sys.exit(f"error: {path} is no record of {writer}: {type(error).__name__}: {error}\n"
                 "remedy: write one with --out on a machine with a GPU")


def merged(records):
    """Several records of one machine and commit as one."""
    first, *others = records
    for other in others:
        for what in "device", "commit", "torch", "driver":
            if other[what] != first[what]:
                sys.exit(f"error: records of different {what}s: {first[what]}, {other[what]}\n"
                         "remedy: make a table of each")
    ceilings = {}
    for record in records:
        for unit, ceiling in record["ceilings"].items():
            if unit not in ceilings or ceilings[unit]["per_second"] < ceiling["per_second"]:
                ceilings[unit] = ceiling
    return {**first, "ceilings": ceilings, "rounds": min(r["rounds"] for r in records),
            "rows": [row for record in records for row in record["rows"]],
            "reports": [report for record in records for report in record["reports"]]}


# ------------------------------------------------------------------ timing

class Stopwatch:
    """Times twins on a device; `device` "cpu" is there to try the twins without a GPU."""

    def __init__(self, torch, device):
        self.torch, self.device = torch, device
        self.l2_bytes = self.memory = 0
        if device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            self.l2_bytes, self.memory = properties.L2_cache_size, properties.total_memory

    def copies(self, twin):
        wanted = -(-L2_SIZES * self.l2_bytes // twin.bytes)
        fitting = int(MEMORY_SHARE * self.memory) // twin.bytes
        return max(1, min(wanted, fitting, MOST_COPIES))

    def time(self, twin, samples):
        """Microseconds of a launch, for each sample."""
        copies = [twin.setup() for _ in range(self.copies(twin))]
        for _ in range(WARM_UP_SAMPLES):
            start = time.perf_counter()
            for copy in copies:
                twin.launch(copy)
            queueing = time.perf_counter() - start
            self.synchronize()
        found = [self.sample(twin, copies, queueing) for _ in range(samples)]
        return found, len(copies)

    def burst(self, twin, samples, rest):
        """As src/bench/products/ times a product: a rest of so many seconds, one sample that does
        not count, and at once the others, one after another without a gap."""
        copies = [twin.setup() for _ in range(self.copies(twin))]
        start = time.perf_counter()
        for copy in copies:
            twin.launch(copy)
        queueing = time.perf_counter() - start
        self.synchronize()
        if self.device != "cuda":
            return [self.sample(twin, copies, queueing) for _ in range(samples)], len(copies)
        cuda = self.torch.cuda
        time.sleep(rest)
        events = [cuda.Event(enable_timing=True) for _ in range(samples + 1)]
        cuda._sleep(int(2e9 * min(0.05, queueing + 1e-4)))
        for event in events:
            for copy in copies:
                twin.launch(copy)
            event.record()
        cuda.synchronize()
        found = [1e3 * begin.elapsed_time(end) / len(copies)
                 for begin, end in zip(events, events[1:])]
        return found, len(copies)

    def sustained(self, twin, samples, seconds):
        """As src/bench/products/ times a product that is launched on and on: samples of so many
        seconds, after as many that do not count."""
        copies = [twin.setup() for _ in range(self.copies(twin))]
        self.sample(twin, copies, 0)
        if self.device != "cuda":
            return [self.sample(twin, copies, 0) for _ in range(samples)], len(copies)
        passes = max(1, int(1e6 * seconds / (self.sample(twin, copies, 0) * len(copies))))
        cuda = self.torch.cuda
        events = [cuda.Event(enable_timing=True) for _ in range(2 * samples)]
        for event in events:
            for _ in range(passes):
                for copy in copies:
                    twin.launch(copy)
            event.record()
        cuda.synchronize()
        counted = events[samples - 1:]
        found = [1e3 * begin.elapsed_time(end) / (passes * len(copies))
                 for begin, end in zip(counted, counted[1:])]
        return found, passes * len(copies)

    def synchronize(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def sample(self, twin, copies, queueing):
        if self.device != "cuda":
            start = time.perf_counter()
            for copy in copies:
                twin.launch(copy)
            return 1e6 * (time.perf_counter() - start) / len(copies)
        cuda = self.torch.cuda
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        # In clocks of at most 2 GHz; a step waits for its loss, so nothing can be hidden of it.
        if queueing < 0.1:
            cuda._sleep(int(2e9 * (1.5 * queueing + 1e-4)))
        begin.record()
        for copy in copies:
            twin.launch(copy)
        end.record()
        cuda.synchronize()
        return 1e3 * begin.elapsed_time(end) / len(copies)

    def release(self):
        if self.device == "cuda":
            self.torch.cuda.empty_cache()


def run_isobath(program, benchmark, device, extra):
    """The report of one process. Errors: ValueError, with what isobath said."""
    command = [str(program), "bench", benchmark, "--device", device, "--json", *extra]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              stdin=subprocess.DEVNULL)
    except OSError as error:
        raise ValueError(f"{program} does not start: {error.strerror}") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        raise ValueError(f"`{' '.join(command)}` failed with {done.returncode}: {said}")
    return json.loads(done.stdout)


def time_peers(stopwatch, time_twin, twins_module, entry, made):
    """Adds a round of the twins of a joined row; `made` keeps them for the next one. `time_twin`
    of a twin and a number of samples gives these and the launches in each."""
    name = twin_key(entry)
    if any(peer["name"] == "none" for peer in entry["peers"]):
        return
    if name not in made:
        try:
            made[name] = twins_module.twins(entry, stopwatch.device)
        except twins_module.NoTwin as why:
            made[name] = []
            entry["peers"].append({"name": "none", "error": str(why)})
        # A benchmark of isobath may be newer than the twins; its row stays, without one.
        except Exception as error:
            made[name] = []
            entry["peers"].append({"name": "none", "error": f"{type(error).__name__}: {error}"})
    for twin in made[name]:
        found = [peer for peer in entry["peers"] if peer["name"] == twin.name]
        peer = found[0] if found else {"name": twin.name, "microseconds": []}
        if not found:
            entry["peers"].append(peer)
        if peer.get("error"):
            continue
        try:
            samples, launches = time_twin(twin, entry["samples"])
            peer["microseconds"] += samples
            peer["launches_per_sample"] = launches
        # Whatever PyTorch raises (no such backend for these sizes, out of memory, a compiler that
        # is missing) belongs into the record; the other twins go on.
        except Exception as error:
            peer["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}" \
                if str(error).strip() else type(error).__name__
        stopwatch.release()


def time_ceilings(stopwatch, twins_module, rows, samples=10):
    found = {}
    units = {ceiling_unit(row) for row in rows}
    for unit, amount, twin in twins_module.ceilings(units, stopwatch.device):
        times, _ = stopwatch.time(twin, samples)
        found[unit] = {"what": twin.name, "amount": amount, "microseconds": times,
                       "per_second": amount / statistics.median(times) * 1e6}
        stopwatch.release()
    return found


def modules(device):
    """torch and twins. Errors: Skip."""
    try:
        import torch
    except ImportError as error:
        raise Skip(f"no PyTorch: {error}; name an interpreter that has it") from None
    if device == "cuda" and not torch.cuda.is_available():
        raise Skip("PyTorch finds no GPU: see nvidia-smi and torch.version.cuda")
    import twins
    return torch, twins


def driver_version():
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return "unknown"
    return done.stdout.decode().strip().splitlines()[0] if done.returncode == 0 else "unknown"


def commit_of(program):
    """From the file COMMIT beside a bundle's program, else from git here."""
    beside = Path(program).resolve().parent / "COMMIT"
    if beside.exists():
        return beside.read_text().strip()
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).resolve().parent,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return None
    return done.stdout.decode().strip() or None


def new_record(torch, device, program):
    """Where and with what; nothing is timed yet."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else "CPU (to try the twins)"
    return {
        "date": datetime.date.today().isoformat(), "device": name, "driver": driver_version(),
        "torch": torch.__version__, "cuda": torch.version.cuda,
        "python": sys.version.split()[0], "commit": commit_of(program), "rounds": 0,
        "ceilings": {}, "rows": [], "reports": [],
    }


def measure(args):
    """A record; it is written after every row, so that who runs out of time has what was timed.
    Errors: Skip, ValueError (isobath failed)."""
    device = "cpu" if args.device == "simt" else args.device
    if args.device == "simt" and not args.cpu_twins:
        raise Skip("twins are timed on a GPU, and this is simt")
    torch, twins = modules(device)
    stopwatch = Stopwatch(torch, device)
    started = time.monotonic()
    record = new_record(torch, device, args.program)
    peers, made = {}, {}
    extra = ["--samples", str(args.samples)] if args.samples else []
    late = lambda: args.seconds and time.monotonic() - started > args.seconds
    while record["rounds"] < args.rounds and not (record["rounds"] and late()):
        record["reports"] += [run_isobath(args.program, name, args.device, extra)
                              for name in args.bench]
        joined = join(record["reports"])
        for entry in joined.values():
            entry["peers"] = peers.setdefault(twin_key(entry), entry["peers"])
        record["rows"] = list(joined.values())
        write(record, args)
        if not record["ceilings"]:
            record["ceilings"] = time_ceilings(stopwatch, twins, record["rows"])
        record["rounds"] += 1
        timed = set()
        for entry in record["rows"]:
            if twin_key(entry) in timed:
                continue
            if late():
                if not entry["peers"]:
                    entry["peers"].append({"name": "none", "error": "no time was left"})
                continue
            time_peers(stopwatch, stopwatch.time, twins, entry, made)
            timed.add(twin_key(entry))
            write(record, args)
        write(record, args)
        print(f"round {record['rounds']} of {args.rounds}: {len(joined)} rows", file=sys.stderr)
    return record


def write(record, args, as_text=table):
    """Whoever is stopped meanwhile leaves what was written before."""
    for path, text in (args.out, lambda: json.dumps(record, indent=1) + "\n"), \
                      (args.table, lambda: as_text(record)):
        if path:
            fresh = path.with_name(path.name + ".new")
            fresh.write_text(text())
            fresh.replace(path)


def finish(args, replayed, measure, as_text=table):
    """Writes and prints what was measured, or with --replay what `replayed` makes of the files.

    Returns the exit status: 2 where there is nothing to measure with.
    """
    if args.replay:
        record = replayed()
    else:
        try:
            record = measure(args)
        except Skip as why:
            print(f"skipped: {why}", file=sys.stderr)
            return 2
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    write(record, args, as_text)
    print(as_text(record), end="")
    return 0


def program(text):
    """A program of this folder is found by its name with a slash alone."""
    return Path(text).resolve()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", type=program, help="the isobath to time")
    parser.add_argument("--replay", nargs="+", metavar="FILE",
                        help="make the table from records of one machine; nothing is timed")
    parser.add_argument("--bench", action="append", choices=BENCHMARKS, help="[all of them]")
    parser.add_argument("--device", choices=["cuda", "simt"], default="cuda")
    parser.add_argument("--cpu-twins", action="store_true",
                        help="with --device simt: run the twins on the CPU, to see that they work")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, help="of isobath and of the twins [isobath's own]")
    parser.add_argument("--seconds", type=float, help="no further round after so many")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record, JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table, markdown")
    args = parser.parse_args()
    if (args.program is None) == (args.replay is None):
        parser.error("give either --program or --replay")
    if args.rounds < 1 or (args.samples is not None and args.samples < 1):
        parser.error("--rounds and --samples must be positive")
    args.bench = args.bench or BENCHMARKS
    return finish(args, lambda: merged([load(path) for path in args.replay]), measure)


if __name__ == "__main__":
    sys.exit(main())
