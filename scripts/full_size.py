"""Transformers of random weights in their published layout and size: what each stage of the flow takes.

    python scripts/full_size.py                                   DiT-XL/2, 256x256, every backend installed
    python scripts/full_size.py dit-xl --size 512 --stages int8 build
    python scripts/full_size.py flux --stages calibrate int8      4 + 8 blocks of real width, 1024x1024
    python scripts/full_size.py flux --blocks 19 38 --stages int8                             all of Flux.1 (12 B)
    python scripts/full_size.py pixart-sigma --size 512 --calibrate '--groups 10'

Each stage is the command that a user types, in a process of its own, so that its time and peak memory are its own; one
whose output exists is not run again. What each took lies in rows.json in the folder. Random weights say nothing about
quality; they are as large and as slow as real ones. DiT-XL/2 is float32, as it is published; the others are bfloat16 in
shards, with recorded calls. Without the stage calibrate, their int8 files have a scale table with the ranges of the
weights and made-up ranges of inputs: as large and as slow as one that a calibration finds.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from layouts import LAYOUTS, prepare, prepare_dit, write_scales
from stages import BACKENDS, RUN_HERE, apart, installed, keep, rows_of, run_stage, size_of

STAGES = ("trace", "calibrate", "float", "int8", "build", "sample")
DEFAULT_STAGES = ("calibrate", "int8", "build", "sample")
DIT = "dit-xl"
DIT_BLOCKS, DIT_SIZE, SIZE = 28, 256, 1024
DIT_CALIBRATION = "--preset tq-dit --steps 10 --groups 2 --rows-per-group 4 --chains 1"
CALIBRATION = "--preset min-max --groups 1 --rows-per-group 2 --token-share 0.02"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("layout", nargs="?", choices=(DIT, *LAYOUTS), default=DIT)
    add("--folder", type=Path, help="default: build/full-size/LAYOUT-SIZE")
    add("--blocks", type=int, nargs="+", help="default: all of them; of Flux 4 8, double and single")
    add("--heads", type=int, help="of the width that the layout has; default: all of them. Not of DiT-XL/2")
    add("--size", type=int, help=f"of the images (default: {SIZE}; of DiT-XL/2 {DIT_SIZE})")
    add("--text", type=int, help="tokens of the prompt (default: as many as the pipeline takes)")
    add(
        "--stages", nargs="*", choices=STAGES, default=list(DEFAULT_STAGES), help="float and int8: exports; trace: "
        "only trace, and tell the CPU seconds of each step; none: make the weights alone (default: %(default)s)",
    )  # fmt: skip
    add("--backends", nargs="+", choices=list(BACKENDS), help="default: those that are installed")
    add("--calibrate", default="", metavar="FLAGS", help="further flags of tqdit-calibrate")
    add("--export", default="", metavar="FLAGS", help="further flags of tqdit-export")
    add("--again", action="store_true", help="run stages whose output exists")
    args = parser.parse_args()
    is_dit = args.layout == DIT
    size = args.size or (DIT_SIZE if is_dit else SIZE)
    folder: Path = args.folder or Path("build/full-size") / f"{args.layout}-{size}"
    if is_dit:
        if not folder.exists():
            apart(prepare_dit, folder, (args.blocks or [DIT_BLOCKS])[0], size)
    else:
        layout = LAYOUTS[args.layout]
        if not folder.exists():
            blocks = tuple(args.blocks or layout.blocks)
            apart(prepare, folder, args.layout, blocks, args.heads or layout.heads, size, args.text or layout.text)
        if "calibrate" not in args.stages and not (folder / "scales.safetensors").exists():
            apart(write_scales, folder)
    if "trace" in args.stages:
        apart(trace, folder)
    for job in jobs(args, folder):
        row = run_stage(*job, args.again)
        if row is not None:
            keep(folder, row)
    show(folder)


def jobs(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, list[str], Path]]:
    """(name, command, output) of each stage."""
    calls, found, graph = folder / "calls.safetensors", folder / "found.safetensors", folder / "int8.onnx"
    weights, is_dit = weights_of(folder), args.layout == DIT
    model, rows = ["--model", str(weights)], [] if is_dit else ["--rows", str(calls)]
    export = [*(["--vae", str(folder / "vae")] if is_dit else []), *shlex.split(args.export)]
    if "calibrate" in args.stages:
        settings = shlex.split(f"{DIT_CALIBRATION if is_dit else CALIBRATION} {args.calibrate}")
        yield "calibrate", ["calibrate", str(weights), *rows, "-o", str(found), *settings], found
    if "float" in args.stages:
        output = folder / "float.onnx"
        yield "export float", ["export", str(output), *model, "--float", *rows, *export], output
    if "int8" in args.stages:
        scales = found if found.exists() else folder / "scales.safetensors"
        yield "export int8", ["export", str(graph), *model, "--scales", str(scales), *export], graph
    for backend in args.backends or [name for name in BACKENDS if installed(name)]:
        engine, samples = folder / f"{backend}.engine", folder / f"{backend}.npz"
        if "build" in args.stages:
            yield f"build {backend}", ["build", str(graph), "--backend", backend, "-o", str(engine)], engine
        if "sample" in args.stages and backend in RUN_HERE:
            given = ["--steps", "2"] if is_dit else ["--embeddings", str(calls)]
            yield f"sample {backend}", ["sample", str(engine), *given, "-n", "1", "-o", str(samples)], samples


def weights_of(folder: Path) -> Path:
    checkpoint = folder / "dit.pt"
    return checkpoint if checkpoint.exists() else folder / "transformer"


def show(folder: Path) -> None:
    weights = size_of(weights_of(folder))
    print(f"\n{folder.name}: {weights / 1e9:.2f} GB")
    print(f"{'stage':<22} {'seconds':>8} {'CPU s':>8} {'peak GB':>8} {'of the file':>12} {'written GB':>11}")
    for row in rows_of(folder).values():
        print(
            f"{row['stage']:<22} {row['seconds']:8.1f} {row['cpu_seconds']:8.1f} {row['peak_bytes'] / 1e9:8.2f} "
            f"{row['peak_bytes'] / weights:12.2f} {row['size_bytes'] / 1e9:11.3f}"
        )


def trace(folder: Path) -> None:
    """Print the CPU seconds of each step of a trace."""
    from tqdit.exporter.graph import ExportConfig, trace_graph
    from tqdit.exporter.watch import Watch
    from tqdit.models.load import load_model
    from tqdit.models.recording import Recording

    check = Watch.check

    @contextmanager
    def timed(watch: Watch, name: str) -> Iterator[None]:
        started = time.process_time()
        with check(watch, name):
            yield
        print(f"{name:<26} {time.process_time() - started:6.1f} CPU s")

    calls = folder / "calls.safetensors"
    interface = Recording.load(calls).interface if calls.exists() else None
    model = load_model(weights_of(folder), interface=interface, in_memory=False)
    setattr(Watch, "check", timed)  # noqa: B010  the checker of types takes no other signature
    graph = trace_graph(model, ExportConfig())
    print(f"{len(list(graph.graph))} nodes")


if __name__ == "__main__":
    main()
