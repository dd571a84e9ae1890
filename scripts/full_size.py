"""Calibrate, export, build and sample (two steps) a DiT-XL/2 of random weights in the published layout; what each took.

    python scripts/full_size.py                              256x256, small calibration, every backend installed
    python scripts/full_size.py --size 512 --stages export build
    python scripts/full_size.py --stages calibrate --groups 10 --rows-per-group 32 --steps 250 --depth 2

Every stage is the command that a user types, in a process of its own, so that its time and peak memory are its own.
A stage whose output lies in the folder already is not run again unless --again. Random weights say nothing about
quality; they are as large and as slow as real ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STAGES = ("calibrate", "export", "build", "sample")
BACKENDS = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt-rtx": "tensorrt_rtx"}
RUN_HERE = ("onnxruntime", "openvino")  # the others' engines need a GPU


@dataclass(frozen=True)
class Row:
    """One stage."""

    stage: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    size_bytes: int  # of what it wrote


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("build/full-size"))
    add("--size", type=int, choices=(256, 512), default=256, help="of the images; 512 has 1,024 tokens")
    add("--depth", type=int, default=28, help="blocks; fewer for a look at memory alone")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    add("--backends", nargs="+", choices=list(BACKENDS), help="default: those that are installed")
    add("--attention", default="simulated")
    add("--steps", type=int, default=10, help="of the calibration's chains")
    add("--groups", type=int, default=2)
    add("--rows-per-group", type=int, default=4)
    add("--chains", type=int, default=1)
    add("--preset", default="tq-dit")
    add("--device", default="cpu")
    add("--again", action="store_true", help="run stages whose output exists")
    add("--no-vae", action="store_true")
    add("--json", type=Path)
    args = parser.parse_args()
    folder: Path = args.folder / f"{args.size}-{args.depth}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in (run_stage(*job, args.again) for job in jobs(args, folder)) if row is not None]
    checkpoint = folder / "dit.pt"
    print(
        f"\nDiT-XL/2 {args.size}x{args.size}, {args.depth} blocks: {checkpoint.stat().st_size / 1e9:.2f} GB of float32"
    )
    print(f"{'stage':<22} {'seconds':>8} {'peak GB':>8} {'written GB':>11}")
    for row in rows:
        print(f"{row.stage:<22} {row.seconds:8.1f} {row.peak_bytes / 1e9:8.2f} {row.size_bytes / 1e9:11.3f}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def jobs(args: argparse.Namespace, folder: Path) -> list[tuple[str, list[str], Path]]:
    """(name, command, output) of each stage, after making the checkpoint and a decoder where they are missing."""
    checkpoint, scales, graph = folder / "dit.pt", folder / "scales.safetensors", folder / "model.onnx"
    if not checkpoint.exists():
        print("writing random weights", file=sys.stderr)
        apart(write_checkpoint, checkpoint, args.size, args.depth)
    vae = folder / "vae"
    with_vae = not args.no_vae and installed("diffusers")
    if with_vae and not vae.exists():
        apart(write_vae, vae)
    found: list[tuple[str, list[str], Path]] = []
    if "calibrate" in args.stages:
        settings = ["--steps", str(args.steps), "--groups", str(args.groups), "--rows-per-group",
                    str(args.rows_per_group), "--chains", str(args.chains), "--preset", args.preset,
                    "--device", args.device]  # fmt: skip
        found.append(("calibrate", ["calibrate", str(checkpoint), "-o", str(scales), *settings], scales))
    if "export" in args.stages:
        options = ["--steps", "2", "--attention", args.attention, *(["--vae", str(vae)] if with_vae else [])]
        found.append(("export", ["export", str(graph), "--scales", str(scales), *options], graph))
    for backend in args.backends or [name for name in BACKENDS if installed(name)]:
        engine = folder / f"{backend}.engine"
        if "build" in args.stages:
            found.append((f"build {backend}", ["build", str(graph), "--backend", backend, "-o", str(engine)], engine))
        if "sample" in args.stages and backend in RUN_HERE:
            samples = folder / f"{backend}.npz"
            found.append((f"sample {backend}", ["sample", str(engine), "-n", "1", "-o", str(samples)], samples))
    return found


def run_stage(name: str, arguments: Sequence[str], output: Path, again: bool) -> Row | None:
    """Run one command; None where its output was there."""
    if output.exists() and not again:
        print(f"{name}: {output} is there already (--again runs it anew)", file=sys.stderr)
        return None
    print(f"\n$ tqdit-{' '.join(arguments)}", file=sys.stderr)
    started = time.perf_counter()
    process = os.posix_spawn(sys.executable, [sys.executable, "-m", "tqdit.cli", *arguments], os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        sys.exit(f"{name} failed with status {os.waitstatus_to_exitcode(status)}.")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Row(name, time.perf_counter() - started, usage.ru_utime + usage.ru_stime, peak, size_of(output))


def size_of(output: Path) -> int:
    """Bytes of a file with its external data, or of all files in a folder."""
    beside = output.parent.glob(f"{output.stem}-*{output.suffix}.data")
    files = output.rglob("*") if output.is_dir() else (output, *beside)
    return sum(file.stat().st_size for file in files if file.is_file())


def apart(work: Callable[..., None], *arguments: object) -> None:
    """Run in a process of its own: the peak that a stage reports begins with the peak of the process that starts it."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{work.__name__} failed with status {process.exitcode}.")


def write_checkpoint(path: Path, size: int, depth: int) -> None:
    """Random non-zero weights: a fresh DiT has zeros in adaLN, where every block is the identity."""
    import torch

    from tqdit.files import whole_file
    from tqdit.models.dit import DiT, DiTConfig, randomize

    config = DiTConfig(
        input_size=size // 8, patch_size=2, in_channels=4, out_channels=8, hidden_size=1152, depth=depth,
        mlp_hidden_size=4608, num_classes=1000, num_heads=16,
    )  # fmt: skip
    with whole_file(path) as temporary:
        torch.save(randomize(DiT(config)).state_dict(), temporary)


def write_vae(folder: Path) -> None:
    """A narrow AutoencoderKL of random weights with the shapes of Stable Diffusion's: eight times as large images."""
    import diffusers

    autoencoder: Any = diffusers.AutoencoderKL  # which ships no types
    vae = autoencoder(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    vae.save_pretrained(folder)


def machine() -> dict[str, object]:
    facts: dict[str, object] = {"cores": os.cpu_count(), "python": platform.python_version()}
    facts |= {name: version(name) for name in ("torch", "numpy", "onnx", *BACKENDS) if installed(name)}
    return facts


def installed(name: str) -> bool:
    return find_spec(BACKENDS.get(name, name)) is not None


if __name__ == "__main__":
    main()
