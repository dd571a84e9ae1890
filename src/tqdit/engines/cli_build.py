"""`tqdit-build model.onnx`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdit.console import Console
from tqdit.engines.backends import BACKENDS
from tqdit.engines.build import FLOAT_CHOICES, PRECISIONS, build_engine
from tqdit.engines.bundle import check_overwrite
from tqdit.extras import need
from tqdit.files import check_writable

SUMMARY = "compile an exported ONNX file into an engine bundle"
EXAMPLES = """\
examples:
  tqdit-build                                   model.onnx -> model.engine
  tqdit-build --precision int8 dit.onnx -o dit.engine

The bundle is a folder with all that an edge server needs: compiled graph, decoder, shapes, schedule, checksums."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", type=Path, default=Path("model.onnx"), help="file that tqdit-export wrote (default: "
        "%(default)s)")  # fmt: skip
    add("-o", "--output", type=Path, help="folder to write (default: the model's name with .engine)")
    add("--backend", choices=list(BACKENDS), default="onnxruntime", help="default: %(default)s")
    add("--precision", choices=PRECISIONS, help="default: int8 for a quantized file, fp32 for a float one")
    add("--float-type", choices=FLOAT_CHOICES, default="auto", help="of what is not integer (default: %(default)s, "
        "what the backend likes best)")  # fmt: skip
    add("--allow-float-fallback", action="store_true", help="keep an engine although quantized products run in float")
    add("--force", action="store_true", help="replace a folder that is not an engine")


def run(args: argparse.Namespace, console: Console) -> Path:
    need("onnx", "build", "tqdit-build")
    output: Path = args.output or args.model.with_suffix(".engine")
    check_overwrite(output, args.force)
    check_writable(output)
    console.say(f"compiling {args.model} for {args.backend}")
    manifest = build_engine(
        args.model, output, args.backend, args.precision, args.float_type, args.allow_float_fallback
    )
    size = sum(part.size_bytes for part in manifest.files.values())
    console.say(f"{manifest.precision}: {len(manifest.files)} file(s), {size / 1e6:.1f} MB")
    if manifest.audit is not None:
        console.say(manifest.audit.line)
    return output
