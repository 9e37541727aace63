#!/usr/bin/env python3
"""Compares a checkpoint's loss in `transformers` with the number of `isobath eval`.

Loads MODEL as a stock LlamaForCausalLM (no missing, unexpected or mismatched tensor allowed) and
its tokenizer through AutoTokenizer, takes the mean cross-entropy over consecutive,
non-overlapping windows of S input tokens of the beginning of a text - no start token, targets
shifted by one, every token but the first predicted once, the last window may be shorter - and
compares it with what `isobath eval MODEL --data TEXT --json` tells. Exit status 0 if both agree.

Needs torch and transformers (4.57 or 5.x):
    python tests/transformers_check.py --model runs/NAME/checkpoints/step-00000200 \
        --data assets/austen.txt --isobath target/release/isobath
"""

import argparse
import json
import subprocess
import sys
import tempfile

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


def beginning(path: str, size: int) -> str:
    """The whole lines within the first `size` bytes of a text."""
    with open(path, "rb") as file:
        text = file.read(size)
    end = text.rfind(b"\n") + 1
    return (text[:end] if end else text).decode("utf-8", errors="ignore")


def load_model(folder: str) -> LlamaForCausalLM:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    problems = {key: list(value) for key, value in report.items() if len(value)}
    if type(model) is not LlamaForCausalLM or problems:
        sys.exit(f"FAIL: {folder} loads as {type(model).__name__}, report: {problems}")
    return model.eval()


def mean_loss(model: LlamaForCausalLM, tokens: list[int], sequence: int) -> float:
    """Mean over all predicted tokens, in nats; summed in float64."""
    total = 0.0
    for start in range(0, len(tokens) - 1, sequence):
        window = torch.tensor(tokens[start : start + sequence + 1])
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        total += losses.double().sum().item()
    return total / (len(tokens) - 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint or other Hugging Face folder")
    parser.add_argument("--data", required=True, help="a UTF-8 text")
    parser.add_argument("--isobath", help="path of the isobath program; none: no comparison")
    parser.add_argument("--bytes", type=int, default=100_000, help="read this much of the text")
    parser.add_argument("--sequence", type=int, help="window; default: as eval tells, or the model's")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    arguments = parser.parse_args()

    text = beginning(arguments.data, arguments.bytes)
    told = {}
    if arguments.isobath:
        with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            command = [arguments.isobath, "eval", arguments.model, "--data", file.name, "--json"]
            told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    model = load_model(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        tokens.append(tokenizer.eos_token_id)  # the end of a document is predicted, too
    own = model.config.max_position_embeddings
    sequence = arguments.sequence or told.get("sequence") or own
    loss = mean_loss(model, tokens, sequence)

    windows = f"{len(tokens)} tokens in windows of {sequence}"
    print(f"transformers {transformers.__version__}: loss {loss:.6f} over {windows}")
    if not told:
        return 0
    difference = abs(loss - told["loss"])
    agree = difference <= arguments.tolerance
    print(f"isobath eval: loss {told['loss']:.6f}, difference {difference:.2e}")
    print("PASS" if agree else f"FAIL: more than {arguments.tolerance:g} apart")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
