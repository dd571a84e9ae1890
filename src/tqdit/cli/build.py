"""`tqdit-build model.onnx`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdit.bounds import check_number
from tqdit.console import Console
from tqdit.engines.backends import backend_names
from tqdit.engines.bundle import CALLS_FILE, Manifest, check_overwrite
from tqdit.engines.config import FLOAT_CHOICES, PRECISIONS, BatchRange, BuildConfig, Progress, silent
from tqdit.errors import UsageError
from tqdit.files import check_writable

SUMMARY = "compile an exported ONNX file into an engine bundle"
EXAMPLES = """\
examples:
  tqdit-build                                   model.onnx -> model.engine
  tqdit-build --precision int8 dit.onnx -o dit.engine
  tqdit-build float.onnx fused.onnx             two forms of attention -> the faster one as float.engine
  tqdit-build --trtexec for-the-gpu             a folder that trtexec compiles on a machine without tqdit

The bundle is a folder with all that an edge server needs: compiled graph, decoder, shapes, schedule, checksums."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="*", type=Path, default=[Path("model.onnx")], help="file that tqdit-export wrote (default: "
        "model.onnx); of several, such as forms of attention, the fastest on this machine is kept")  # fmt: skip
    add("-o", "--output", type=Path, help="folder to write (default: the model's name with .engine)")
    add("--backend", choices=["auto", *backend_names()], default="auto", help="default: the best one that is installed "
        "and runs on this machine")  # fmt: skip
    add("--precision", choices=PRECISIONS, help="default: int8 for a quantized file, else fp32; fp8: TensorRT")
    add("--float-type", choices=FLOAT_CHOICES, default="auto", help="of what is not integer (default: %(default)s, "
        "what the backend prefers)")  # fmt: skip
    add("--allow-float-fallback", action="store_true", help="keep an engine although quantized products run in float")
    add("--batch", metavar="MIN,OPT,MAX", help="images per call that a GPU engine is made for (default: 1,16,16)")
    add("--provider", choices=["cpu", "cuda", "tensorrt"], help="execution provider of ONNX Runtime (default: cpu)")
    add("--target", action="append", default=[], metavar="CC", help="compute capability for TensorRT-RTX, such as 8.9; "
        "repeat it for several (default: portable)")  # fmt: skip
    add("--workspace", type=float, metavar="MIB", help="scratch memory of TensorRT at most")
    add("--timing-cache", type=Path, metavar="FILE", help="TensorRT's timings, read when the file exists, then written")
    add("--optimization-level", type=int, choices=range(6), help="of TensorRT")
    add("--version-compatible", action="store_true", help="a TensorRT plan that later versions of its major one run")
    add("--exclude-lean-runtime", action="store_true", help="with --version-compatible: leave the lean runtime out")
    add("--device", type=int, metavar="N", help="index of the GPU to build on (default: the current one)")
    add("--no-plugins", action="store_true", help="TensorRT: standard ops in place of the custom ops' kernels")
    add("--refit", action="store_true", help="TensorRT: an engine whose weights can be replaced; if OUTPUT is such an "
        "engine of the same graph and this machine has its GPU, replace them in place of compiling")  # fmt: skip
    add("--weight-streaming", action="store_true", help="TensorRT: weights may stay in the host's memory "
        "(tqdit-sample --weight-budget)")  # fmt: skip
    add(
        "--optimum", type=Path, metavar="DIR", help="OpenVINO: also write DIR/transformer for optimum-intel's pipelines"
    )
    add("--triton", type=Path, metavar="DIR", help="also write DIR/NAME, a model of Triton Inference Server "
        "that runs the engine in its Python backend")  # fmt: skip
    add("--trtexec", type=Path, metavar="DIR", help="in place of compiling: write DIR with the ONNX file as TensorRT's "
        "parser gets it, and the trtexec command that compiles it")  # fmt: skip
    add("--cache", type=Path, metavar="DIR", help="take the engine from DIR if the same file was built with the same "
        "settings, libraries, GPU and driver; otherwise keep it there")  # fmt: skip
    add("--force", action="store_true", help="replace the engine of another version of tqdit; other folders are never "
        "replaced")  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> Path:
    # onnx is an optional library; these modules answer its absence
    from tqdit.engines.build.backend import choose_backend
    from tqdit.engines.build.cache import build_cached
    from tqdit.onnx_file import OnnxFile

    if args.trtexec is not None:
        return _for_trtexec(args, console)
    model: Path = args.model[0]
    output: Path = args.output or model.with_suffix(".engine")
    if args.output is None and (engines := [path for path in args.model[1:] if path.suffix == output.suffix]):
        raise UsageError(f"{engines[0]}: expected ONNX files. The engine is named with -o: -o {engines[0]}.")
    check_writable(output)
    check_overwrite(output, args.force)
    config = _config(args)
    backend = args.backend
    if backend == "auto":
        backend, why = choose_backend()
        console.say(f"backend {backend}: {why}")
    if args.optimum is not None:
        if backend != "openvino":
            raise UsageError(f"--optimum has no meaning for {backend}. Leave it out, or pass --backend openvino.")
        from tqdit.engines.backends.openvino.optimum import check_optimum, write_optimum

        check_writable(args.optimum / "transformer")
        check_optimum(OnnxFile.read(model).own_card, args.optimum)
    if args.triton is not None:
        from tqdit.engines.build.triton import check_triton, write_triton

        check_writable(args.triton / output.stem)
        check_triton(args.triton, output.stem)
    console.say(f"compiling {', '.join(map(str, args.model))} for {backend}")
    with _progress_bar(console) as progress:
        manifest, kept = build_cached(args.model, output, args.cache, backend, config, progress)
    if kept is not None:
        console.say(f"nothing compiled: the engine of an earlier build, {kept}")
    size = sum(part.size_bytes for part in manifest.files.values())
    console.say(f"{manifest.precision}: {len(manifest.files)} file(s), {size / 1e6:.1f} MB")
    for line in _timings(manifest):
        console.say(line)
    if manifest.weights == "refitted":
        console.say("replaced the weights of the engine that was there; its layers, and so its audit, are as before")
    if manifest.audit is not None:
        console.say(manifest.audit.line)
    if manifest.verified is not None:
        console.say(manifest.verified.line)
    elif CALLS_FILE in manifest.files:
        console.say(
            f"golden calls: not run, since {backend} engines do not run here; the first opening on a GPU runs them"
        )
    if args.optimum is not None:
        console.say(f"wrote {write_optimum(output, manifest.card, args.optimum)} for optimum-intel")
    if args.triton is not None:
        console.say(f"wrote {write_triton(output, manifest, args.triton, output.stem)} for Triton Inference Server")
    return output


