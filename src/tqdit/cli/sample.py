"""`tqdit-sample model.engine`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tqdit.bounds import check_count
from tqdit.card import GraphCard
from tqdit.console import Bar, Console
from tqdit.engines.bundle import Manifest, check_parts, read_manifest
from tqdit.engines.gpu import GpuShare
from tqdit.engines.run.backend import check_threads
from tqdit.engines.run.images import FRAMES_PER_S, check_output, kind_of, write_images, write_npz
from tqdit.engines.run.noise_file import check_noise_file, check_size, write_noise
from tqdit.engines.run.requests import Prompts, encode, read_embeddings
from tqdit.engines.run.sampler import Sampler, StepReport, bytes_per_image, choose_batch, makes_images, no_images
from tqdit.engines.run.shards import (
    INDEX,
    SHARD_SIZE,
    SamplingJob,
    ShardFolder,
    describe_job,
    merge_shards,
    open_shards,
)
from tqdit.errors import OutputError, UsageError
from tqdit.extras import need
from tqdit.files import check_writable
from tqdit.sampling.schedule import sampler_names
from tqdit.text import read_prompts

Work = Callable[[ShardFolder, list[int], Bar], None]  # makes these shards

SUMMARY = "sample images with an engine bundle"
EXAMPLES = """\
examples:
  tqdit-sample                                                16 demo images -> samples.png
  tqdit-sample dit.engine -n 8 --classes 207,360 --guidance-scale 4 -o dogs.png
  tqdit-sample text.engine --prompt 'a bold red A on blue' -n 4
  tqdit-sample flux.engine --embeddings prompts.safetensors -n 8 -o flux.npz
  tqdit-sample dit.engine --steps 50 --sampler ddim           another chain than the engine proposes
  tqdit-sample dit.engine --steps 250 --full-calls 126        half the calls are forecasts (tqdit-export --forecast)
  tqdit-sample dit.engine --as-published                      that of the model's origin: 250 steps of ddpm for a DiT
  tqdit-sample dit.engine -n 1000 -o samples.npz              uint8 NHWC under arr_0, as the ADM evaluator reads
  tqdit-sample dit.engine -n 100 -o samples/                  one PNG per image
  tqdit-sample dit.engine -n 50000 -o samples/                .npz shards; the same command continues after a stop
  tqdit-sample dit.engine -n 50000 -o samples/ --ray          the same bytes from as many workers as there are CPUs
  tqdit-sample dit.engine -n 4 --save-noise noise.safetensors for a program that runs the engine without Python
  tqdit-sample --merge samples/ -o samples.npz                one file of all shards

