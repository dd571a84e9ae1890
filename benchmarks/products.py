"""The ceiling of an engine on this CPU: bare products of DiT-XL/2 size, float and int8, in 10^9 operations per second.

    python benchmarks/products.py [--threads 2] [--rounds 15]

A chain of six products 512 x 1152 x 4608 (two rows of 256 tokens, fc1 and fc2 in turn), quantized as our exporter does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

ROWS, WIDTH, HIDDEN, PRODUCTS = 512, 1152, 4608, 6
OPERATIONS = 2 * ROWS * WIDTH * HIDDEN * PRODUCTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    x = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    print("| chain of products | GOP/s, median (quartiles) |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for quantized in (False, True):
            path = Path(folder) / f"{quantized}.onnx"
            onnx.save(chain(quantized), path)
            form = "int8" if quantized else "float32"
            runs = {f"ONNX Runtime {form}": onnxruntime(path, args.threads)}
            runs |= {f"OpenVINO {form}": openvino(path, args.threads, "f32")}
            if not quantized:
                runs |= {"OpenVINO default": openvino(path, args.threads, None)}
            for name, run in runs.items():
                print(f"| {name} | {rates(run, x, args.rounds)} |", flush=True)


def chain(quantized: bool) -> onnx.ModelProto:
    """x (512, 1152) through six products, each with a constant scale of its input where it is quantized."""
    rng = np.random.default_rng(1)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, NDArray[Any]] = {}
    x = "x"
    for index in range(PRODUCTS):
        sizes = (WIDTH, HIDDEN) if index % 2 == 0 else (HIDDEN, WIDTH)
        weight = (rng.standard_normal(sizes) / np.sqrt(sizes[0])).astype(np.float32)
        name = f"y{index}"
        if quantized:
            scale = np.abs(weight).max(axis=0) / 127
            constants |= {
                f"w{index}": np.round(weight / scale).astype(np.int8), f"ws{index}": scale.astype(np.float32),
                f"s{index}": np.float32(4 / 127), f"z{index}": np.int8(0),
            }  # fmt: skip
            q, d, w = f"q{index}", f"d{index}", f"dw{index}"
            nodes += [
                helper.make_node("QuantizeLinear", [x, f"s{index}", f"z{index}"], [q]),
                helper.make_node("DequantizeLinear", [q, f"s{index}", f"z{index}"], [d]),
                helper.make_node("DequantizeLinear", [f"w{index}", f"ws{index}"], [w], axis=1),
                helper.make_node("MatMul", [d, w], [name]),
            ]
        else:
            constants[f"w{index}"] = weight
            nodes.append(helper.make_node("MatMul", [x, f"w{index}"], [name]))
        x = name
    graph = helper.make_graph(
        nodes, "chain", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, WIDTH])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def onnxruntime(path: Path, threads: int) -> Callable[[NDArray[np.float32]], object]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        path, options, providers=["CPUExecutionProvider"], disabled_optimizers=["MatMulAddFusion"]
    )
    return lambda x: session.run(None, {"x": x})


def openvino(path: Path, threads: int, precision: str | None) -> Callable[[NDArray[np.float32]], object]:
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": threads} | ({"INFERENCE_PRECISION_HINT": precision} if precision else {})
    request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
    return lambda x: request.infer({0: x})


def rates(run: Callable[[NDArray[np.float32]], object], x: NDArray[np.float32], rounds: int) -> str:
    run(x)
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        run(x)
        found.append(OPERATIONS / (time.perf_counter() - started) / 1e9)
    low, middle, high = statistics.quantiles(found, n=4)
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


if __name__ == "__main__":
    main()