def _for_trtexec(args: argparse.Namespace, console: Console) -> Path:
    from tqdit.engines.build.trtexec import SCRIPT, check_trtexec, write_trtexec

    others = {"-o": args.output, "--optimum": args.optimum, "--triton": args.triton, "--cache": args.cache}
    found = [flag for flag, value in others.items() if value is not None]
    if args.backend not in ("auto", "tensorrt"):
        found.append(f"--backend {args.backend}")
    if len(args.model) > 1:
        found.append(f"{len(args.model)} files")
    if found:
        raise UsageError(f"--trtexec compiles nothing and takes one file; found {', '.join(found)}. Leave that out.")
    folder: Path = args.trtexec
    check_writable(folder)
    check_trtexec(folder)
    command = write_trtexec(args.model[0], folder, _config(args))
    console.say(f"nothing compiled, audited or verified; the script runs: {command}")
    return folder / SCRIPT


def _timings(manifest: Manifest) -> Iterator[str]:
    """What was measured of several files; of one file for NVIDIA's GPUs that its form of attention was not."""
    for timing in manifest.measured:
        form = "float graph" if timing.attention is None else f"attention {timing.attention}"
        yield f"{timing.file} ({form}): {timing.median_ms:.2f} ms for {timing.rows} rows"
    quantization = manifest.card.quantization
    if quantization is not None and not manifest.measured and manifest.backend.startswith("tensorrt"):
        yield (
            f"attention {quantization.attention}: not measured against other forms; pass a file of each "
            "(tqdit-export --attention) on the machine with the GPU, and the fastest is kept"
        )


@contextmanager
def _progress_bar(console: Console) -> Iterator[Progress]:
    """A bar for the phase that the compiler is in; it goes when the build ends."""
    if console.quiet:
        yield silent
        return
    with console.bar(1, "compiling", "steps") as bar:
        bar.leave = False

        def show(what: str, done: int, total: int) -> None:
            if bar.desc != what:
                bar.set_description_str(what, refresh=False)
                bar.reset(total=max(total, 1))
            bar.n = done
            bar.refresh()

        yield show


def _config(args: argparse.Namespace) -> BuildConfig:
    workspace = None if args.workspace is None else check_number("--workspace", args.workspace, 1, 2**24)
    return BuildConfig(
        precision=args.precision,
        float_type=args.float_type,
        allow_fallback=args.allow_float_fallback,
        batch=None if args.batch is None else BatchRange.parse(args.batch),
        provider=args.provider,
        targets=tuple(args.target),
        workspace_bytes=None if workspace is None else int(workspace * 2**20),
        timing_cache=args.timing_cache,
        optimization_level=args.optimization_level,
        version_compatible=args.version_compatible,
        lean_runtime="exclude" if args.exclude_lean_runtime else "embed",
        device=args.device,
        plugins=not args.no_plugins,
        refit=args.refit,
        weight_streaming=args.weight_streaming,
    )
