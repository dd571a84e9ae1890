"""What forecasts of a network's blocks are worth: error against full calls, beside the same solvers without them.

    python benchmarks/forecasts.py [--scales scales.safetensors] [--spacing log-snr] [-n 32] [--json forecasts.json]
    python benchmarks/forecasts.py text [--scales text.safetensors]       the text demo, on captions never trained on

A call is full, or a forecast: then the tokens get d, extrapolated from earlier full calls, in place of the blocks.
d = the tokens after the last block less those before the first one; the extrapolation is linear in the timestep
(`tqdit.sampling.forecasts`). The first two calls and the last one are full, and every k-th of those between.

Of a demo model in PyTorch, float and with --scales, and of an engine of it with --engine. Deterministic chains are
compared with 500 calls of DPM-Solver++ 2M of the float model, those of DDPM with the chain of all full calls:
|x - x_ref|^2 / |x_ref|^2 of the last states of one noise, median and mean over the images. In PyTorch a forecast
computes the blocks, too: seconds mean something for engines alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tqdit.engines.run.sampler import Sampler
from tqdit.evaluate.paired import relative_errors
from tqdit.evaluate.tools import processor
from tqdit.ports import check_requests
from tqdit.quantization.fake_quant import apply
from tqdit.quantization.table import read_scale_table
from tqdit.sampling import chains
from tqdit.sampling.chains import Chains, Float32, Network
from tqdit.sampling.guidance import check_scale
from tqdit.sampling.placement import spacings

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from ablation_subjects import STEPS, SUBJECTS

CONVERGED = ("dpm++2m", 500)


def every(calls: int, gap: int) -> NDArray[np.bool_]:
    """Which calls are full."""
    full = (np.arange(calls) - 1) % gap == 0
    full[[0, 1, -1]] = True
    return full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=list(SUBJECTS), default="demo")
    parser.add_argument("--scales", type=Path, help="also with these scales of the model")
    parser.add_argument("--guidance-scale", type=float, help="default: 1.5, and the text demo's own")
    parser.add_argument("-n", type=int, default=32, help="images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spacing", choices=("uniform", "karras", "log-snr"), default="uniform", help="of dpm++2m's "
                        "steps (default: %(default)s)")  # fmt: skip
    parser.add_argument("--engine", type=Path, help="also on this engine, built from a file of tqdit-export --forecast")
    parser.add_argument("--ddpm", action="store_true", help="also DDPM's chain of 250 steps")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.ddpm and args.model != "demo":
        parser.error("--ddpm: the text demo has no such chain")
    subject = SUBJECTS[args.model](STEPS[args.model], args.n, args.n)
    model = subject.model
    _, requests = check_requests(model.signature, subject.job.requests(0, subject.prompts))
    scale = check_scale(
        model.guidance, 1.5 if args.guidance_scale is None and args.model == "demo" else args.guidance_scale
    )
    models: dict[str, Network] = {"float": model}
    if args.scales:
        table = read_scale_table(args.scales)
        models["W8A8"] = apply(model, table)

    if args.engine:
        models["engine"] = Sampler.open(args.engine).network

    def sample(network: Network, sampler: str, calls: int, gap: int = 1) -> Float32:
        batch = Chains(model.signature, model.guidance, args.n)
        spec = model.sampling.choose(calls, sampler)
        if sampler == CONVERGED[0] and calls < CONVERGED[1]:
            assert spec.process.noising is not None
            spec = spec.choose(timesteps=spacings(spec.process.noising, calls)[args.spacing])
        spec = spec.choose(full_calls=np.flatnonzero(every(calls, gap)).tolist())
        for image in range(args.n):
            request = {name: values[image] for name, values in requests.items()}
            batch.add(spec.schedule, request, scale, args.seed, image)
        return chains.run(batch, network).copy()

    print(f"{args.model}: {args.n} images, guidance {scale:g}, seed {args.seed}, spacing {args.spacing}; {processor()}")
    print("| chain | full calls | model | forecasts | median | mean | seconds |")
    print("|---|---|---|---|---|---|---|")
    rows = []

    def report(kind: str, reference: Float32, sampler: str, calls: int, gap: int) -> None:
        full = int(every(calls, gap).sum())
        started = time.perf_counter()
        found = sample(models[kind], sampler, calls, gap)
        seconds = time.perf_counter() - started
        errors = relative_errors(reference, found)
        rows.append({"model": kind, "sampler": sampler, "calls": calls, "full": full, "gap": gap, "seconds": seconds,
                     "median": float(np.median(errors)), "mean": float(errors.mean())})  # fmt: skip
        what = "none" if gap == 1 else f"all but every {gap}th"
        print(f"| {calls} of {sampler} | {full} | {kind} | {what} | {np.median(errors):.1e} | {errors.mean():.1e} | "
              f"{seconds:.1f} |", flush=True)  # fmt: skip

    reference = sample(model, *CONVERGED)
    for kind in models:
        for calls in (8, 10, 12, 14, 17, 20, 25, 34, 50):
            report(kind, reference, "dpm++2m", calls, 1)
        for calls in (16, 20, 25, 34, 50, 75, 100):
            for gap in (2, 3, 4):
                report(kind, reference, "dpm++2m", calls, gap)
    if args.ddpm:
        for kind, each in models.items():
            whole = sample(each, "ddpm", 250)
            if kind != "float":
                report(kind, sample(model, "ddpm", 250), "ddpm", 250, 1)  # what 8 bits cost on that chain
            for gap in (2, 3):
                report(kind, whole, "ddpm", 250, gap)
    if args.json:
        args.json.write_text(
            json.dumps({"model": args.model, "images": args.n, "seed": args.seed, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
