"""What the loop around an engine costs per step: noise, checks, bookkeeping. Needs NumPy alone.

    python benchmarks/loop_overhead.py [--shape 4,32,32] [--rows 1,2,8,16] [--engine-ms 500] [--json loop.json]

The engine is a stand-in that returns the same array at once, so that everything else is what is measured: milliseconds
per step of a DDPM chain (a new noise array per row and step), median of the repetitions and their range. --engine-ms
is what a real step of --engine-rows rows takes; the overhead is printed as a part of it (the target is 1 %).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit import __version__
from tqdit.card import GraphCard
from tqdit.diffusion import SamplingSpec
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.step_batcher import StepBatcher
from tqdit.sampling.noise import Normals


class InstantEngine:
    """Returns zeros of the right shape at once."""

    def __init__(self, rows: int, shape: tuple[int, ...]) -> None:
        self._answers = [np.zeros((count, *shape), np.float32) for count in range(rows + 1)]

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        return self._answers[len(inputs["x"])]

    def close(self) -> None:
        pass


def card(shape: tuple[int, int, int], steps: int) -> GraphCard:
    """A latent model's, which needs no decoder."""
    return GraphCard(
        graph="step", channels=shape[0], out_channels=2 * shape[0], height=shape[1], width=shape[2], num_classes=1000,
        guided=True, guidance_scale=4.0, sampling=SamplingSpec(steps=steps), latent_scale=0.18215, class_names=(),
        model="none", origin="published", fingerprint="", written_by=__version__,
    )  # fmt: skip


def milliseconds(work: Callable[[], object], steps: int, repeat: int) -> list[float]:
    """Per step, for every repetition after one to warm up."""
    work()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start) / steps)
    return times


def measure(shape: tuple[int, int, int], rows: int, steps: int, repeat: int) -> dict[str, list[float]]:
    normals, out = Normals(shape), np.empty(shape, np.float32)

    def noise_alone() -> None:
        for step in range(steps):
            for row in range(rows):
                normals.fill(out, 0, row, step)

    labels = [0] * rows
    sampler = Sampler(card(shape, steps), InstantEngine(rows, shape), batch=rows)
    with StepBatcher(sampler) as batcher:

        def requests() -> None:
            for future in [batcher.submit(0, seed=seed) for seed in range(rows)]:
                future.result()

        return {
            "noise alone": milliseconds(noise_alone, steps, repeat),
            "Sampler": milliseconds(lambda: sampler.sample_latents(labels), steps, repeat),
            "StepBatcher": milliseconds(requests, steps, repeat),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=integers, default=(4, 32, 32), help="C,H,W (default: DiT-XL/2 at 256x256)")
    parser.add_argument("--rows", type=integers, default=(1, 2, 8, 16), help="images per call (default: 1,2,8,16)")
    parser.add_argument("--steps", type=int, default=250, help="of a chain (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=7, help="chains to measure (default: %(default)s)")
    parser.add_argument("--engine-ms", type=float, help="what a real step takes")
    parser.add_argument("--engine-rows", type=int, default=1, help="images of that step (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write everything there")
    args = parser.parse_args()
    results = {rows: measure(args.shape, rows, args.steps, args.repeat) for rows in args.rows}
    print(f"{platform.machine()}, NumPy {np.__version__}; x {'x'.join(map(str, args.shape))}; ms per step")
    print(f"{'rows':>4} {'loop':<12} {'median':>8} {'range':>17} {'per row':>8}")
    for rows, loops in results.items():
        for name, times in loops.items():
            median = statistics.median(times)
            spread = f"{min(times):.3f} to {max(times):.3f}"
            print(f"{rows:>4} {name:<12} {median:8.3f} {spread:>17} {median / rows:8.3f}")
    if args.engine_ms is not None and args.engine_rows in results:
        share = statistics.median(results[args.engine_rows]["Sampler"]) / args.engine_ms
        print(f"overhead of the Sampler at {args.engine_ms:g} ms per step of {args.engine_rows} image(s): {share:.3%}")
    if args.json is not None:
        facts = {
            "machine": platform.processor() or platform.machine(), "numpy": np.__version__, "tqdit": __version__,
            "shape": args.shape, "steps": args.steps, "engine_ms": args.engine_ms,
            "ms_per_step": {str(rows): loops for rows, loops in results.items()},
        }  # fmt: skip
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
