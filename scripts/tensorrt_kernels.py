#!/usr/bin/env python3
"""What TensorRT-RTX makes of one transformer block: kernels, INT8 and FP8 products, and bytes written, form by form.

    scripts/tensorrt_kernels.py                             # three blocks of the width of DiT-XL/2; a minute, no GPU
    scripts/tensorrt_kernels.py --golden model.onnx ...     # what float16 costs a file with golden calls, on the CPU

A kernel that ends one block and begins the next counts for the first. The float32 form is the one without
`half_products`, which is taken out for it. For `--golden` the file is cast and rewritten as for TensorRT, and each
rewritten product is rounded to float16 by float32 operations: ONNX Runtime's CPU kernels would compute it in float32.
"""

from __future__ import annotations

import argparse
import importlib
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import onnx
import onnx.inliner
from onnx import helper, numpy_helper

from tqdit.engines.backends.tensorrt import builder, compiler
from tqdit.engines.backends.tensorrt.half_products import halve_products, probabilities
from tqdit.engines.backends.tensorrt.layers import Layer
from tqdit.engines.backends.tensorrt.worker import Compiled, Job
from tqdit.engines.build.cast import cast_floats
from tqdit.engines.build.engine import build_engine
from tqdit.engines.config import BatchRange, BuildConfig, Progress
from tqdit.files import temporary_folder
from tqdit.golden import relative_errors
from tqdit.onnx_file import OnnxFile, save

BITS = {"fp16": 11, "bf16": 8}  # of a number's digits
BLOCK = re.compile(r"blocks\.(\d+)[./]")
BYTES = {"Int8": 1, "FP8": 1, "Half": 2, "BFloat16": 2, "Float": 4, "Int32": 4, "Int64": 8, "Bool": 1}
NOT_KERNELS = {"shape_call", "signal", "wait"}
XL_HEADS, XL_WIDTH = 16, 1152


class Figures(NamedTuple):
    """Of one block."""

    kernels: int
    kinds: dict[str, int]
    products: int  # of two INT8 or two FP8 operands
    written: int  # bytes
    float32: int  # of these, bytes in float32


def build_layers(source: Path, config: BuildConfig, halved: bool = True) -> tuple[Layer, ...]:
    """The layers of the engine that TensorRT-RTX makes of a file."""
    seen: list[tuple[Layer, ...]] = []

    def spy(job: Job, progress: Progress) -> Compiled:
        compiled = compiler.run_worker(job, progress)
        seen.append(compiled.layers)
        return compiled

    unchanged = mock.patch.object(builder, "halve_products", return_value=0)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(builder, "run_worker", spy):
        if halved:
            build_engine(source, Path(folder) / "a.engine", "tensorrt-rtx", config)
        else:
            with unchanged:
                build_engine(source, Path(folder) / "a.engine", "tensorrt-rtx", config)
    return seen[-1]


def block_layers(layers: Sequence[Layer], block: int) -> list[Layer]:
    """The kernels of a block. One that names no block belongs to that of the kernel before it."""
    found, at = [], -1
    for layer in layers:
        blocks = [int(match[1]) for node in layer.nodes if (match := BLOCK.match(node))]
        at = min(blocks, default=at)
        if at == block and layer.kind not in NOT_KERNELS:
            found.append(layer)
    return found


def figures(layers: Sequence[Layer]) -> Figures:
    tensors = [tensor for layer in layers for tensor in zip(layer.outputs, layer.shapes, strict=True)]
    sizes = [(kind, BYTES[kind] * math.prod(shape)) for kind, shape in tensors]
    return Figures(
        len(layers), dict(Counter("attention" if "mha" in layer.name else layer.kind for layer in layers)),
        sum(layer.is_integer or layer.multiplies_in("FP8") for layer in layers), sum(size for _, size in sizes),
        sum(size for kind, size in sizes if kind == "Float"),
    )  # fmt: skip


