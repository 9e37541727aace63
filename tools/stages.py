"""The stages of tools/run-all: what it runs, in which order, and for how long each.

Every function here makes stages out of its arguments and the results folder; none runs one.
"""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "isobath"
TESTS = HERE / "isobath-tests"
PEERS = HERE / "benches/peers"
# Modules of tests that no GPU has part in, and that take a while.
OF_SIMT = ["cuda::commands", "cuda::faults", "cuda::mutants"]
KERNELS = ["attention", "gemm", "norm", "loss", "adamw"]
# kernels.py and its like: what they need is not here.
NEEDS_MISSING = 2

# A model whose training step runs on simt in well under a second.
TINY = ["model.hidden=64", "model.layers=2", "model.heads=2", "model.kv_heads=1", "model.ffn=128",
        "model.max_sequence=64", "data.sequence=64", "data.tokenizer=bytes",
        "data.held_out=0.001", "train.micro_batch=2"]
QUIET = ["train.eval_every=0", "train.sample_every=0", "checkpoint.every=0"]


@dataclass
class Stage:
    """A command with a limit of its own, or (no command) a function."""

    name: str
    command: list
    most: float
    # The command is told with --seconds to go on for so long, or for what is left.
    seconds: float = None
    # Why it cannot run here; then it is skipped.
    missing: str = None
    function: object = None
    environment: dict = field(default_factory=dict)
    # With this exit status and a last line "skipped: why" the stage counts as skipped.
    missing_code: int = None
    # Once it has failed: the stages that do the rest, made of what it wrote to stdout.
    then: object = None
    # It reads this file, which is empty unless an earlier stage has written it.
    reads: Path = None
    # What it leaves that nobody wants.
    discarded: Path = None

    @property
    def is_late(self):
        """After conformance and the tests, whose time has an end for that."""
        return not self.name.startswith(("info", "conformance", "test "))


def is_json(text):
    try:
        return isinstance(json.loads(text), (dict, list))
    except ValueError:
        return False


