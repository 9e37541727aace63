"""The work of each row of `isobath bench`, written for PyTorch as fast as it goes there.

`twins(row)` gives one or more ways to do what a row did; kernels.py times all of them and takes the
fastest. A twin makes copies of its buffers (random normals) and does the work once on one copy.
What it computes beside or short of the kernel's work stands in its name. Nothing here measures
time. Imported only where torch is.
"""

from dataclasses import dataclass
from typing import Any, Callable

import torch
import torch._dynamo
import torch._functorch.config
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from step import Trainer

# Compiled backwards run again and again on what one forward kept.
torch._functorch.config.donated_buffer = False
# One function is compiled for many shapes.
for limit in "recompile_limit", "cache_size_limit":
    if hasattr(torch._dynamo.config, limit):
        setattr(torch._dynamo.config, limit, 1024)

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
EPS = 1e-6


@dataclass
class Twin:
    name: str
    # Of one copy of what the work reads and writes.
    bytes: int
    # One copy.
    setup: Callable[[], Any]
    # The work, on a copy.
    launch: Callable[[Any], Any]


class NoTwin(Exception):
    """Why a row has none."""


def twins(row, device="cuda"):
    """Those of a row of isobath's report. Errors: NoTwin."""
    missing = [key for key in ("op", "dtype", "sizes") if key not in row]
    if missing:
        raise NoTwin(f"the row has no {', '.join(missing)}")
    makers = {
        "gemm_nt": gemm, "gemm_nn": gemm, "gemm_tn": gemm,
        "attention_forward": attention, "attention_backward": attention, "attention": attention,
        "norm_forward": norm, "norm_backward": norm,
        "loss": loss, "loss_forward": loss, "loss_backward": loss,
        "adamw": adamw, "gradient_norm": gradient_norm, "step": step,
    }
    if row["op"] not in makers:
        raise NoTwin(f"no twin is written for {row['op']}")
    if row["dtype"] not in DTYPES:
        raise NoTwin(f"no twin is written for the type {row['dtype']}")
    try:
        return makers[row["op"]](row, device)
    except KeyError as key:
        raise NoTwin(f"the row's sizes lack {key}") from None


def normal(*shape, dtype, device, grad=False):
    return torch.randn(shape, dtype=dtype, device=device, requires_grad=grad)


def size(*shape):
    product = 1
    for length in shape:
        product *= length
    return product


def compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


def has(row, word):
    """A property of the row: in its sizes, or else a word of `what`."""
    value = row["sizes"].get(word)
    words = [part.strip() for part in row.get("what", "").split(",")]
    return bool(value) if value is not None else word in words or f"with {word}" in words


def with_backward(function):
    """Setup's last part and launch for the gradients of `function` of a copy's tensors: the
    forward is done when the copy is made."""
    def record(inputs, d_out):
        out = function(*inputs)
        return out, [tensor for tensor in inputs if tensor.requires_grad], d_out

    def launch(copy):
        out, inputs, d_out = copy
        return torch.autograd.grad(out, inputs, d_out, retain_graph=True)

    return record, launch


# ------------------------------------------------------------------ gemm

def gemm(row, device):
    m, n, k = (row["sizes"][key] for key in "MNK")
    dtype = DTYPES[row["dtype"]]
    layout = row["op"][-2:]
    shapes = {"nt": ((m, k), (n, k)), "nn": ((m, k), (k, n)), "tn": ((k, m), (k, n))}[layout]

    def operands():
        a, b = (normal(*shape, dtype=dtype, device=device) for shape in shapes)
        return (a.t() if layout == "tn" else a), (b.t() if layout == "nt" else b)

    element = dtype.itemsize
    bytes = element * (m * k + n * k + m * n)
    empty = lambda dtype: torch.zeros((m, n), dtype=dtype, device=device)
    if layout == "tn":
        # Isobath adds into an f32 gradient, autograd into one of the operands' type: half the bytes
        # of the result, and one more rounding.
        found = [Twin(f"addmm into {row['dtype']}", bytes,
                      lambda: (*operands(), empty(dtype)),
                      lambda copy: copy[2].addmm_(copy[0], copy[1]))]
        if dtype != torch.float32:
            # The same work in one kernel, where PyTorch has it: from 2.8 on, not on a CPU.
            found.append(Twin("addmm into f32", bytes + (4 - element) * m * n,
                              lambda: (*operands(), empty(torch.float32)),
                              lambda copy: torch.addmm(copy[2], copy[0], copy[1],
                                                       out_dtype=torch.float32, out=copy[2])))
            # In two: the product is rounded to the operands' type, written and read.
            found.append(Twin("matmul, add to f32", bytes + 4 * m * n,
                              lambda: (*operands(), empty(torch.float32)),
                              lambda copy: copy[2].add_(torch.mm(copy[0], copy[1]))))
        return found
    if has(row, "residual") or has(row, "addend"):
        return [Twin("addmm", bytes + element * m * n,
                     lambda: (*operands(), normal(m, n, dtype=dtype, device=device), empty(dtype)),
                     lambda copy: torch.addmm(copy[2], copy[0], copy[1], out=copy[3]))]
    return [Twin("matmul", bytes, lambda: (*operands(), empty(dtype)),
                 lambda copy: torch.mm(copy[0], copy[1], out=copy[2]))]