def make_files(folder: Path) -> dict[str, Path]:
    """Files of three blocks with random weights: one for each form of attention, and one without two regions in fc2."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tqdit.card import AttentionForm
    from tqdit.exporter.graph import ExportConfig, finish_graph, trace_graph
    from tqdit.exporter.onnx_writer import write
    from tqdit.models.dit import DiT, DiTConfig, randomize
    from tqdit.models.families import published
    from tqdit.quantization.schemes.asymmetric import Asymmetric
    from tqdit.quantization.schemes.two_region_gelu import TwoRegionGelu
    from tqdit.quantization.table import ScaleTable, Site

    tables: Any = importlib.import_module("tables")
    config = DiTConfig(
        input_size=32, patch_size=2, in_channels=4, out_channels=8, hidden_size=XL_WIDTH, depth=3,
        mlp_hidden_size=4 * XL_WIDTH, num_classes=1000, num_heads=XL_HEADS,
    )  # fmt: skip
    model = published.describe(randomize(DiT(config)).eval().requires_grad_(False), "stack")
    ranges = {product.name: (np.array([-3, 3], np.float32),) * 2 for product in model.products}

    def one_product(site: Site) -> Site:
        if not isinstance(site.quantizer, TwoRegionGelu):
            return site
        scale, zero_point = np.asarray(np.float32(3.17 / 255)), np.asarray(np.int32(14))
        return replace(site, quantizer=Asymmetric(8, site.quantizer.granularity, scale, zero_point))

    kinds = (tables.Kind(groups=10), tables.Kind(dynamic=True))
    static, dynamic = (tables.make_table(model, kind, operands=ranges) for kind in kinds)
    single = replace(static, sites=tuple(map(one_product, static.sites)))
    forms: list[tuple[str, AttentionForm, ScaleTable]] = [
        (f"attention {form}", form, static) for form in ("simulated", "integer", "fused", "float")
    ]
    forms += [("attention float, fc2 in one product", "float", single), ("attention float, dynamic", "float", dynamic)]
    trace = trace_graph(model, ExportConfig())
    files = {}
    for number, (name, form, table) in enumerate(forms):
        files[name] = folder / str(number) / "model.onnx"
        files[name].parent.mkdir()
        write(files[name], *finish_graph(trace.clone(), model, ExportConfig(attention=form), table))
    return files


def print_blocks(target: str, images: int) -> None:
    config = BuildConfig(targets=(target,), batch=BatchRange(images, images, images))
    with tempfile.TemporaryDirectory() as name:
        files = make_files(Path(name))
        rows = [("fp16", files["attention float"], replace(config, precision="fp16"), True)]
        for form in ("attention simulated", "attention float"):
            rows.append((f"int8, {form}, products in float32", files[form], config, False))
        rows += [(f"int8, {form}", file, config, True) for form, file in files.items()]
        rows.append(("fp8, attention float", files["attention float"], replace(config, precision="fp8"), True))
        print(f"target {target}, {2 * images} rows of 256 tokens, width {XL_WIDTH}; one block")
        print("| form | kernels | kinds | 8-bit products | MB written | of them float32 |\n|---|---|---|---|---|---|")
        for form, file, chosen, halved in rows:
            found = figures(block_layers(build_layers(file, chosen, halved), 1))
            kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(found.kinds.items()))
            print(f"| {form} | {found.kernels} | {kinds} | {found.products} | {found.written / 1e6:.1f} | "
                  f"{found.float32 / 1e6:.1f} |", flush=True)  # fmt: skip


def as_on_gpu(source: Path, bits: int | None, folder: Path) -> onnx.ModelProto:
    """The file with its functions inlined, cast to float16, and with products rounded to `bits` unless None."""
    file = OnnxFile.read(source)
    model = file.to_ir()
    cast_floats(model, file.own_card, "fp16")
    proto = save(model, folder / source.name)
    rounded = probabilities(proto)
    proto = onnx.inliner.inline_local_functions(proto)
    if bits:
        halve_products(proto, folder, rounded)
        round_products(proto, bits)
    return proto


def round_products(model: onnx.ModelProto, bits: int = 11) -> int:
    """Round what rewritten products give to `bits` bits, by T. J. Dekker's splitting: c = (2^s + 1) x, c - (c - x) with
    s = 24 - bits.
    """
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(2 ** (24 - bits) + 1, np.float32), "splitter"))
    nodes, number = [], 0
    for node in model.graph.node:
        nodes.append(node)
        if node.name.endswith("/half.wide"):
            (name,), exact = node.output, f"{node.output[0]}.exact"
            node.output[0] = exact
            nodes += [
                helper.make_node("Mul", [exact, "splitter"], [f"{name}.c"], f"{name}.c"),
                helper.make_node("Sub", [f"{name}.c", exact], [f"{name}.low"], f"{name}.low"),
                helper.make_node("Sub", [f"{name}.c", f"{name}.low"], [name], f"{name}.rounded"),
            ]
            number += 1
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return number


def run_on_cpu(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The first output in ONNX Runtime, without optimisations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def print_golden(source: Path) -> None:
    calls = OnnxFile.read(source).golden
    if calls is None:
        sys.exit(f"{source}: holds no golden calls. Export a quantized denoiser graph of a calibrated table.")
    inputs = {name: np.asarray(array) for name, array in calls.inputs.items()}
    with temporary_folder(Path(tempfile.gettempdir()) / "tensorrt-kernels") as folder:
        found = [run_on_cpu(as_on_gpu(source, bits, folder), inputs) for bits in (None, *BITS.values())]
    errors = [relative_errors(one, calls.prediction).mean() for one in found]
    apart = [relative_errors(one, found[0]).mean() for one in found[1:]]
    figures = [calls.errors.mean(), *errors, *apart]
    print(f"| {source} | {' | '.join(f'{figure:.2e}' for figure in figures)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="8.9")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--golden", nargs="+", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not arguments.golden:
        print_blocks(arguments.target, arguments.images)
        return
    print("| file | expected | float32 | float16 | bfloat16 | float16 - float32 | bfloat16 - float32 |")
    print("|---|---|---|---|---|---|---|")
    for source in arguments.golden:
        print_golden(source)


if __name__ == "__main__":
    main()