def test_modules():
    """cuda::norm, cuda::gemm, ... and the tests of each, as the test binary lists them; or why not."""
    try:
        listed = subprocess.run([str(TESTS), "--list", "cuda::"], cwd=HERE, timeout=60,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {}, f"{TESTS.name} does not list its tests: {error}"
    modules = {}
    for line in sorted(listed.stdout.decode(errors="replace").splitlines()):
        if line.startswith("cuda::") and line.endswith(": test"):
            name = line.split(": ")[0]
            modules.setdefault("::".join(name.split("::")[:2]), []).append(name)
    if listed.returncode != 0 or not modules:
        text = listed.stderr.decode(errors="replace").strip()[:300]
        return {}, f"{TESTS.name} lists no tests of cuda:: (exit {listed.returncode}) {text}"
    return modules, None


def sanitizer():
    for place in shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer":
        if place and os.access(place, os.X_OK):
            return place
    return None


def training(device, dtype, steps, folder, sets):
    command = [PROGRAM, "train", "--device", device, "--out", folder]
    for value in [f"dtype={dtype}", f"train.steps={steps}", *QUIET, *sets]:
        command += ["--set", value]
    return command


def losses(metrics):
    lines = metrics.read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    return {step["step"]: step["loss"] for step in steps if "loss" in step}


def compare_training(results, device):
    """Losses of both runs side by side. Errors: a run is missing or empty, or did not learn."""
    def compare():
        ours, cpu = (losses(results / f"train-{name}" / "metrics.jsonl")
                     for name in (device, "cpu"))
        both = sorted(set(ours) & set(cpu))
        if not both:
            raise ValueError("the two runs share no step")
        differences = {step: abs(ours[step] / cpu[step] - 1) for step in both}
        worst = max(both, key=differences.get)
        record = {
            "device": device, "steps": len(both),
            "largest_relative_difference": differences[worst], "at_step": worst,
            "losses": [[step, ours[step], cpu[step]] for step in both],
        }
        (results / "train-compared.json").write_text(json.dumps(record, indent=1) + "\n")
        shown = (f"after {both[-1]} steps: loss {ours[both[-1]]:.4f} on {device}, "
                 f"{cpu[both[-1]]:.4f} on the CPU; largest difference {differences[worst]:.2%}")
        # bf16 against f32 from the same start: the curves lie on each other, the bits do not.
        if not differences[worst] < 0.05:
            raise ValueError(f"{shown}: more than 5%")
        if not ours[both[-1]] < ours[both[0]]:
            raise ValueError(f"{shown}: the loss does not fall")
        return {"json": "train-compared.json", "why": shown}
    return compare


def parts(args, results):
    """All stages of both parts, what one would miss most first."""
    info = Stage("info", [PROGRAM, "info", "--json"], 60)
    first = [info, conformance(args, results), *tests(args), *trainings(args, results),
             *benches(args)]
    second = [*products(args, results), *peers(args, results), *sanitized(args, results)]
    return first, second


def conformance(args, results, start=None):
    """On a GPU the goldens are recorded; what an earlier stage has recorded stays."""
    command = [PROGRAM, "conformance", "--device", args.device, "--json"]
    if args.device == "cuda":
        command += ["--record", results / "goldens"]
    if start:
        command += ["--from", start]

    def rest(report):
        """A kernel that faults or hangs takes the process with it: the cases after it."""
        missing = json.loads(report).get("not_reached") if is_json(report) else None
        return [conformance(args, results, missing[0])] if missing else []
    return Stage(f"conformance from {start}" if start else "conformance", command, 60, then=rest)


def tests(args):
    """A process for each module. Tests of a module that fails, and have not passed themselves, get
    one of their own."""
    modules, missing = test_modules()
    machines = {"ISOBATH_TEST_MACHINES": args.device}
    # simt takes its time, and one test does not harm another.
    limit = 30 if args.device == "cuda" else 90

    def one_by_one(names):
        def rest(text):
            done = set(re.findall(r"test (\S+) \.\.\. (?:ok|ignored)", text))
            return [Stage(f"test {name}", [TESTS, name, "--exact", "--nocapture"], 15,
                          environment=machines) for name in names if name not in done]
        return rest
    stages = []
    for module, names in (modules or {"cuda": []}).items():
        of_simt = args.device == "cuda" and module in OF_SIMT
        why = "of the CPU machine alone: --device simt" if of_simt else missing
        stages.append(Stage(f"test {module}", [TESTS, f"{module}::", "--nocapture"], limit,
                            missing=why, environment=machines, then=one_by_one(names)))
    return stages


def trainings(args, results):
    """The same run on the device and on the CPU."""
    device = args.device
    steps, sets = (args.steps, []) if device == "cuda" else (min(args.steps, 5), TINY)
    sets = [*sets, f"optimizer.warmup={max(1, steps // 6)}"]
    stages = []
    for name, dtype in (device, "bf16"), ("cpu", "f32"):
        folder = results / f"train-{name}"
        stages.append(Stage(f"train {name}", training(name, dtype, steps, folder, sets), 60,
                            discarded=folder / "checkpoints"))
    return [*stages, Stage("train compared", [], 10, function=compare_training(results, device))]


def bench(args, name, samples=None):
    samples = samples if args.device == "cuda" else 1
    chosen = ["--samples", samples] if samples else []
    return [PROGRAM, "bench", name, "--device", args.device, "--json", *chosen]


def benches(args):
    """Steps first, then the kernels."""
    # The same step again, each kernel after the end of the one before it.
    without_overlap = {"ISOBATH_OVERLAP": "0"}
    step = bench(args, "step", samples=10)
    return [
        Stage("bench step", step, 40),
        Stage("bench step without overlap", step, 40, environment=without_overlap),
        *[Stage(f"bench {name}", bench(args, name), 60) for name in KERNELS],
        fusions(args),
    ]


def fusions(args):
    """What each fusion is worth, in a narrow model, where its bytes weigh most."""
    without = "all", "swiglu-backward", "residual", "swiglu", "rotary", "rotary-backward"
    model = ["--preset", "130m"] if args.device == "cuda" else []
    command = [*bench(args, "step", samples=5), *model]
    return Stage("bench fusions", [*command, *(f"--without={it}" for it in without)], 60)


def products(args, results):
    """The choice of the products' kernels, then all of them with it."""
    # Empty, the program's own choices stand.
    tuned = results / "tuned.toml"
    gemm, seconds = bench(args, "gemm"), args.table_seconds
    return [
        Stage("bench tune", [*gemm, "--tune", "--out", tuned], args.tune_seconds + 30,
              seconds=args.tune_seconds),
        # On simt until all is done once.
        Stage("bench table", [*gemm, "--table", "--choices", tuned], seconds + 30,
              seconds=seconds if args.device == "cuda" else None, reads=tuned),
        peer(args, results, "products", ["products.py", "--choices", tuned], seconds, seconds + 40,
             reads=tuned),
    ]


def peers(args, results):
    """Beside PyTorch, which compiles a model for every micro-batch that is tried."""
    model = ["training.py", "--python", args.python, "--preset", "130m", "--first", "64",
             "--search-steps", "3", "--steps", "10", "--rounds", "2"]
    return [
        peer(args, results, "training", model, 100, 240),
        *[peer(args, results, name, ["kernels.py", "--bench", name], 30, 70)
          for name in [*KERNELS, "step"]],
    ]


def peer(args, results, name, script, seconds, most, reads=None):
    script, *options = script
    command = [args.python, PEERS / script, "--program", PROGRAM, "--device", args.device, *options,
               "--out", results / f"peers-{name}.json", "--table", results / f"peers-{name}.md"]
    return Stage(f"peers {name}", command, most, seconds=seconds, missing_code=NEEDS_MISSING,
                 reads=reads)


def sanitized(args, results):
    tool, missing = sanitizer(), None
    if args.device != "cuda":
        missing = f"compute-sanitizer is for GPUs, and this is {args.device}"
    elif tool is None:
        missing = "no compute-sanitizer on PATH or in /usr/local/cuda/bin; the CUDA toolkit has it"
    cases = [PROGRAM, "conformance", "--device", args.device, "--json"]
    stages = []
    for check in "memcheck", "racecheck":
        # The program asks the driver for kernels and parameters that may not be there, and takes no
        # for an answer.
        options = ["--report-api-errors", "no"] if check == "memcheck" else []
        prefix = [tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9", *options]
        folder = results / f"train-{check}"
        short = training(args.device, "bf16", 2, folder, [*TINY, "optimizer.warmup=1"])
        stages.append(Stage(f"{check} conformance", prefix + cases, 45, missing=missing))
        stages.append(Stage(f"{check} train", prefix + short, 45, missing=missing,
                            discarded=folder))
    return stages