# ------------------------------------------------------------------ attention

def attention(row, device):
    """Forward, backward after a forward that is not timed, or both ("attention")."""
    sizes, dtype = row["sizes"], DTYPES[row["dtype"]]
    b, s, h, k, d = (sizes[key] for key in ("B", "S", "H", "K", "D"))
    op = row["op"]
    backends = [("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)]
    if dtype == torch.float32:
        backends = [("memory-efficient", SDPBackend.EFFICIENT_ATTENTION)]
    if device == "cpu":
        backends = [("math", SDPBackend.MATH)]
    # The memory-efficient kernels know no grouped heads: they get copies.
    kv_heads = h if dtype == torch.float32 else k
    elements = b * s * d * (2 * h + 2 * kv_heads)
    bytes = dtype.itemsize * elements * (1 if op == "attention_forward" else 2)

    def heads_of(count):
        # [B,S,H,D], as a QKV product leaves it.
        return normal(b, s, count, d, dtype=dtype, device=device)

    def of_op(name, forward, tensors, d_out):
        """A twin whose forward pass is `forward` of `tensors()`, in one layout with `d_out()`."""
        if op == "attention_forward":
            return Twin(name, bytes, tensors, lambda copy: forward(*copy))
        record, backward = with_backward(forward)
        inputs = lambda: [tensor.requires_grad_() for tensor in tensors()]
        if op == "attention_backward":
            return Twin(name, bytes, lambda: record(inputs(), d_out()), backward)
        return Twin(name, bytes, lambda: (inputs(), d_out()),
                    lambda copy: torch.autograd.grad(forward(*copy[0]), copy[0], copy[1]))

    def of_pytorch(name, backend):
        def forward(q, key, value):
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(
                    q, key, value, is_causal=True, enable_gqa=kv_heads != h)

        name = f"scaled_dot_product_attention, {name}"
        if kv_heads != k:
            name += ", kv heads copied"
        # [B,H,S,D] by its strides; nothing is moved.
        tensors = lambda: [heads_of(count).transpose(1, 2) for count in (h, kv_heads, kv_heads)]
        return of_op(name, forward, tensors, lambda: heads_of(h).transpose(1, 2))

    found = [of_pytorch(*backend) for backend in backends]
    if device != "cpu" and dtype != torch.float32:
        tensors = lambda: [heads_of(count) for count in (h, k, k)]
        found.append(of_op("FlashAttention-3", flash_attention_3, tensors, lambda: heads_of(h)))
    return found


def flash_attention_3(q, key, value):
    """Of [B,S,H,D]. Errors: ImportError where it is not installed, which then stands in the row."""
    from flash_attn_interface import flash_attn_func
    out = flash_attn_func(q, key, value, causal=True)
    # Its earlier versions give the log-sum-exp, too.
    return out[0] if isinstance(out, tuple) else out


# ------------------------------------------------------------------ norm

def norm(row, device):
    t, c = row["sizes"]["T"], row["sizes"]["C"]
    dtype = DTYPES[row["dtype"]]
    layer = has(row, "layer")
    backward = row["op"] == "norm_backward"

    def normalise(inp, gain):
        if layer:
            return F.layer_norm(inp, (c,), gain, None, EPS)
        return F.rms_norm(inp, (c,), gain, EPS)

    activations = dtype.itemsize * t * c

    def tensors():
        # The gain is in the type of the activations: PyTorch is faster so, and isobath's is f32.
        return [normal(t, c, dtype=dtype, device=device, grad=backward),
                normal(c, dtype=dtype, device=device, grad=backward)]

    def make(name, forward_function):
        if not backward:
            return Twin(name, 2 * activations, tensors, lambda copy: forward_function(*copy))
        record, launch = with_backward(forward_function)
        d_out = lambda: normal(t, c, dtype=dtype, device=device)
        return Twin(name, 3 * activations, lambda: record(tensors(), d_out()), launch)

    kind = "layer_norm" if layer else "rms_norm"
    return [make(f"{kind}, eager", normalise),
            make(f"{kind}, compiled", compiled(normalise))]


# ------------------------------------------------------------------ loss

def loss(row, device):
    t, v = row["sizes"]["T"], row["sizes"]["V"]
    dtype = DTYPES[row["dtype"]]

    def cross_entropy(logits, targets):
        return F.cross_entropy(logits, targets)

    def cross_entropy_f32(logits, targets):
        return F.cross_entropy(logits.float(), targets)

    logits_bytes = dtype.itemsize * t * v

    def tensors():
        return [normal(t, v, dtype=dtype, device=device, grad=row["op"] != "loss_forward"),
                torch.randint(v, (t,), device=device)]

    def both(function):
        def launch(copy):
            return torch.autograd.grad(function(*copy), copy[:1])
        return launch

    def make(name, function):
        if row["op"] == "loss_forward":
            return Twin(name, logits_bytes, tensors, lambda copy: function(*copy))
        if row["op"] == "loss":
            return Twin(name, 2 * logits_bytes, tensors, both(function))
        record, launch = with_backward(function)
        return Twin(name, 2 * logits_bytes, lambda: record(tensors(), None), launch)

    found = [make("cross_entropy, eager", cross_entropy),
             make("cross_entropy, compiled", compiled(cross_entropy_f32))]
    return found


# ------------------------------------------------------------------ optimizer

def adamw(row, device):
    if has(row, "moments in bf16") or has(row, "parameters in halves"):
        raise NoTwin("PyTorch's fused AdamW keeps parameters and moments in one type")
    count = row["sizes"]["N"]
    working = row["dtype"] == "bf16"

    def setup():
        parameter = torch.nn.Parameter(normal(count, dtype=torch.float32, device=device))
        parameter.grad = normal(count, dtype=torch.float32, device=device)
        optimizer = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1,
                                      fused=True)
        copy = torch.empty(count, dtype=torch.bfloat16, device=device) if working else None
        return optimizer, parameter, copy

    def launch(copy):
        optimizer, parameter, narrow = copy
        optimizer.step()
        if narrow is not None:
            narrow.copy_(parameter.detach())

    # The smallest step of training: all else has been written by the backward pass before.
    name = "AdamW(fused=True)" + (", then a bf16 copy" if working else "")
    return [Twin(name, (16 + 2 * working) * count, setup, launch)]


def gradient_norm(row, device):
    count = row["sizes"]["N"]
    setup = lambda: [normal(count, dtype=torch.float32, device=device)]
    found = [Twin("_foreach_norm", 4 * count, setup, lambda copy: torch._foreach_norm(copy))]
    if hasattr(torch.nn.utils, "get_total_norm"):
        found.append(Twin("get_total_norm", 4 * count, setup, torch.nn.utils.get_total_norm))
    return found


# ------------------------------------------------------------------ step

def step(row, device):
    """Whole training steps, compiled. A copy is a trainer, and one is enough: it is larger than any
    L2. It stays for the next round, because compiling it takes long."""
    sizes = row["sizes"]
    config = {"model": sizes["model"], "optimizer": sizes["optimizer"],
              "data": {"sequence": sizes["S"]}}
    shape = (sizes["grad_accumulation"], 2, sizes["B"], sizes["S"])
    kept = []

    def setup():
        if not kept:
            trainer = Trainer(config, device, row["dtype"], mode="default")
            kept.append((trainer, torch.randint(config["model"]["vocab"], shape, device=device)))
        return kept[0]

    def launch(copy):
        trainer, batch = copy
        trainer.accumulate(list(batch))

    kind = "autocast to bf16" if row["dtype"] == "bf16" else "f32"
    return [Twin(f"training step, compiled, {kind}", 1 << 40, setup, launch)]


# ------------------------------------------------------------------ ceilings

def ceilings(units, device):
    """What this device does at best of each unit in `units`, as (unit, amount, twin)."""
    found = []
    if "bytes" in units:
        count = 1 << (29 if device == "cuda" else 22)
        setup = lambda: [torch.randn(count // 2, device=device) for _ in range(2)]
        found.append(("bytes", 4 * count,
                      Twin("copy on the device", 4 * count, setup,
                           lambda copy: copy[1].copy_(copy[0]))))
    edge = 8192 if device == "cuda" else 256
    for dtype in "bf16", "f32":
        if f"flops {dtype}" in units:
            row = {"op": "gemm_nn", "dtype": dtype, "sizes": {"M": edge, "N": edge, "K": edge}}
            [twin] = gemm(row, device)
            twin.name = f"matmul of {edge}^3, {dtype}"
            found.append((f"flops {dtype}", 2 * edge**3, twin))
    return found
