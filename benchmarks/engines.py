"""Speed of int8 engines beside what a user would pick instead, in one run, with the error of each.

    python benchmarks/engines.py                    four blocks of DiT-XL/2, one guided image (two rows), 2 threads
    python benchmarks/engines.py --depth 28         all of it
    python benchmarks/engines.py --presets tq-dit fast --json engines.json

Random non-zero weights, which are as slow as trained ones. A stack of blocks stands for the whole model: all but the
blocks takes less than 1 % of a DiT-XL/2 step. Every engine runs once per round, in turn, so that other work on the
machine affects all alike. The table has medians over the rounds with their quartiles, in milliseconds of one sampling
step (one network call, and the update on the host), and the speed against ONNX Runtime's float32. The error is the
relative squared error of the sampled latents against PyTorch float32 with the same noise, after --chain steps.

Needs the backends and, for the rows of other tools, onnxruntime's quantizer (part of it) and NNCF (pip install nncf).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tqdit.calibration.config import PRESETS, QuantizationConfig
from tqdit.calibration.flow import calibrate
from tqdit.card import GraphCard
from tqdit.engines.build.engine import build_engine
from tqdit.engines.bundle import read_manifest
from tqdit.engines.config import BuildConfig
from tqdit.engines.run.backend import open_engine
from tqdit.exporter.graph import ExportConfig, export_graph
from tqdit.exporter.onnx_writer import write
from tqdit.models.dit import DiT, DiTConfig, randomize
from tqdit.models.families.published import describe
from tqdit.models.loaded import LoadedModel
from tqdit.sampling.chains import Chains, Network, run

Inputs = Mapping[str, NDArray[Any]]
BACKENDS = ("onnxruntime", "openvino")
# Search settings that give sensible scales soon; speed does not depend on their values.
SOON: dict[str, Any] = {"steps": 10, "groups": 5, "rows_per_group": 2, "chains": 1, "rounds": 1, "candidates": 10}


@dataclass(frozen=True)
class Row:
    """One engine."""

    name: str
    milliseconds: tuple[float, ...]  # of a step, every round
    error: float | None  # of the chain's end; None for the reference

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--depth", type=int, default=4, help="blocks (default: %(default)s; DiT-XL/2 has 28)")
    add("--images", type=int, default=1, help="per step; each is two rows with guidance")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=15)
    add("--chain", type=int, default=10, help="steps of the chain whose end is compared (default: %(default)s)")
    add("--presets", nargs="+", default=["tq-dit", "fast", "dynamic"])
    add("--attention", nargs="+", default=["simulated", "integer", "float"])
    add("--skip", nargs="*", default=[], help="names of rows to leave out, as far as they begin so")
    add("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = block_stack(args.depth)
    chain = float_chain(args, model)
    with tempfile.TemporaryDirectory() as temporary:
        engines = {}
        for name, make in contenders(args, model, chain, Path(temporary)):
            if any(name.startswith(one) for one in args.skip):
                continue
            print(f"preparing {name}", file=sys.stderr)
            engines[name] = make()
        rows = measure(engines, chain, args)
    show(rows, args)
    if args.json:
        facts = {"settings": vars(args), "machine": machine(), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(facts, indent=1, default=str) + "\n")


def block_stack(depth: int) -> LoadedModel:
    config = DiTConfig(
        input_size=32, patch_size=2, in_channels=4, out_channels=8, hidden_size=1152, depth=depth,
        mlp_hidden_size=4608, num_classes=1000, num_heads=16,
    )  # fmt: skip
    network = randomize(DiT(config)).eval().requires_grad_(False)
    return describe(network, f"DiT-XL/2 with {depth} blocks")


# The contenders -------------------------------------------------------------------------------------------------------


def contenders(
    args: argparse.Namespace, model: LoadedModel, chain: Chain, folder: Path
) -> Iterator[tuple[str, Callable[[], Network]]]:
    """(name, what prepares it) of every row, the reference first."""
    spec = ExportConfig(steps=args.chain)
    flat = folder / "float.onnx"
    write(flat, *export_graph(model, spec, None))
    yield "PyTorch float32", lambda: model
    yield "ONNX Runtime float32", lambda: ours(flat, "onnxruntime", args.threads)
    yield "OpenVINO float32", lambda: ours(flat, "openvino", args.threads)
    yield "OpenVINO default", lambda: openvino_default(flat, args.threads)
    yield "ONNX Runtime static int8", lambda: onnxruntime_static(flat, folder, chain, args.threads)
    if find_spec("nncf"):
        yield "NNCF int8 in OpenVINO", lambda: nncf_int8(flat, chain, args.threads)
        yield "OpenVINO int8 weights", lambda: int8_weights(flat, args.threads)
    for preset in args.presets:
        table = calibrate(model, soon(preset), folder / "work").table
        for attention in args.attention if PRESETS[preset].attention else ["float"]:
            path = folder / f"{preset}-{attention}.onnx"
            write(path, *export_graph(model, replace(spec, attention=attention), table))
            for backend in BACKENDS:
                label = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[backend]
                name = f"ours {preset}, {attention} attention, {label}"
                yield name, lambda path=path, backend=backend: ours(path, backend, args.threads)  # type: ignore[misc]


def soon(preset: str) -> QuantizationConfig:
    """A search in place of GPTQ and reconstruction: those choose other codes of the weights, which take as long."""
    config = replace(PRESETS[preset], **SOON)
    return replace(config, method="search") if config.method in ("gptq", "reconstruct") else config


def ours(path: Path, backend: str, threads: int) -> Network:
    bundle = path.with_name(f"{path.stem}.{backend}.engine")
    build_engine(path, bundle, backend, BuildConfig(float_type="fp32"))
    manifest = read_manifest(bundle)
    return open_engine(bundle, manifest, manifest.entry, threads)


def openvino_default(path: Path, threads: int) -> Network:
    """What `Core().compile_model` does when nothing is asked of it: bfloat16 where the CPU has it."""
    import openvino as ov

    core = ov.Core()
    return _openvino(core.compile_model(core.read_model(path), "CPU", {"INFERENCE_NUM_THREADS": threads}))


def _openvino(compiled: Any) -> Network:
    request = compiled.create_infer_request()

    def run(inputs: Inputs) -> NDArray[np.float32]:
        request.infer({port: inputs[port.node.friendly_name] for port in compiled.inputs})
        return np.array(request.get_output_tensor(0).data)

    return run


def nncf_int8(path: Path, chain: Chain, threads: int) -> Network:
    """Post-training quantization with the preset for transformers, on the rows of one float chain."""
    import nncf
    import openvino as ov

    core = ov.Core()
    data = nncf.Dataset([dict(inputs) for inputs in chain.inputs])
    quantized = nncf.quantize(core.read_model(path), data, model_type=nncf.ModelType.TRANSFORMER)
    return _openvino(core.compile_model(quantized, "CPU", {"INFERENCE_NUM_THREADS": threads}))


def int8_weights(path: Path, threads: int) -> Network:
    """What optimum-intel makes of a transformer in 8 bits: asymmetric weights per channel; OpenVINO rounds activations
    itself, in dynamic groups of 32 channels."""
    import nncf
    import openvino as ov

    core = ov.Core()
    model = nncf.compress_weights(core.read_model(path), mode=nncf.CompressWeightsMode.INT8_ASYM)
    return _openvino(core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads}))


def onnxruntime_static(path: Path, folder: Path, chain: Chain, threads: int) -> Network:
    """onnxruntime.quantization.quantize_static, Q/DQ with int8 weights per channel, on the rows of one float chain."""
    import onnxruntime as ort
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(chain.inputs)

        def get_next(self) -> Inputs | None:
            return next(self.rows, None)

    target = folder / "static.onnx"
    quantization.quantize_static(
        path, target, Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        activation_type=quantization.QuantType.QInt8, weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm", "Conv"], extra_options={"ActivationSymmetric": True},
    )  # fmt: skip
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # its default optimisations fail to load such a graph (reference: MatMulAddFusion)
    session = ort.InferenceSession(
        target, options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
    )
    return lambda inputs: session.run(None, dict(inputs))[0]


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """One float chain: the inputs of every network call, the state in the middle (`Chains.snapshot`), the end."""

    card: GraphCard
    inputs: list[dict[str, NDArray[Any]]]
    middle: dict[str, NDArray[Any]]
    end: NDArray[np.float32]


def start(card: GraphCard, images: int) -> Chains:
    """Chains of `images` images of the first classes, with seeded noise."""
    chains, guidance = Chains(card.signature, card.guidance, images), card.guidance
    for image in range(images):
        request = {port.name: np.int64(image) for port in card.signature.requests}
        chains.add(card.sampling.schedule, request, 1.0 if guidance is None else guidance.scale, 0, image)
    return chains


def float_chain(args: argparse.Namespace, model: LoadedModel) -> Chain:
    card = model.card(sampling=model.sampling.choose(args.chain))
    chains, inputs = start(card, args.images), []
    middle = chains.snapshot()

    def recording(ports: Inputs) -> NDArray[np.float32]:
        nonlocal middle
        inputs.append({name: values.copy() for name, values in ports.items()})
        if len(inputs) == card.sampling.steps // 2 + 1:
            middle = chains.snapshot()
        return model(ports)

    end = run(chains, recording).copy()
    return Chain(card, inputs, middle, end)


def measure(engines: Mapping[str, Network], chain: Chain, args: argparse.Namespace) -> list[Row]:
    """All engines in turn, round after round."""
    ends = {name: run(start(chain.card, args.images), network).copy() for name, network in engines.items()}  # warms up
    times: dict[str, list[float]] = {name: [] for name in engines}
    chains = start(chain.card, args.images)
    for _ in range(args.rounds):
        for name, network in engines.items():
            network(chain.inputs[0])  # threads of the engine before it may still spin
            chains.restore(chain.middle)
            started = time.perf_counter()
            chains.advance(network(chains.inputs()))
            times[name].append(1000 * (time.perf_counter() - started))
    energy = float(np.square(chain.end).sum())
    return [Row(name, tuple(times[name]), float(np.square(ends[name] - chain.end).sum()) / energy) for name in engines]


def show(rows: list[Row], args: argparse.Namespace) -> None:
    base = next((row.median for row in rows if row.name == "ONNX Runtime float32"), rows[0].median)
    print(f"\nDiT-XL/2 shape, {args.depth} blocks, {args.images} guided image(s), {args.threads} threads, "
          f"{args.rounds} rounds; {machine()}\n")  # fmt: skip
    print("| engine | ms per step (quartiles) | against ONNX Runtime float32 | error after the chain |")
    print("|---|---|---|---|")
    for row in rows:
        low, _, high = statistics.quantiles(row.milliseconds, n=4)
        error = f"{row.error:.1e}" if row.error else "reference"
        print(f"| {row.name} | {row.median:.0f} ({low:.0f} to {high:.0f}) | {base / row.median:.2f}x | {error} |")


def machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    names = [name for name in ("torch", "onnxruntime", "openvino", "nncf", "numpy") if find_spec(name)]
    return {"cpu": cpu, "cores": str(os.cpu_count()), **{name: version(name) for name in names}}


if __name__ == "__main__":
    main()
