#!/usr/bin/env python
"""Two engines of the same model on the same noise: one picture, the error between them, sizes and quality.

    python scripts/side_by_side.py float.engine int8.engine -o side_by_side.png
    python scripts/side_by_side.py text-float.engine text.engine --held-out     the text demo: captions never trained on

Prompts are encoded by the second engine for both. Needs what `tqdit-sample` needs, and torch for the judge if the
engines hold a demo model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tqdit.card import SHIPPED
from tqdit.console import Console
from tqdit.demo import captions
from tqdit.engines.bundle import read_manifest
from tqdit.engines.run.images import grid
from tqdit.engines.run.requests import Prompts, encode
from tqdit.engines.run.sampler import Sampler, StepReport, to_pixels
from tqdit.engines.run.shards import SamplingJob, describe_job
from tqdit.evaluate.paired import relative_errors
from tqdit.files import whole_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("-n", type=int, default=64, help="images (%(default)s)")
    parser.add_argument("--steps", type=int, help="default: what the first engine proposes")
    parser.add_argument("--sampler", help="default: what the first engine proposes")
    parser.add_argument("--shown", type=int, default=16, help="images in the picture (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="of the text demo: captions that were never trained on")
    parser.add_argument("-o", "--output", type=Path, default=Path("side_by_side.png"))
    args = parser.parse_args()
    card = read_manifest(args.other).card
    prompts = encode(args.other, card, captions.draw_captions(args.n, args.held_out)) if card.model == "text" else None
    manifest = read_manifest(args.reference)
    job = describe_job(
        args.reference, manifest, prompts, args.seed, args.n, args.n, steps=args.steps, sampler=args.sampler
    )
    results = [sample(engine, job, prompts) for engine in (args.reference, args.other)]
    sheets = [np.asarray(grid(to_pixels(x[: args.shown]))) for x, _ in results]
    gap = np.full((len(sheets[0]), 12, 3), 255, np.uint8)
    with whole_file(args.output) as temporary:
        Image.fromarray(np.concatenate([sheets[0], gap, sheets[1]], axis=1)).save(temporary, format="PNG")
    for engine, (x, seconds) in zip((args.reference, args.other), results, strict=True):
        manifest = read_manifest(engine)
        encoders = manifest.card.text.files if manifest.card.text else ()
        size = sum(part.size_bytes for name, part in manifest.files.items() if name not in encoders)
        milliseconds = 1000 * seconds / args.n / job.steps
        line = f"{engine.name}: {manifest.precision}, {size / 1e6:.2f} MB"
        line += f"{' without text encoders' * bool(encoders)}, {milliseconds:.2f} ms per image and step"
        print(line + (f", {quality(to_pixels(x), job)}" if manifest.card.model in SHIPPED else ""))
    errors = relative_errors(results[0][0], results[1][0])
    what = f"error |x0 - x0_ref|^2 / |x0_ref|^2 of {args.n} chains of the same noise"
    print(f"{what}: median {np.median(errors):.2e}, mean {errors.mean():.2e}")
    print(args.output)


def sample(engine: Path, job: SamplingJob, prompts: Prompts | None) -> tuple[NDArray[np.float32], float]:
    """Final states (N, C, H, W) and the seconds that they took."""
    with Sampler.open(engine, batch=16) as sampler:
        started = time.perf_counter()
        with Console().bar(sampler.steps_for(job.count, job.steps), engine.name, "steps") as bar:

            def advance(report: StepReport) -> None:
                bar.update()

            arrays = replace(job, content="latents").make(sampler, 0, advance, prompts)
        return arrays["latents"], time.perf_counter() - started


def quality(images: NDArray[np.uint8], job: SamplingJob) -> str:
    """How many images the demo model's judge recognises; of the text demo, for each thing that captions name."""
    from tqdit.demo.judge import recognised, wilson_interval

    if job.prompts is not None:
        return text_quality(images, job.prompts.texts)
    labels = job.labels(0)
    assert labels is not None
    right = recognised(images, labels)
    low, high = wilson_interval(int(right.sum()), len(right))
    return f"judge recognises {right.mean():.1%} ({low:.1%} to {high:.1%})"


def text_quality(images: NDArray[np.uint8], texts: Sequence[str]) -> str:
    import torch

    from tqdit.demo.judge import wilson_interval
    from tqdit.demo.text_judge import load_text_judge, recognised

    states = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    parts = []
    for name, right in recognised(states, [captions.parse(text) for text in texts], load_text_judge()).items():
        low, high = wilson_interval(int(right.sum()), len(right))
        parts.append(f"{name} {right.mean():.1%} ({low:.1%} to {high:.1%})")
    return f"judge recognises {', '.join(parts)}"


if __name__ == "__main__":
    main()
