#!/usr/bin/env python3
"""Draws metrics.jsonl as an SVG that reads on light and dark pages.

Usage: docs/loss_curve.py runs/demo/metrics.jsonl docs/demo-loss.svg

Training loss (in nats per token, smoothed) on the left axis; each evaluation as a point with its
held-out bits per byte. Standard library only.
"""

import json
import math
import sys

HALF_WINDOW = 12  # steps on either side that the smoothed line averages
WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 28, 44
LINE, RAW, POINT, INK = "#2f81f7", "#2f81f7", "#d9730d", "#768390"


def main() -> None:
    source, target = sys.argv[1:3]
    records = [json.loads(line) for line in open(source)]
    steps = [r["step"] for r in records]
    losses = [r["loss"] for r in records]
    windows = [losses[max(0, i - HALF_WINDOW) : i + HALF_WINDOW + 1] for i in range(len(losses))]
    smooth = [sum(window) / len(window) for window in windows]
    evaluations = [(r["step"], r["val_loss"], r["val_bits_per_byte"]) for r in records if "val_loss" in r]
    low, high = math.floor(min(losses) * 2) / 2, math.ceil(max(losses))

    def x(step):
        return LEFT + (WIDTH - LEFT - RIGHT) * step / steps[-1]

    def y(loss):
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    def path(values):
        return "M" + "L".join(f"{x(s):.1f},{y(v):.1f}" for s, v in zip(steps, values))

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui,sans-serif" font-size="12" fill="{INK}">'
    ]
    for loss in range(math.ceil(low), high + 1):
        out.append(f'<path d="M{LEFT},{y(loss):.1f}H{WIDTH - RIGHT}" stroke="{INK}" stroke-opacity=".25"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss}</text>')
    for i in range(6):
        step = steps[-1] * i / 5
        out.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step:.0f}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">step</text>')
    out.append(f'<text x="{LEFT}" y="16">loss, nats per token (line: training; points: held-out text, with bits per byte)</text>')
    out.append(f'<path d="{path(losses)}" fill="none" stroke="{RAW}" stroke-opacity=".25"/>')
    out.append(f'<path d="{path(smooth)}" fill="none" stroke="{LINE}" stroke-width="2"/>')
    for step, loss, bits in evaluations:
        anchor = "end" if step == steps[-1] else "middle"
        out.append(f'<circle cx="{x(step):.1f}" cy="{y(loss):.1f}" r="4" fill="{POINT}"/>')
        out.append(f'<text x="{x(step):.1f}" y="{y(loss) - 10:.1f}" text-anchor="{anchor}" fill="{POINT}">{bits:.3f}</text>')
    out.append("</svg>\n")
    open(target, "w").write("\n".join(out))


if __name__ == "__main__":
    main()
