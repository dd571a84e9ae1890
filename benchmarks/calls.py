"""How many network calls an image takes: error against the converged chain of the same noise, by sampler and calls.

    python benchmarks/calls.py float.engine int8.engine [--calls 8,12,17,25,50] [-n 32] [--json calls.json]

Deterministic samplers, so that chains of one noise end near one another: |x - x_ref|^2 / |x_ref|^2 over final states,
where x_ref is what the first engine's chain of 500 calls of DPM-Solver++ 2M ends with. For each engine the mean over
images and, since a few images whose content flips decide a mean, the median. Of a class-conditional model, which
TQDiT samples with any sampler; a recorded pipeline keeps its own scheduler.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tqdit import Sampler
from tqdit.evaluate.paired import relative_errors
from tqdit.evaluate.tools import processor
from tqdit.sampling.process import Recorded

SAMPLERS = ("ddim", "deis", "heun", "unipc", "dpm++2m")
CONVERGED = ("dpm++2m", 500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", type=Path, metavar="ENGINE", help="the first one is the reference")
    parser.add_argument("--calls", default="8,12,17,25,50", help="default: %(default)s")
    parser.add_argument("--guidance-scale", type=float, default=1.5, help="default: %(default)s")
    parser.add_argument("-n", type=int, default=32, help="images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    opened = {path.name: Sampler.open(path) for path in args.engines}
    cards = [sampler.card for sampler in opened.values()]
    if any(isinstance(card.sampling.process, Recorded) or card.signature.label is None for card in cards):
        parser.error("these engines are of a recorded pipeline; pass engines of a class-conditional model.")
    classes = np.arange(args.n) % (cards[0].signature.label.choices or 1)  # type: ignore[union-attr]

    def sample(engine: str, sampler: str, calls: int) -> tuple[NDArray[np.float32], float]:
        started = time.perf_counter()
        found = opened[engine].sample_latents(classes, args.guidance_scale, args.seed, steps=calls, sampler=sampler)
        return found, time.perf_counter() - started

    reference, _ = sample(next(iter(opened)), *CONVERGED)
    print(f"{args.n} images, guidance {args.guidance_scale:g}, seed {args.seed}; {processor()}")
    print(f"| sampler | calls | {' | '.join(f'{name}, mean | median' for name in opened)} |")
    print("|" + "---|" * (2 + 2 * len(opened)))
    rows = []
    for sampler in SAMPLERS:
        for calls in map(int, args.calls.split(",")):
            cells = []
            for engine in opened:
                found, seconds = sample(engine, sampler, calls)
                errors = relative_errors(reference, found)
                mean, median = float(errors.mean()), float(np.median(errors))
                rows.append({"engine": engine, "sampler": sampler, "calls": calls, "mean": mean, "median": median,
                             "seconds": seconds})  # fmt: skip
                cells += [f"{mean:.1e}", f"{median:.1e}"]
            print(f"| {sampler} | {calls} | {' | '.join(cells)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"images": args.n, "seed": args.seed, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
