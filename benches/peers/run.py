"""Times training steps of isobath and of PyTorch, eager and compiled, in turn, and prints one table.

    python benches/peers/run.py                        demo and 20m, both at 4 x 256
    python benches/peers/run.py --case demo:4:256 --rounds 5 --steps 20

Each round is one process of each program; the compiled one compiles before its first step. Threads are as many
as isobath takes (all cores, or RAYON_NUM_THREADS). Medians and minima are over the steps of all
rounds. All of it goes to benches/results/DATE-CPU.json. Needs cargo, and what step.py needs; a C++
compiler with OpenMP for `torch.compile`.
"""

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# Without these glibc gives large tensors back to the kernel after every use, and PyTorch spends
# a large part of its step in page faults.
PEER_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
}


def build():
    """Compiles the bench; its path."""
    command = ["cargo", "build", "--release", "--bench", "step", "--message-format=json"]
    lines = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in lines.splitlines()]
    return next(m["executable"] for m in messages
                if m.get("executable") and m["target"]["name"] == "step")


def output(command, environment={}):
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


# Names of the peers, and the mode of torch.compile that each is.
PEERS = {"eager": "none", "compiled": "default"}


def measure(bench, case, args):
    """Reports of all rounds, by the program's name."""
    preset, batch, sequence = case.split(":")
    lengths = ["--steps", str(args.steps), "--warm-up", str(args.warm_up)]
    ours_command = [bench, "--preset", preset, "--batch", batch, "--sequence", sequence, "--json"]
    reports = {name: [] for name in ["isobath", *args.peer]}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "ours.json"
        peer_command = [args.python, str(HERE / "step.py"), str(config)]
        for round in range(args.rounds):
            ours = output(ours_command + lengths)
            config.write_text(json.dumps(ours))
            reports["isobath"].append(ours)
            for name in args.peer:
                command = peer_command + lengths + ["--compile", PEERS[name]]
                reports[name].append(output(command, PEER_ENVIRONMENT))
            medians = [f"{name} {of[-1]['median_ms']:.0f} ms" for name, of in reports.items()]
            print(f"{case} round {round + 1}: {', '.join(medians)}", file=sys.stderr)
    return reports


def summary(reports):
    steps = [ms for report in reports for ms in report["step_ms"]]
    median = statistics.median(steps)
    first = reports[0]
    return {
        "program": f"{first['program']} {first['version']}",
        "threads": first["threads"],
        "median_ms": median,
        "min_ms": min(steps),
        "cpu_ms": statistics.median(report["cpu_ms"] for report in reports),
        "tokens_per_second": 1e3 * first["batch"] * first["sequence"] / median,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", metavar="PRESET:BATCH:SEQUENCE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--peer", action="append", choices=PEERS, help="[all]")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has torch")
    args = parser.parse_args()
    args.peer = args.peer or list(PEERS)
    bench = build()
    load = os.getloadavg()[0]
    cases = {case: measure(bench, case, args)
             for case in args.case or ["demo:4:256", "20m:4:256"]}

    print(f"{'case':<14} {'program':<28} {'median ms':>10} {'min ms':>9} {'cpu ms':>9} "
          f"{'tokens/s':>9} {'ratio':>7}")
    for case, reports in cases.items():
        ours, *peers = map(summary, reports.values())
        for row in [ours, *peers]:
            ratio = row["median_ms"] / ours["median_ms"]
            print(f"{case:<14} {row['program']:<28} {row['median_ms']:>10.1f} "
                  f"{row['min_ms']:>9.1f} {row['cpu_ms']:>9.1f} "
                  f"{row['tokens_per_second']:>9.0f} {ratio:>6.2f}x")
    print(f"load average before the first round: {load:.1f}")

    first = next(iter(cases.values()))["isobath"][0]
    date = datetime.date.today().isoformat()
    cpu = re.sub(r"[^a-z0-9]+", "-", first["cpu"].lower()).strip("-")
    path = ROOT / "benches" / "results" / f"{date}-{cpu}.json"
    path.parent.mkdir(exist_ok=True)
    record = {
        "date": date,
        "cpu": first["cpu"],
        "commit": first["commit"],
        "load_average_before": load,
        "rounds": args.rounds,
        "cases": cases,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"raw figures: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
