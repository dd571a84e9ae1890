"""Forms of an attention with two regions: one block, by number of tokens.

    python benchmarks/softmax_schemes.py [--tokens 256 1024 2304 4096] [--json softmax.json]

A block of a DiT with four heads of 72 channels and random weights, two rows to a call. The tables have the same search
settings, two groups of timesteps, and differ in the scheme of the softmax alone. All engines of a backend take turns.
Milliseconds of a call, median with quartiles, and medians over rounds of the time over that of the first form with
probabilities, and of numerators over probabilities in the same form. Beside them what numerators gain: the error of P V
of random logits N(0, 1) and N(0, 3^2) with probabilities over that with numerators (scripts/ingredients.py --tokens).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from ingredients import attention_errors

from engines import BACKENDS, float_chain, machine, ours, soon
from tqdit.calibration.flow import calibrate
from tqdit.exporter.graph import ExportConfig, export_graph
from tqdit.exporter.onnx_writer import write
from tqdit.models.dit import DiT, DiTConfig, randomize
from tqdit.models.families.published import describe

SCHEMES = ("probability", "numerator")
ROUNDED = {"probability": "probabilities", "numerator": "numerators"}
SPREADS = (1.0, 3.0)  # of random logits
SEEDS = (0, 1, 2)
HEAD, GROUPS = 72, 2
STEPS = 2  # of the chain that rows are taken from: speed does not depend on the scales


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokens", nargs="+", type=int, default=[256, 1024, 2304, 4096], help="square numbers (default: %(default)s)")
    add("--attention", nargs="+", default=["simulated", "integer", "float"])
    add("--width", type=int, default=288, help="of the block, in heads of 72 channels (default: %(default)s)")
    add("--images", type=int, default=1, help="per call; each is two rows with guidance")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=15)
    add("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.chain = STEPS
    print(f"{args.rounds} rounds, {args.threads} threads; {machine()}\n")
    print(
        "| tokens | error, N(0, 1) | N(0, 3^2) | engine | attention | rounded | ms | over first | over probabilities |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows = [row for tokens in args.tokens for row in measure(tokens, args)]
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"settings": settings, "machine": machine(), "rows": rows}, indent=1) + "\n")


def measure(tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    side = math.isqrt(tokens)
    assert side * side == tokens, f"{tokens} is no square"
    config = DiTConfig(
        input_size=2 * side, patch_size=2, in_channels=4, out_channels=8, hidden_size=args.width, depth=1,
        mlp_hidden_size=4 * args.width, num_classes=1000, num_heads=args.width // HEAD,
    )  # fmt: skip
    model = describe(randomize(DiT(config)).eval().requires_grad_(False), f"one block, {tokens} tokens")
    chain, rows, gained = float_chain(args, model), [], [gain(tokens, spread) for spread in SPREADS]
    gains = " | ".join(f"{each:.0f}x less" for each in gained)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tables = {
            scheme: calibrate(
                model, replace(soon("tq-dit"), steps=STEPS, groups=GROUPS, softmax=scheme), folder / "work"
            ).table
            for scheme in SCHEMES
        }
        forms = [(form, scheme) for form in args.attention for scheme in (SCHEMES if form != "float" else SCHEMES[:1])]
        for backend in BACKENDS:
            engines = []
            for form, scheme in forms:
                path = folder / f"{scheme}-{form}.onnx"
                write(path, *export_graph(model, ExportConfig(steps=STEPS, attention=form), tables[scheme]))
                engines.append(ours(path, backend, args.threads))
            times: list[list[float]] = [[] for _ in forms]
            for number in range(args.rounds + 1):
                for found, engine in zip(times, engines, strict=True):
                    engine(chain.inputs[0])  # threads of the engine before it may still spin
                    started = time.perf_counter()
                    engine(chain.inputs[0])
                    found += [1000 * (time.perf_counter() - started)] * bool(number)  # the first warms up
            for (form, scheme), found in zip(forms, times, strict=True):
                first, same = over(found, times[0]), over(found, times[forms.index((form, SCHEMES[0]))])
                rounded = "nothing" if form == "float" else ROUNDED[scheme]
                cells = [f"{tokens:,}", gains, backend, form, rounded, told(found), f"{first:.2f}", f"{same:.2f}"]
                print(f"| {' | '.join(cells)} |", flush=True)
                rows.append(
                    {"tokens": tokens, "gains": dict(zip(SPREADS, gained, strict=True)), "backend": backend,
                     "attention": form, "scheme": scheme, "ms": found, "over_first": first, "over_probabilities": same}
                )  # fmt: skip
    return rows


def over(times: list[float], others: list[float]) -> float:
    """Median of pairs of one round."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def gain(tokens: int, spread: float) -> float:
    """The error of P V with probabilities over that with numerators, at 8 bits, means over seeds."""
    found = [attention_errors(tokens, spread, 0.0, 8, seed) for seed in SEEDS]
    return sum(each["probabilities"] for each in found) / sum(each["numerators"] for each in found)


def told(times: list[float]) -> str:
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    main()
