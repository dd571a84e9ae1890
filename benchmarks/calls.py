"""How many network calls an image takes: error against the converged chain of the same noise, by sampler, spacing of
its steps and number of calls.

    python benchmarks/calls.py float.engine int8.engine [--calls 8,12,15,25] [-n 32] [--json calls.json]

|x - x_ref|^2 / |x_ref|^2 over final states, where x_ref is what a long chain of the first engine ends with. The table
has the median over images and, since a few images whose content flips decide it, the mean. `placed` steps are found on
other noise with the first engine (tqdit-calibrate --calls does the same). The last lines are DDIM with 50 and 250
steps. For a model that TQDiT samples with any sampler; a recorded pipeline keeps its own scheduler. `tqdit-evaluate
--calls` has the same numbers with Frechet distances and charts.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from tqdit.cli.evaluate import counts
from tqdit.console import Console
from tqdit.engines.bundle import read_manifest
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.shards import describe_job
from tqdit.evaluate import chains
from tqdit.evaluate.calls import check_calls, converged, deterministic, measure_calls, to_json
from tqdit.evaluate.paired import relative_errors
from tqdit.evaluate.tools import processor

TODAY = (("ddim", 50), ("ddim", 250))  # sampler and steps that few calls are compared with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, metavar="FLOAT", help="engine of the float model")
    parser.add_argument("engine", type=Path, metavar="ENGINE")
    parser.add_argument("--calls", type=counts, default=(8, 12, 15, 25), help="default: 8,12,15,25")
    parser.add_argument("--samplers", nargs="+", metavar="NAME", help="default: every deterministic one")
    parser.add_argument("--guidance-scale", type=float, default=1.5, help="default: %(default)s")
    parser.add_argument("-n", type=int, default=32, help="images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    manifest, console = read_manifest(args.engine), Console()
    check_calls(manifest.card.sampling, args.calls)
    job = describe_job(args.engine, manifest, None, args.seed, args.n, 16, guidance_scale=args.guidance_scale)
    with Sampler.open(args.reference) as floating, Sampler.open(args.engine) as engine:
        samplers = args.samplers or deterministic(manifest.card.sampling.process)
        points = measure_calls(engine, floating, job, args.calls, console, samplers=samplers)
        end = chains.run(floating, converged(job, manifest.card.sampling.process), lambda: None).latents
        today = [
            chains.run(engine, replace(job, sampler=sampler, steps=steps, timesteps=()), lambda: None).latents
            for sampler, steps in TODAY
        ]
    print(f"{args.n} images, guidance {args.guidance_scale:g}, seed {args.seed}; {processor()}; {manifest.versions}")
    print(f"| sampler, steps | {' | '.join(f'{calls} calls' for calls in args.calls)} |")
    print("|" + "---|" * (1 + len(args.calls)))
    for method in dict.fromkeys((point.sampler, point.spacing) for point in points):
        cells = {p.calls: f"{p.error_median:.1e}; {p.error.value:.1e}" for p in points
                 if (p.sampler, p.spacing) == method}  # fmt: skip
        print(f"| `{method[0]}`, {method[1]} | {' | '.join(cells.get(calls, '') for calls in args.calls)} |")
    for (sampler, steps), found in zip(TODAY, today, strict=True):
        errors = relative_errors(end, found)
        print(f"{steps} steps of {sampler}: {np.median(errors):.1e}; {errors.mean():.1e}")
    if args.json:
        args.json.write_text(json.dumps({"images": args.n, "seed": args.seed, "points": to_json(points)}) + "\n")


if __name__ == "__main__":
    main()
