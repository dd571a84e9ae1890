"""`tqdit-sample model.engine`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from tqdit.console import Console
from tqdit.engines.images import check_output, kind_of, write_images, write_npz
from tqdit.engines.sampler import Sampler, StepReport
from tqdit.errors import OutputError, UsageError
from tqdit.files import check_writable

SUMMARY = "sample images with an engine bundle"
EXAMPLES = """\
examples:
  tqdit-sample                                                16 demo images -> samples.png
  tqdit-sample dit.engine -n 8 --classes 207,360 --guidance-scale 4 -o dogs.png
  tqdit-sample dit.engine -n 1000 -o samples.npz              uint8 NHWC under arr_0, as the ADM evaluator reads

An image depends on the engine, the seed, its number, its class and the guidance, never on --batch or --threads."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("engine", nargs="?", type=Path, default=Path("model.engine"), help="folder that tqdit-build wrote (default: "
        "%(default)s)")  # fmt: skip
    add("-n", type=int, default=16, metavar="N", help="images in all (default: %(default)s)")
    add("--classes", type=_integers, metavar="C,C,...", help="class labels, cycled (default: all classes in turn)")
    add("--guidance-scale", type=float, metavar="S", help="classifier-free guidance (default: the engine's own)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add(
        "--batch", type=int, help="images per engine call at most (default: 16, or fewer where the engine was built so)"
    )
    add("--threads", type=int, help="CPU threads (default: the backend's choice)")
    add("-o", "--output", type=Path, default=Path("samples.png"), help="a .png (grid), a .npz or a folder of PNGs "
        "(default: %(default)s)")  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> Path:
    output: Path = args.output
    check_output(output)
    check_writable(output)
    if args.n < 1:
        raise UsageError(f"-n is {args.n}; at least one image is needed.")
    with Sampler.open(args.engine, batch=args.batch, threads=args.threads) as sampler:
        labels = np.resize(args.classes or np.arange(sampler.card.num_classes), args.n).astype(np.int64)
        if not sampler.makes_images and kind_of(output) != "npz":
            raise OutputError(
                f"{output}: this engine makes latents and has no decoder. Name a .npz, or export again with --vae DIR."
            )
        started = time.perf_counter()
        with console.bar(sampler.steps_for(args.n), "sampling", "steps") as bar:

            def advance(report: StepReport) -> None:
                bar.update()

            if sampler.makes_images:
                images = sampler.sample(labels, args.guidance_scale, args.seed, advance)
            else:
                latents = sampler.sample_latents(labels, args.guidance_scale, args.seed, advance)
        seconds = time.perf_counter() - started
        console.say(
            f"{args.n} images in {seconds:.2f} s: {seconds / args.n:.3f} s per image, "
            f"{1000 * seconds / sampler.steps_for(args.n):.1f} ms per step of up to {sampler.batch} images"
        )
        if sampler.makes_images:
            notes = {"engine": sampler.card.fingerprint, "seed": args.seed, "guidance_scale": args.guidance_scale}
            write_images(output, images, labels, notes)
        else:
            write_npz(output, latents=latents, labels=labels)
    return output


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of integers like 0,1,2") from None
