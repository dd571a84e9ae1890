"""Our search against a straightforward exhaustive one, on the same rows: objective, multiply-adds, seconds.

    python benchmarks/calibration.py [--weight-bits 6 ...] [--json calibration.json]
    python benchmarks/calibration.py text       the text demo, on rows of its pipeline's chains

The exhaustive search tries every candidate of every parameter in every round. Both start from the same samples of each
layer. Prints one line per layer and the median ratio of the objectives; the budget is 1 %.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from tqdit.calibration.capture import Samples
from tqdit.calibration.config import PRESETS
from tqdit.calibration.cost import peak_memory_bytes
from tqdit.calibration.flow import Calibration
from tqdit.calibration.layers import LayerPlan
from tqdit.calibration.methods import search
from tqdit.calibration.problem import Problem, Solution
from tqdit.calibration.rows import CalibrationRows
from tqdit.calibration.work import versions
from tqdit.console import Console
from tqdit.models.load import load_model

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from ablation_subjects import STEPS, SUBJECTS


@dataclass(frozen=True)
class Comparison:
    """One layer under both searches."""

    layer: str
    objective_ratio: float  # ours over exhaustive
    seconds: float
    exhaustive_seconds: float
    multiply_adds: int
    exhaustive_multiply_adds: int


class ComparingCalibration(Calibration):
    """A calibration that also solves every layer exhaustively."""

    comparisons: list[Comparison]

    def solve_plan(
        self, layer_plan: LayerPlan, samples: Samples, weight: Tensor | None, rows: CalibrationRows
    ) -> tuple[Problem, Solution]:
        problem, _ = super().solve_plan(layer_plan, samples, weight, rows)
        start = time.perf_counter()
        ours = search.solve(problem, self.config)
        middle = time.perf_counter()
        exhaustive = search.solve(problem, replace(self.config, coarse=1))
        end = time.perf_counter()
        ratio = ours.history[-1] / exhaustive.history[-1]
        self.comparisons.append(
            Comparison(
                layer_plan.name, ratio, middle - start, end - middle, ours.multiply_adds, exhaustive.multiply_adds
            )
        )  # fmt: skip
        return problem, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--preset", choices=list(PRESETS), default="tq-dit")
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coarse", type=int, default=PRESETS["tq-dit"].coarse)
    parser.add_argument("--work", type=Path, help="keep intermediate results there (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write everything there")
    args = parser.parse_args()
    if args.model in SUBJECTS:
        subject = SUBJECTS[args.model](STEPS[args.model], 1, 1)
        model, data = subject.model, subject.calls
    else:
        model, data = load_model(args.model), None
    config = replace(
        PRESETS[args.preset], weight_bits=args.weight_bits, activation_bits=args.activation_bits, steps=args.steps,
        seed=args.seed, coarse=args.coarse,
    ).for_model(model)  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        run = ComparingCalibration(model, config, args.work or Path(temporary), Console(), data)
        run.comparisons = []
        run.search(run.rows())
        run.folder.delete()
    report(run, args.json)


def report(run: ComparingCalibration, path: Path | None) -> None:
    done = run.comparisons
    print(f"\n{'layer':<34} {'objective':>9} {'seconds':>8} {'exhaustive':>10}")
    for c in done:
        print(f"{c.layer:<34} {c.objective_ratio:9.4f} {c.seconds:8.2f} {c.exhaustive_seconds:10.2f}")
    ratios = [c.objective_ratio for c in done]
    ours, theirs = sum(c.seconds for c in done), sum(c.exhaustive_seconds for c in done)
    spent = run.meter.forward_equivalents
    print(f"\nobjective, ours over exhaustive: median {statistics.median(ratios):.4f}, worst {max(ratios):.4f}")
    less = sum(c.exhaustive_multiply_adds for c in done) / sum(c.multiply_adds for c in done)
    print(f"search: {ours:.1f} s, exhaustive {theirs:.1f} s and {less:.1f} times the multiply-adds")
    print(f"forward-equivalents of one row: {sum(spent.values()):.0f} in all "
          f"({', '.join(f'{phase} {count:.0f}' for phase, count in spent.items())})")  # fmt: skip
    print(f"peak memory {(peak_memory_bytes() or 0) / 1e9:.2f} GB (with the exhaustive search)")
    if path is not None:
        facts = {
            "machine": platform.processor() or platform.machine(), "versions": versions(),
            "config": run.config.to_json(), "forward_equivalents": spent, "median_ratio": statistics.median(ratios),
            "layers": [vars(c) for c in done],
        }  # fmt: skip
        path.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
