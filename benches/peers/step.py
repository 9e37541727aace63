"""The training step of isobath in PyTorch: same model, batch, optimizer and clipping.

    cargo bench --bench step -- --preset demo --json > ours.json
    python step.py ours.json                          times steps of ours.json's shapes; JSON out
    cargo bench --bench step -- --preset demo --steps 5 --record steps.safetensors
    python step.py ours.json --check steps.safetensors  reproduces losses and gradient norms

As fast as PyTorch goes: q, k and v are one matmul, gate and up another, attention is
scaled_dot_product_attention, AdamW is fused. On a CPU as it stands: eager, in f32. On a GPU as
training.py asks: compiled, with autocast to bf16 and several micro-batches in a step, timed by CUDA
events; where memory runs out the exit status is 3. Needs torch, numpy, and for --check safetensors.
"""

import argparse
import json
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F

from clocks import Clocks

# The exit status.
OUT_OF_MEMORY = 3

class Norm(nn.Module):
    """RMSNorm whose gain is divided by sqrt(depth)."""

    def __init__(self, hidden, eps, depth):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps, self.divisor = eps, depth**0.5

    def forward(self, inp):
        gain = self.weight if self.divisor == 1 else self.weight / self.divisor
        # With a gain of another type than its input PyTorch has no fused kernel.
        return F.rms_norm(inp, self.weight.shape, gain.to(inp.dtype), self.eps)


def rotate(x, cos, sin):
    """x [B,H,S,D], rotate-half; cos and sin [S,D], the sines' first half negated."""
    low, high = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((high, low), dim=-1), sin)


class Block(nn.Module):
    def __init__(self, model, depth):
        super().__init__()
        hidden, ffn = model["hidden"], model["ffn"]
        self.heads, self.kv_heads = model["heads"], model["kv_heads"]
        self.head_dim = hidden // self.heads
        depth = depth if model["placement"] == "lns" else 1
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.attention_norm = Norm(hidden, model["norm_eps"], depth)
        self.qkv = nn.Linear(hidden, qkv, bias=False)
        self.attention_out = nn.Linear(hidden, hidden, bias=False)
        self.ffn_norm = Norm(hidden, model["norm_eps"], depth)
        self.gate_up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x, cos, sin):
        b, s, _ = x.shape
        qkv = self.qkv(self.attention_norm(x))
        qkv = qkv.view(b, s, -1, self.head_dim).transpose(1, 2)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(qk, cos, sin).split((self.heads, self.kv_heads), dim=1)
        grouped = self.heads != self.kv_heads
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        x = x + self.attention_out(out.transpose(1, 2).reshape(b, s, -1))
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, model, sequence):
        super().__init__()
        hidden, vocab = model["hidden"], model["vocab"]
        head_dim = hidden // model["heads"]
        self.embedding = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Block(model, 1 + layer) for layer in range(model["layers"]))
        self.final_norm = Norm(hidden, model["norm_eps"], 1)
        self.head = nn.Linear(hidden, vocab, bias=False)
        half = torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2)
        positions = torch.arange(sequence, dtype=torch.float64)
        angles = torch.outer(positions, model["rope_theta"] ** -half)
        cos, sin = angles.cos().float(), angles.sin().float()
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1))
        self.register_buffer("sin", torch.cat((-sin, sin), dim=-1))

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            # The residual stream is of the narrow type too.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


COMPILE = ["none", "default", "max-autotune", "max-autotune-no-cudagraphs"]


class Trainer:
    """`dtype` "bf16": autocast, with parameters, gradients and moments in f32. `mode`: one of
    COMPILE."""

    def __init__(self, config, device="cpu", dtype="f32", mode="none"):
        self.config = optimizer = config["optimizer"]
        # Where it will be: a CPU takes seconds to draw a billion values.
        with torch.device(device):
            self.model = Llama(config["model"], config["data"]["sequence"])
        compiled = mode != "none"
        options = {"mode": mode, "dynamic": False}
        self.forward = torch.compile(self.model, **options) if compiled else self.model
        # What a CUDA graph writes is gone with its next launch, so gradients have places of their
        # own, and are zeroed instead of given back.
        self.replayed = mode == "max-autotune"
        self.autocast = lambda: torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16")
        groups = [
            {"params": [], "weight_decay": optimizer["weight_decay"]},
            {"params": [], "weight_decay": 0.0},
        ]
        for name, parameter in self.model.named_parameters():
            matrix = parameter.ndim == 2
            if matrix:
                nn.init.normal_(parameter, std=config["model"]["init_std"])
            if self.replayed:
                parameter.grad = torch.zeros_like(parameter)
            decays = matrix and not name.startswith("embedding")
            groups[0 if decays else 1]["params"].append(parameter)
        kind = torch.optim.AdamW if optimizer["kind"] == "adamw" else torch.optim.Adam
        betas = (optimizer["beta1"], optimizer["beta2"])
        lr, eps = optimizer["lr"], optimizer["eps"]
        self.optimizer = kind(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.done = 0

    def step(self, tokens, targets):
        """The loss, and the gradient norm before clipping, of one micro-batch."""
        return self.accumulate([(tokens, targets)])

    def accumulate(self, micro_batches):
        """The mean loss over equally large micro-batches, and the norm of its gradient before
        clipping."""
        total = 0.0
        for tokens, targets in micro_batches:
            if self.replayed:
                torch.compiler.cudagraph_mark_step_begin()
            with self.autocast():
                loss = self.forward(tokens, targets) / len(micro_batches)
            loss.backward()
            total = total + loss.detach()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self.config["clip"] > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.config["clip"], norm)
        self.done += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.config["lr"] * min(1.0, self.done / self.config["warmup"])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.replayed)
        return total.item(), norm.item()