An image depends on the engine, the seed, its number, its class, the guidance, --steps and --sampler, never on
--batch, --threads or --ray."""

IMAGES = 16
MOST_PICTURES = 1000  # in a folder of PNGs, unless --format says otherwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("engine", nargs="?", type=Path, default=Path("model.engine"), help="folder that tqdit-build wrote (default: "
        "%(default)s)")  # fmt: skip
    add("-n", type=int, metavar="N", help=f"images in all (default: {IMAGES}, or one for each prompt)")
    add("--classes", type=_integers, metavar="C,C,...", help="classes, repeated until there are N (default: all "
        "classes in turn); unconditional models take none")  # fmt: skip
    add("--embeddings", type=Path, metavar="FILE", help="what a model of text takes of each prompt: a .safetensors "
        "file with one tensor (prompts, ...) for each request value, or recorded calls; image i shows prompt i modulo "
        "their number")  # fmt: skip
    add("--prompt", action="append", metavar="TEXT", help="what to show, of an engine with text encoders; may be given "
        "several times")  # fmt: skip
    add("--prompts", type=Path, metavar="FILE", help="the same, one in each line of a text file")
    add("--guidance-scale", type=float, metavar="S", help="classifier-free guidance (default: the engine's own)")
    add("--guidance-interval", type=interval, metavar="LOW,HIGH", help="lowest and highest timestep with guidance; "
        "outside, an image takes one row of a call in place of two (default: all)")  # fmt: skip
    add("--steps", type=int, metavar="N", help="sampling steps (default: what the engine proposes)")
    add("--sampler", choices=sampler_names(), help="default: what the engine proposes")
    add("--full-calls", type=int, metavar="N", help="how many of the steps call the whole network; the others forecast "
        "what its blocks add, of engines that tqdit-export --forecast was for (default: what the engine proposes, else "
        "all)")  # fmt: skip
    add("--as-published", action="store_true", help="sampler and steps of the model's origin, such as 250 steps of "
        "ddpm for a DiT, in place of what the engine proposes")  # fmt: skip
    add("--seed", type=int, default=0, help="default: %(default)s")
    add(
        "--batch",
        type=int,
        help="images per engine call at most (default: 16, or fewer if the engine was built for fewer)",
    )
    add("--threads", type=int, help="CPU threads, of each worker with --ray (default: the backend's choice; with "
        "--ray 1)")  # fmt: skip
    add("--device", type=int, metavar="N", help="index of the GPU (default: the current one)")
    add("--weight-budget", type=float, metavar="MIB", help="weights on the GPU at most, if the engine was built "
        "with --weight-streaming (default: all)")  # fmt: skip
    add("-o", "--output", type=Path, default=Path("samples.png"), help="a .png (grid), a .npz or a folder; of "
        "videos also a .gif or .mp4 (default: %(default)s)")  # fmt: skip
    add("--fps", type=int, default=FRAMES_PER_S, metavar="N", help="frames per second of videos (default: %(default)s)")
    add("--save-noise", type=Path, metavar="FILE", help="also write the schedule and the noise of these images, as "
        ".safetensors, for programs that run the engine without Python")  # fmt: skip
    many = parser.add_argument_group("many images (a folder as output)")
    add = many.add_argument
    add("--format", choices=("png", "npz"), help="a PNG per image, or .npz shards that an interrupted run continues "
        f"(default: png up to {MOST_PICTURES} images, npz beyond, for latents and with the flags below)")  # fmt: skip
    add("--shard-size", type=int, metavar="N", help=f"images per shard (default: {SHARD_SIZE})")
    add(
        "--force",
        action="store_true",
        help="remove the shards of another run from the folder and start anew; other files are never removed",
    )
    add("--ray", nargs="?", const="", metavar="ADDRESS", help="make the shards on a Ray cluster: the one at ADDRESS "
        "('auto': the one that runs here), or without ADDRESS one that lives as long as the command")  # fmt: skip
    add("--workers", type=int, metavar="N", help="workers on the Ray cluster at most (default: as many as it has CPUs "
        "or GPUs for)")  # fmt: skip
    add("--merge", type=Path, metavar="FOLDER", help="sample nothing: write the shards of FOLDER as one .npz")


def run(args: argparse.Namespace, console: Console) -> Path:
    output: Path = args.output
    check_writable(output)
    if args.merge is not None:
        if kind_of(output) != "npz":
            raise UsageError(f"{output}: --merge writes an .npz. Pass -o FILE.npz.")
        merge_shards(args.merge, output)
        return output
    _check_numbers(args)
    if args.save_noise is not None:
        check_noise_file(args.save_noise)
        if args.guidance_interval is not None:
            raise UsageError("--save-noise is for a loop with both rows at every step. Leave out --guidance-interval.")
        check_writable(args.save_noise)
    manifest = read_manifest(args.engine)
    choose_batch(args.engine, manifest.batch, args.batch)
    prompts = _prompts(args, manifest)
    if args.n is None:
        args.n = IMAGES if prompts is None else prompts.source.count
    if prompts is not None and args.n < prompts.source.count:
        console.say(_left_out(args.n, prompts.source.count))
    shards = _wants_shards(args, manifest)
    job = _describe(args, manifest, shards, prompts)
    if not shards:
        _check_output(output, job, manifest.card)
    spec = manifest.card.sampling.choose(**job.chain)
    if args.save_noise is not None:
        check_size(args.save_noise, manifest.card, spec, job.count)
    if remark := manifest.card.remark(spec):
        console.say(remark)
    (_sample_shards if shards else _sample_at_once)(args, manifest, job, prompts, console)
    if args.save_noise is not None:
        write_noise(args.save_noise, manifest.card, spec, job.seed, job.count)
    return output


def _prompts(args: argparse.Namespace, manifest: Manifest) -> Prompts | None:
    """What images of a model of text show; None: of another model."""
    if sum(each is not None for each in (args.classes, args.embeddings, args.prompt, args.prompts)) > 1:
        raise UsageError(
            "--classes, --embeddings, --prompt and --prompts each say what the images show. Pass one of them."
        )
    if args.prompt is not None or args.prompts is not None:
        return encode(args.engine, manifest.card, args.prompt or read_prompts(args.prompts))
    return None if args.embeddings is None else read_embeddings(args.embeddings, manifest.card.signature)


def _left_out(images: int, prompts: int) -> str:
    left = prompts - images
    shown = f"{images} image{'s' * (images > 1)} for {prompts} prompts"
    return f"{shown}: the last {left} {'have' if left > 1 else 'has'} none. Leave out -n for one image each."


def _check_numbers(args: argparse.Namespace) -> None:
    """What is wrong with the arguments alone."""
    if args.as_published and any(each is not None for each in (args.steps, args.sampler, args.full_calls)):
        raise UsageError("--as-published names the chain. Leave out --steps, --sampler and --full-calls.")
    if args.n is not None:
        check_count("-n", args.n, 1)
    check_threads(args.threads)
    check_count("--fps", args.fps, 1, 1000)
    for name in ("shard_size", "workers"):
        if getattr(args, name) is not None:
            check_count(f"--{name.replace('_', '-')}", getattr(args, name), 1)
    for name in ("format", "shard_size", "ray", "workers"):
        if getattr(args, name) is not None and (kind := kind_of(args.output)) != "folder":
            raise UsageError(f"--{name.replace('_', '-')} belongs to a folder as output, '{args.output}' is a .{kind}.")
    for flag in ("device", "weight_budget"):
        if getattr(args, flag) is not None and args.ray is not None:
            raise UsageError(f"--{flag.replace('_', '-')}: Ray chooses the GPU of each worker. Leave it out.")
    if args.workers is not None and args.ray is None:
        raise UsageError("--workers belongs to --ray.")
    if args.ray is not None:
        need("ray", "ray", "--ray")


def _check_output(output: Path, job: SamplingJob, card: GraphCard) -> None:
    """Refuse an output that samples in memory cannot go to, before they are made."""
    check_output(output, card.vae is not None and card.vae.frames is not None)
    if job.content == "latents" and kind_of(output) != "npz":
        raise OutputError(f"{output}: {no_images(card)}")


def _describe(args: argparse.Namespace, manifest: Manifest, shards: bool, prompts: Prompts | None) -> SamplingJob:
    """The job that the arguments describe; without shards it is one of all images."""
    size = args.n if not shards else SHARD_SIZE if args.shard_size is None else args.shard_size
    published = manifest.card.as_published if args.as_published else None
    return describe_job(
        args.engine, manifest, args.classes if prompts is None else prompts, args.seed, args.n, size,
        guidance_scale=args.guidance_scale, steps=published.steps if published else args.steps,
        sampler=published.sampler if published else args.sampler, timesteps=() if published else None,
        guidance_interval=args.guidance_interval, full_calls=() if published else args.full_calls,
    )  # fmt: skip


def _wants_shards(args: argparse.Namespace, manifest: Manifest) -> bool:
    if kind_of(args.output) != "folder":
        return False
    needs = [name for name in ("shard_size", "ray", "workers") if getattr(args, name) is not None]
    if args.format == "png" and needs:
        raise UsageError(f"--{needs[0].replace('_', '-')} makes shards; leave out --format png.")
    if args.format is not None:
        return bool(args.format == "npz")
    return bool(needs) or not makes_images(manifest) or args.n > MOST_PICTURES or (args.output / INDEX).is_file()


def _open(args: argparse.Namespace) -> Sampler:
    gpu = GpuShare.with_budget(args.device, args.weight_budget)
    return Sampler.open(args.engine, batch=args.batch, threads=args.threads, device=gpu)


def _sample_at_once(
    args: argparse.Namespace, manifest: Manifest, job: SamplingJob, prompts: Prompts | None, console: Console
) -> Path:
    """All samples in memory, then one output."""
    output: Path = args.output
    with _open(args) as sampler:
        calls = sampler.steps_for(job.count, job.steps)
        started = time.perf_counter()
        with console.bar(calls, "sampling", "steps") as bar:

            def advance(report: StepReport) -> None:
                bar.update()

            arrays = job.make(sampler, 0, advance, prompts)
        seconds = time.perf_counter() - started
    console.say(
        f"{job.count} image{'s' * (job.count > 1)} in {seconds:.2f} s: {seconds / job.count:.3f} s per image, "
        f"{1000 * seconds / calls:.1f} ms per step of up to {sampler.batch} images"
    )
    if job.content == "latents":
        write_npz(output, **arrays)
    else:
        prompts_told = {"prompts": job.prompts.texts} if job.prompts and job.prompts.texts else {}
        notes = {
            "engine": manifest.card.fingerprint, **{name: value for name, value in job.chain.items() if value},
            "seed": job.seed, "guidance_scale": job.guidance_scale, **prompts_told,
        }  # fmt: skip
        write_images(output, arrays["arr_0"], job.labels(0), notes, args.fps)
    return output


def _sample_shards(
    args: argparse.Namespace, manifest: Manifest, job: SamplingJob, prompts: Prompts | None, console: Console
) -> Path:
    """Shard by shard, here or on a cluster."""
    output: Path = args.output
    with ExitStack() as stack:
        folder = stack.enter_context(open_shards(output, job, args.force, bytes_per_image(manifest.card)[1]))
        here = args.ray is None
        work = _work_here(args, prompts, stack) if here else _work_on_cluster(args, manifest, prompts, console)
        pending = folder.pending()
        images = sum(len(job.images(shard)) for shard in pending)
        if folder.done:
            console.say(f"{folder.done} of {job.shards} shards are there; {images} images are left")
        started = time.perf_counter()
        try:
            with console.bar(images, "sampling", "images") as bar:
                if pending:
                    work(folder, pending, bar)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{folder.done} of {job.shards} shards are done and kept in {output}") from None
        console.say(f"{images} images in {time.perf_counter() - started:.2f} s; {folder.done} shards are done")
    return output


def _work_here(args: argparse.Namespace, prompts: Prompts | None, stack: ExitStack) -> Work:
    sampler = stack.enter_context(_open(args))

    def work(folder: ShardFolder, pending: list[int], bar: Bar) -> None:
        def advance(report: StepReport) -> None:
            bar.set_postfix_str(f"step {report.steps - report.step} of {report.steps}", refresh=False)
            bar.update(len(report.images) if report.step == 0 else 0)

        for shard in pending:
            folder.add(shard, folder.job.make(sampler, shard, advance, prompts))

    return work


def _work_on_cluster(args: argparse.Namespace, manifest: Manifest, prompts: Prompts | None, console: Console) -> Work:
    from tqdit.engines.run.ray_workers import Cluster, ClusterConfig

    check_parts(args.engine, manifest)
    config = ClusterConfig(args.ray or None, args.workers, args.batch, args.threads)
    return Cluster(args.engine, manifest, config, console, prompts).work


def interval(text: str) -> tuple[float, float]:
    """LOW,HIGH of the command line."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not two numbers like 200,800") from None
    return low, high


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of integers like 0,1,2") from None
