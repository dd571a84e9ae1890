"""A file as a backend takes it: of the precision and float type that the build has."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import onnx_ir as ir

from tqdit.card import GraphCard
from tqdit.engines.build.backend import builder
from tqdit.engines.build.cast import cast_floats
from tqdit.engines.build.fp8 import expect, quantize_to_fp8
from tqdit.engines.build.strip import strip_quantization
from tqdit.engines.config import PRECISIONS, QUANTIZED, BuildConfig, FloatType
from tqdit.errors import FileFormatError, TqditWarning, UsageError
from tqdit.files import sha256, temporary_folder
from tqdit.golden import GoldenCalls
from tqdit.graph_names import SCOPE_KEY
from tqdit.onnx_file import OnnxFile, save

MUCH_WORSE = 2  # times the error of int8


def settled(file: OnnxFile, card: GraphCard, backend: str, config: BuildConfig) -> BuildConfig:
    """The settings with a precision and a float type. Raises UsageError for what the backend or the file cannot do,
    FileFormatError for a file without its weights, its decoder or the scopes of its nodes.
    """
    config = _choose_precision(file.path, card, config)
    _check_file(file, card)
    compiler = builder(backend)
    config.refuse_unknown(backend, compiler.OPTIONS)
    if card.rows is not None and config.batch is not None:
        raise UsageError(
            f"--batch: the graph of {file.path} takes {card.rows} row a call and no other number. Leave it out."
        )
    if config.precision == "fp8" and not compiler.TAKES_FP8:
        raise UsageError(f"--precision fp8: {backend} has no FP8 products. Use --backend tensorrt-rtx or tensorrt.")
    offered, wanted = compiler.float_types(config), config.float_type
    if wanted not in ("auto", *offered):
        raise UsageError(f"--float-type {wanted}: {backend} would only emulate it here; it has {', '.join(offered)}.")
    return replace(config, float_type=offered[0] if wanted == "auto" else wanted)


def _choose_precision(source: Path, card: GraphCard, config: BuildConfig) -> BuildConfig:
    """The precision of the products, and with a float one the same float type around them."""
    held = "int8" if card.quantization is not None else "fp32" if config.float_type == "auto" else config.float_type
    precision = config.precision or held
    if precision not in PRECISIONS:
        raise UsageError(f"precision '{precision}' is not one of {', '.join(PRECISIONS)}.")
    if precision in QUANTIZED:
        if card.quantization is None:
            raise UsageError(f"{source}: holds a float graph, asked for {precision}. Export it with a scale table.")
        return replace(config, precision=precision)
    if config.float_type not in ("auto", precision):
        raise UsageError(f"--precision {precision} and --float-type {config.float_type} contradict. Pass one of them.")
    return replace(config, precision=precision, float_type=cast(FloatType, precision))


def _check_file(file: OnnxFile, card: GraphCard) -> None:
    _ = file.weight_files  # raises if one is missing
    if not file.scopes:
        raise FileFormatError(
            f"{file.path}: no node says to which module it belongs (metadata '{SCOPE_KEY}'). An older tqdit-export "
            "wrote it, or another program removed the metadata. Export again."
        )
    if card.text is not None:
        card.text.check(file.path.parent)
    if card.vae is None:
        return
    decoder = file.path.parent / card.vae.file
    if Path(card.vae.file).name != card.vae.file or not decoder.is_file():
        raise FileFormatError(
            f"{decoder}: missing; {file.path} names it as its decoder. Keep them together or export again."
        )
    if sha256(decoder) != card.vae.sha256:
        raise FileFormatError(f"{decoder}: altered since {file.path} was exported (its SHA-256 differs). Export again.")


@contextmanager
def prepared(
    file: OnnxFile, card: GraphCard, precision: str | None, float_type: FloatType, output: Path
) -> Iterator[tuple[OnnxFile, GraphCard, GoldenCalls | None]]:
    """The file, or a temporary one without its quantization or in FP8 and with its float parts in another type; its
    card; and the golden calls with the errors that are expected of it.
    """
    golden, strip = file.golden, card.quantization is not None and precision not in QUANTIZED
    if precision != "int8":  # a correction is of the errors of these integers
        card = replace(card, correction=None)
    if not strip and precision != "fp8" and float_type == "fp32":
        yield file, card, golden
        return
    with temporary_folder(output.with_name(f"{output.name}.prepared")) as folder:
        model = file.to_ir()
        if strip:
            strip_quantization(model, card)
            card = replace(card, quantization=None)
        if precision == "fp8":
            card = quantize_to_fp8(model, card)
            if golden is not None:
                draft = _saved(model, folder / file.path.name)
                golden = _expected_in_fp8(golden, draft.path, card.rows or 1)
        if float_type != "fp32":
            cast_floats(model, card, float_type)
        changed = _saved(model, folder / file.path.name)
        del model  # gigabytes that the compiler may need
        yield changed, card, golden


def _expected_in_fp8(golden: GoldenCalls, file: Path, rows: int) -> GoldenCalls:
    """With the errors of FP8, and a warning if they are large beside those of int8."""
    found = expect(golden, file, rows)
    before, after = golden.errors.mean(), found.errors.mean()
    if after > MUCH_WORSE * before:
        warnings.warn(
            f"on the golden calls fp8 has a mean error of {after:.1e} against the float model, int8 of {before:.1e}.",
            TqditWarning, stacklevel=2,
        )  # fmt: skip
    return found


def _saved(model: ir.Model, path: Path) -> OnnxFile:
    return OnnxFile(path, save(model, path))