def check(trainer, path):
    """Repeats recorded steps; what differs by more than rounding is an error."""
    from safetensors.torch import load_file

    recorded = load_file(path)
    for name, parameter in trainer.model.named_parameters():
        name = ".".join(part if part != "weight" else "" for part in name.split(".")).rstrip(".")
        if name.startswith("layers."):
            _, layer, rest = name.split(".")
            name = f"layers.{int(layer) + 1}.{rest}"
        parameter.data.copy_(recorded[name])
    worst = 0.0
    rows = zip(recorded["tokens"].long(), recorded["targets"].long())
    for step, (tokens, targets) in enumerate(rows):
        found = trainer.step(tokens, targets)
        expected = recorded["losses"][step].item(), recorded["gradient_norms"][step].item()
        loss, norm = (abs(f / e - 1) for f, e in zip(found, expected))
        # PyTorch adds the squares of a tensor in f32: 2e-4 off for a head of 8M elements.
        worst = max(worst, loss / 1e-5, norm / 1e-3)
        print("step %d: loss %.6f (isobath %.6f), gradient norm %.6f (isobath %.6f)"
              % (step + 1, found[0], expected[0], found[1], expected[1]), file=sys.stderr)
    print(f"largest difference: {worst:.2f} of the tolerance", file=sys.stderr)
    if not worst < 1:
        sys.exit("the two programs do not compute the same")


def cpu_model():
    with open("/proc/cpuinfo") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


class Watch:
    """Milliseconds between marks: CUDA events on a GPU, the wall clock elsewhere."""

    def __init__(self, device):
        self.on_gpu, self.marks = device == "cuda", []

    def mark(self):
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(1e3 * time.perf_counter())

    def between(self):
        if self.on_gpu:
            torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:])
        return [a.elapsed_time(b) if self.on_gpu else b - a for a, b in pairs]


def measure(ours, args):
    """The report of steps of random tokens."""
    trainer = Trainer(ours["config"], args.device, ours.get("dtype", "f32"), args.compile)
    if args.check:
        return check(trainer, args.check)
    count, vocab = ours.get("grad_accumulation", 1), ours["config"]["model"]["vocab"]
    shape = (count, 2, ours["batch"], ours["sequence"])
    batches = [torch.randint(vocab, shape, device=args.device)
               for _ in range(args.warm_up + args.steps)]
    for batch in batches[: args.warm_up]:
        trainer.accumulate(list(batch))
    watch, cpu_before = Watch(args.device), time.process_time()
    with Clocks(args.device == "cuda") as clocks:
        watch.mark()
        for batch in batches[args.warm_up :]:
            loss, _ = trainer.accumulate(list(batch))
            watch.mark()
        step_ms = watch.between()
    median = statistics.median(step_ms)
    report = {
        "program": "PyTorch " + ("eager" if args.compile == "none" else f"compiled, {args.compile}"),
        "version": torch.__version__,
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "batch": ours["batch"],
        "sequence": ours["sequence"],
        "grad_accumulation": count,
        "median_ms": median,
        "min_ms": min(step_ms),
        "cpu_ms": 1e3 * (time.process_time() - cpu_before) / args.steps,
        "tokens_per_second": 1e3 * count * ours["batch"] * ours["sequence"] / median,
        "step_ms": step_ms,
        "loss": loss,
    }
    if args.device == "cuda":
        report.update({
            "gpu": torch.cuda.get_device_name(0),
            "cuda": torch.version.cuda,
            "max_memory_allocated": torch.cuda.max_memory_allocated(),
            "max_memory_reserved": torch.cuda.max_memory_reserved(),
            "clocks": clocks.summary(),
        })
    print(json.dumps(report))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ours", help="JSON of `cargo bench --bench step`, or of training.py: what "
                        "to do")
    parser.add_argument("--check", metavar="FILE", help="steps that `--record` wrote")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", choices=COMPILE, default="none", help="torch.compile's mode")
    args = parser.parse_args()
    with open(args.ours) as file:
        ours = json.load(file)
    if "threads" in ours:
        torch.set_num_threads(ours["threads"])
    torch.manual_seed(1)
    try:
        measure(ours, args)
    except torch.OutOfMemoryError as error:
        print(f"out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
