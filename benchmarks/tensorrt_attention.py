"""TensorRT's own attention, as a row of kernels.py: the float op as ONNX, compiled, and called with torch's tensors."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import onnx
from onnx import TensorProto, helper

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
attention (float16{q} q, float16{k} k, float16{k} v) => (float16{q} out) <float16 scale = {{{scale}}}> {{
    columns = Transpose <perm: ints = [0, 1, 3, 2]> (k)
    product = MatMul (q, columns)
    scores = Mul (product, scale)
    probabilities = Softmax <axis: int = -1> (scores)
    out = MatMul (probabilities, v)
}}
"""


def attention_model(rows: int, heads: int, tokens: int, head: int, scale: float) -> onnx.ModelProto:
    """softmax(scale q k^T) v of q, k, v float16[rows, heads, tokens, head]."""
    shape = [rows, heads, tokens, head]
    model = onnx.parser.parse_model(TEXT.format(q=shape, k=shape, scale=1))
    scale_tensor = helper.make_tensor("scale", TensorProto.FLOAT16, [], [scale])
    model.graph.initializer[0].CopyFrom(scale_tensor)
    onnx.checker.check_model(model, full_check=True)
    return model


def network_of(trt: ModuleType, model: onnx.ModelProto) -> tuple[Any, Any, Any]:
    """(builder, network, parser) of a library with TensorRT's interface. Raises RuntimeError if the parser refuses."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    # What is the default of TensorRT 11, which has no flag for it any more.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise RuntimeError(f"TensorRT {trt.__version__} cannot parse the attention: {parser.get_error(0)}")
    return builder, network, parser


class TensorRTAttention:
    """A call (q, k, v, ...) -> out on the current stream, which a CUDA graph can capture after a first call."""

    def __init__(self, trt: ModuleType, model: onnx.ModelProto) -> None:
        builder, network, self._parser = network_of(trt, model)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError(f"TensorRT {trt.__version__} cannot build the attention")
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        self._context = self._engine.create_execution_context()
        report = self._engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        self.layers = layer_names(report)

    def __call__(self, q: Any, k: Any, v: Any, *_: Any) -> Any:
        import torch

        out = torch.empty_like(q)
        for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT did not run the attention")
        return out


def layer_names(report: str) -> list[str]:
    """Of an inspector's JSON: one name says that the attention is one kernel."""
    return [layer["Name"] if isinstance(layer, dict) else str(layer) for layer in json.loads(report)["Layers"]]


def tensorrt_attention(
    rows: int, heads: int, tokens: int, head: int, scale: float, say: Callable[[str], None] = print
) -> TensorRTAttention | None:
    """None, and a line that says why, if TensorRT is not there or refuses."""
    try:
        trt = importlib.import_module("tensorrt")
        return TensorRTAttention(trt, attention_model(rows, heads, tokens, head, scale))
    except (ImportError, RuntimeError) as error:
        say(f"no row for TensorRT's attention: {str(error).splitlines()[0]}")
        return None
