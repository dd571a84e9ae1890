"""What the loop around an engine costs per step: noise, update, guidance, checks, bookkeeping. Needs NumPy alone.

    python benchmarks/loop_overhead.py [--case demo|dit-xl] [--images 1,2,8,16] [--engine-ms MS] [--json loop.json]

The engine is a stand-in that returns the same array at once, so everything else is measured: milliseconds per step of a
guided DDPM chain with learned variance (new noise for each image and step). The least of the repetitions is the cost on
an idle core; the median and the largest value show how busy the machine was. --engine-ms is what a real step of
--engine-images images takes; the loop's cost is printed as a part of it. Targets: 5 % of a step of 16 demo images, 1 %
of a step of DiT-XL/2 (docs/runtime.md).
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
from tqdit.card import GraphCard, Latents
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.step_batcher import StepBatcher
from tqdit.ports import Port, Signature
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.noise import Normals
from tqdit.sampling.process import Diffusion
from tqdit.sampling.schedule import SamplingSpec

CASES = {"demo": (3, 16, 16), "dit-xl": (4, 32, 32)}  # the shape of a state


class InstantEngine:
    """Returns zeros of the right shape at once."""

    def __init__(self, rows: int, shape: tuple[int, ...]) -> None:
        self._answers = np.zeros((rows, *shape), np.float32)

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        return self._answers[: len(inputs["x"])]


def card(shape: tuple[int, int, int], steps: int) -> GraphCard:
    """Of a class-conditional DiT whose states are not pictures, so that no image is made."""
    ports = (
        Port("x", "state", "float32", (None, *shape)),
        Port("timestep", "time", "int64", (None,)),
        Port("class_labels", "request", "int64", (None,), null=1000, values=1001),
    )
    return GraphCard(
        graph="denoiser", signature=Signature(ports, (None, 2 * shape[0], *shape[1:]), "DiT"),
        sampling=SamplingSpec(Diffusion(learned_variance=True), "ddpm", steps), guidance=Guidance(4.0),
        latents=Latents(0.18215), class_names=(), model="none", origin="none", fingerprint="", written_by=__version__,
    )  # fmt: skip


def milliseconds(work: Callable[[], object], steps: int, repeat: int) -> list[float]:
    """Per step, for every repetition after one that warms up."""
    work()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start) / steps)
    return times


def measure(shape: tuple[int, int, int], images: int, steps: int, repeat: int) -> dict[str, list[float]]:
    normals, out = Normals(shape), np.empty((images, *shape), np.float32)

    def noise_alone() -> None:
        for step in range(steps):
            normals.fill_rows(out, [(0, image, step) for image in range(images)])

    labels = [0] * images
    engine = InstantEngine(2 * images, (2 * shape[0], *shape[1:]))
    sampler = Sampler(card(shape, steps), engine, batch=images)
    with StepBatcher(sampler) as batcher:

        def requests() -> None:
            for future in [batcher.submit(0, seed=seed) for seed in range(images)]:
                future.result()

        return {
            "noise alone": milliseconds(noise_alone, steps, repeat),
            "Sampler": milliseconds(lambda: sampler.sample_latents(labels), steps, repeat),
            "StepBatcher": milliseconds(requests, steps, repeat),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="dit-xl", help="default: %(default)s, at 256x256")
    parser.add_argument("--images", type=integers, default=(1, 2, 8, 16), help="images per call (default: 1,2,8,16)")
    parser.add_argument("--steps", type=int, default=250, help="of a chain (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=7, help="chains to measure (default: %(default)s)")
    parser.add_argument("--engine-ms", type=float, help="what a real step takes")
    parser.add_argument("--engine-images", type=int, default=1, help="images of that step (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write everything there")
    args = parser.parse_args()
    shape = CASES[args.case]
    results = {images: measure(shape, images, args.steps, args.repeat) for images in args.images}
    print(f"{platform.machine()}, NumPy {np.__version__}; state {'x'.join(map(str, shape))}; ms per step")
    print(f"{'images':>6} {'loop':<12} {'least':>8} {'median':>8} {'most':>8} {'per image':>10}")
    for images, loops in results.items():
        for name, times in loops.items():
            numbers = f"{min(times):8.3f} {statistics.median(times):8.3f} {max(times):8.3f}"
            print(f"{images:>6} {name:<12} {numbers} {min(times) / images:10.4f}")
    if args.engine_ms is not None and args.engine_images in results:
        share = min(results[args.engine_images]["Sampler"]) / args.engine_ms
        print(f"the loop takes {share:.2%} of {args.engine_ms:g} ms per step of {args.engine_images} image(s)")
    if args.json is not None:
        facts = {
            "machine": platform.processor() or platform.machine(), "numpy": np.__version__, "tqdit": __version__,
            "shape": shape, "steps": args.steps, "engine_ms": args.engine_ms,
            "ms_per_step": {str(images): loops for images, loops in results.items()},
        }  # fmt: skip
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
