"""How many network calls an image takes: error against the converged chain of the same noise, by sampler, spacing of
its steps and number of calls.

    python benchmarks/calls.py float.engine int8.engine [--calls 8,12,15,25] [-n 32] [--json calls.json]

|x - x_ref|^2 / |x_ref|^2 over final states, where x_ref is what a long chain of the first engine ends with. The table
has the median over images and, since a few images whose content flips decide it, the mean. `placed` steps are found on
other noise with the first engine (tqdit-calibrate --calls does the same). For any model that takes several samplers;
one that is asked for in words shows the lines of --prompts in turn. `tqdit-evaluate --calls` has the same numbers with
Frechet distances and charts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdit.cli.evaluate import counts
from tqdit.console import Console
from tqdit.engines.bundle import read_manifest
from tqdit.engines.run.requests import encode
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.shards import describe_job
from tqdit.evaluate.calls import check_calls, measure_calls, to_json
from tqdit.evaluate.tools import processor
from tqdit.text import read_prompts

TODAY = (("ddim", 50), ("ddim", 250))  # sampler and steps that few calls are compared with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, metavar="FLOAT", help="engine of the float model")
    parser.add_argument("engine", type=Path, metavar="ENGINE")
    parser.add_argument("--calls", type=counts, default=(8, 12, 15, 25), help="default: 8,12,15,25")
    parser.add_argument("--samplers", nargs="+", metavar="NAME", help="default: every deterministic one")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one in each line, in turn")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's own")
    parser.add_argument("-n", type=int, default=32, help="images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--today", action="store_true", help="also DDIM with 50 and 250 steps")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    manifest, console = read_manifest(args.engine), Console()
    check_calls(manifest.card.sampling, args.calls)
    prompts = None if args.prompts is None else encode(args.engine, manifest.card, read_prompts(args.prompts))
    job = describe_job(args.engine, manifest, prompts, args.seed, args.n, 16, guidance_scale=args.guidance_scale)
    with Sampler.open(args.reference) as floating, Sampler.open(args.engine) as engine:
        points = measure_calls(
            engine, floating, job, args.calls, console, samplers=args.samplers or (), also=TODAY if args.today else (),
            prompts=prompts,
        )  # fmt: skip
    print(f"{args.n} images, guidance {job.guidance_scale}, seed {args.seed}; {processor()}; {manifest.versions}")
    columns = sorted({point.calls for point in points})
    print(f"| sampler, steps | {' | '.join(f'{calls:g} calls' for calls in columns)} |")
    print("|" + "---|" * (1 + len(columns)))
    for method in dict.fromkeys((point.sampler, point.spacing) for point in points):
        cells = {p.calls: f"{p.error_median:.1e}; {p.error.value:.1e}" for p in points
                 if p.error is not None and (p.sampler, p.spacing) == method}  # fmt: skip
        print(f"| `{method[0]}`, {method[1]} | {' | '.join(cells.get(calls, '') for calls in columns)} |")
    if args.json:
        args.json.write_text(json.dumps({"images": args.n, "seed": args.seed, "points": to_json(points)}) + "\n")


if __name__ == "__main__":
    main()
