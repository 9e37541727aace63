"""Times every matrix product of the paper's models on one GPU, isobath's and PyTorch's (cuBLAS)
alternately, and makes one table with geometric means.

    python products.py --program ./isobath --out products.json --table products.md
    python products.py --program ./isobath --preset 1b --seconds 120 --choices tuned.toml
    python products.py --program ./isobath --product tn:768,768,16384
    python products.py --replay products.json          the table again, on any machine

The products are those of `isobath bench gemm --predict`, each once, the largest share of a training
step first. `isobath bench gemm --stdin` stays open; in each round a product is timed by it, then as
its twins (twins.py): random normals, L2 cold, bursts of as many samples, each after a rest, CUDA
events; medians over all rounds. After the rounds each product is timed sustained, by both sides in
turn: launched on and on, so that the GPU lowers its clock to the power that it may draw; the first
half does not count. What the twins compute:

- NT, NN: torch.mm into the operands' type: the same.
- TN: isobath adds the product of bf16 factors to an f32 matrix. "addmm into f32" is the same
  (`out_dtype`, from PyTorch 2.8 on). "addmm into bf16" adds to a bf16 matrix: fewer bytes, one more
  rounding. "matmul, add to f32" is a product into bf16 and a second kernel that adds it.

PyTorch's own settings stay: cuBLAS may add partial sums in bf16
(allow_bf16_reduced_precision_reduction). Needs a GPU and torch; without, it says so and exits with 2.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import kernels

# Seconds, as in src/bench/products/.
REST = 0.05
SLOT, SLOTS = 0.02, 5
# Of all seconds, those after which no further round of bursts begins or goes on.
BURST_SHARE = 0.65
LAYOUTS = ["nt", "nn", "tn"]
# Who is stopped loses no more than this.
WRITE_SECONDS = 5.0


class Isobath:
    """`isobath bench gemm --stdin`, kept open. Errors: ValueError, with what it said."""

    def __init__(self, program, device, extra=()):
        command = [str(program), "bench", "gemm", "--stdin", "--device", device, *extra]
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=subprocess.PIPE, text=True)
        except OSError as error:
            raise ValueError(f"{program} does not start: {error.strerror}") from None

    def time(self, layout, sizes, how=""):
        """A row of isobath's report; `how`: of a burst, or "sustained"."""
        try:
            self.process.stdin.write(f"{layout} {','.join(map(str, sizes))} {how}\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            said = self.process.stderr.read().strip()
            raise ValueError(f"isobath ended with {self.process.wait()}: {said}")
        return json.loads(answer)

    def close(self):
        # Nothing is in the pipe that could not be written.
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


def products(program, presets):
    """(layout, (M, N, K)), the largest share of a training step first. Errors: ValueError."""
    command = [str(program), "bench", "gemm", "--predict", "--json"]
    for preset in presets:
        command += ["--preset", preset]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise ValueError(f"{program} does not start: {error.strerror}") from None
    if done.returncode != 0:
        raise ValueError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    shares = {}
    for row in json.loads(done.stdout)["products"]:
        product = row["layout"], (row["m"], row["n"], row["k"])
        shares[product] = max(shares.get(product, 0), row["step_share"])
    return sorted(shares, key=shares.get, reverse=True)


def one_product(text):
    """tn:768,768,16384"""
    layout, _, sizes = text.partition(":")
    sizes = tuple(int(size) for size in sizes.split(","))
    if layout not in LAYOUTS or len(sizes) != 3:
        raise ValueError
    return layout, sizes


# ------------------------------------------------------------------ means

def geometric_mean(values):
    return math.exp(statistics.fmean(map(math.log, values)))


def medians(times):
    """Of isobath, and of each twin that was timed by its name."""
    ours = statistics.median(times["isobath"]["microseconds"])
    return ours, {peer["name"]: statistics.median(peer["microseconds"])
                  for peer in times["peers"] if peer.get("microseconds")}


def means(rows):
    """Geometric means of twins' times over isobath's: rows of (layout, twin, products, ratio);
    for each layout and for all the fastest twin, for each layout every twin by name. `rows`: joined
    ones, and the time of each in its burst or sustained."""
    ratios = {}
    for row, times in rows:
        layout = row["op"][-2:]
        ours, twins = medians(times)
        timed = {name: us / ours for name, us in twins.items()}
        if not timed:
            continue
        for place in layout, "all":
            ratios.setdefault((place, "the fastest"), []).append(min(timed.values()))
        for name, ratio in timed.items():
            ratios.setdefault((layout, name), []).append(ratio)
    places = [*LAYOUTS, "all"]
    ordered = sorted(ratios, key=lambda it: (places.index(it[0]), it[1] != "the fastest"))
    return [(layout, name, len(ratios[layout, name]), geometric_mean(ratios[layout, name]))
            for layout, name in ordered]


def table(record):
    """Markdown: the rows, burst beside sustained, and the means below them."""
    rows = record["rows"]
    lines = [*speeds(record)]
    kinds = {"In a burst": lambda row: row, "Sustained": lambda row: row.get("sustained")}
    for title, of in kinds.items():
        found = means([(row, of(row)) for row in rows if of(row)])
        if found:
            lines += ["", f"{title}:", "",
                      "| layout | twin | products | geometric mean of the ratio |",
                      "|---|---|---:|---:|"]
            lines += [f"| {layout} | {name} | {count} | {ratio:.3f} |"
                      for layout, name, count, ratio in found]
    missing = record.get("not_reached", [])
    if missing:
        lines += ["", f"No time was left for {len(missing)} products, the first of them "
                      f"{missing[0][0]} {missing[0][1]}."]
    return kernels.table(record) + "\n".join(lines) + "\n"


def speeds(record):
    """TFLOP/s, share of the datasheet's dense peak, and the fastest twin's time over isobath's:
    in a burst and sustained."""
    peak = record.get("peak")

    def cells(row, times):
        if not times:
            return ["", "", ""]
        ours, twins = medians(times)
        per_second = row["work"]["amount"] / ours * 1e6
        ratio = f"{min(twins.values()) / ours:.2f}" if twins else ""
        share = f"{100 * per_second / peak:.1f}%" if peak else ""
        return [f"{per_second / 1e12:.4g}", share, ratio]

    lines = ["", "| product | shape | burst, TFLOP/s | of peak | ratio | sustained, TFLOP/s "
                 "| of peak | ratio |", "|---|---|---:|---:|---:|---:|---:|---:|"]
    for row in record["rows"]:
        both = [*cells(row, row), *cells(row, row.get("sustained"))]
        lines.append(f"| {row['what']} | {row['shape']} | {' | '.join(both)} |")
    if peak:
        lines += ["", f"The peak is the datasheet's, {peak / 1e12:.1f} TFLOP/s."]
    return lines


# ------------------------------------------------------------------ timing

def measure(args):
    """A record, written every few seconds. Errors: kernels.Skip, ValueError (isobath failed)."""
    device = "cpu" if args.device == "simt" else args.device
    if args.device == "simt" and not args.cpu_twins:
        raise kernels.Skip("twins are timed on a GPU, and this is simt")
    torch, twins = kernels.modules(device)
    started = written = time.monotonic()
    late = lambda share=BURST_SHARE: \
        args.seconds and time.monotonic() - started > share * args.seconds
    wanted = args.product or products(args.program, args.preset)
    stopwatch = kernels.Stopwatch(torch, device)
    record = kernels.new_record(torch, device, args.program)
    record["reports"] = [{"benchmark": "gemm", "rows": []}]
    rows, peers, made = record["reports"][0]["rows"], {}, {}
    extra = ["--samples", str(args.samples)] if args.samples else []
    extra += ["--choices", str(args.choices)] if args.choices else []
    burst = lambda twin, samples: stopwatch.burst(twin, samples, REST)
    isobath = Isobath(args.program, args.device, extra)
    try:
        while record["rounds"] < args.rounds and not (record["rounds"] and late()):
            for index, (layout, sizes) in enumerate(wanted):
                if late():
                    if record["rounds"] == 0:
                        record["not_reached"] = wanted[index:]
                    break
                row = isobath.time(layout, sizes)
                rows.append(row)
                if row.get("percent_of_peak"):
                    record["peak"] = 100 * row["per_second"] / row["percent_of_peak"]
                joined = kernels.join(record["reports"])
                for name, entry in joined.items():
                    entry["peers"] = peers.setdefault(name, entry["peers"])
                record["rows"] = list(joined.values())
                if not record["ceilings"]:
                    record["ceilings"] = kernels.time_ceilings(stopwatch, twins, record["rows"])
                kernels.time_peers(stopwatch, burst, twins, joined[kernels.key(row)], made)
                if time.monotonic() - written > WRITE_SECONDS:
                    kernels.write(record, args, table)
                    written = time.monotonic()
            record["rounds"] += 1
            print(f"round {record['rounds']} of {args.rounds}: {len(record['rows'])} of "
                  f"{len(wanted)} products", file=sys.stderr)
        sustained = lambda twin, _: stopwatch.sustained(twin, args.samples or SLOTS, SLOT)
        reached = 0
        for entry in record["rows"]:
            if late(1.0):
                break
            sizes = [entry["sizes"][side] for side in "MNK"]
            row = isobath.time(entry["op"][-2:], sizes, "sustained")
            # With peers of their own, so that what failed in a burst fails here by itself.
            times = {**entry, "peers": [], "isobath": {
                "microseconds": [row["median_microseconds"]], "of": "the median"}}
            kernels.time_peers(stopwatch, sustained, twins, times, made)
            entry["sustained"] = {name: times[name] for name in ("isobath", "peers")}
            reached += 1
            if time.monotonic() - written > WRITE_SECONDS:
                kernels.write(record, args, table)
                written = time.monotonic()
        print(f"sustained: {reached} of {len(wanted)} products", file=sys.stderr)
    finally:
        isobath.close()
        kernels.write(record, args, table)
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", type=kernels.program, help="the isobath to time")
    parser.add_argument("--replay", nargs="+", metavar="FILE",
                        help="make the table from records of one machine; nothing is timed")
    parser.add_argument("--preset", action="append", default=[], help="[the paper's models]")
    parser.add_argument("--product", action="append", type=one_product, metavar="LAYOUT:M,N,K",
                        help="this product alone; may be repeated")
    parser.add_argument("--choices", type=Path, metavar="FILE",
                        help="of isobath bench gemm --tune [what is compiled in]")
    parser.add_argument("--device", choices=["cuda", "simt"], default="cuda")
    parser.add_argument("--cpu-twins", action="store_true",
                        help="with --device simt: run the twins on the CPU, to see that they work")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, help="of isobath and of the twins [isobath's own]")
    parser.add_argument("--seconds", type=float, help="no further product after so many")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the record, JSON")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table, markdown")
    args = parser.parse_args()
    if (args.program is None) == (args.replay is None):
        parser.error("give either --program or --replay")
    if args.rounds < 1 or (args.samples is not None and args.samples < 1):
        parser.error("--rounds and --samples must be positive")
    replayed = lambda: kernels.merged([kernels.load(path) for path in args.replay])
    return kernels.finish(args, replayed, measure, table)


if __name__ == "__main__":
    sys.exit(main())
