"""Function bodies of the custom ops in ONNX Runtime."""

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
from onnx import TensorProto, helper

from tqdit.plugins import DOMAIN, VERSION
from tqdit.plugins.function import PLUGIN_ATTRIBUTES


def run(schema, inputs, attributes, rank=4, inline=False, out_kind=TensorProto.FLOAT, outputs=1):
    """One node of a custom op, with its body, in ONNX Runtime without optimisations."""
    names = ["out", "out_2"][:outputs]
    node = helper.make_node(schema.OP_TYPE, list(inputs), names, domain=DOMAIN, **attributes, **PLUGIN_ATTRIBUTES)
    kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64,
             np.dtype(np.float16): TensorProto.FLOAT16, np.dtype(np.int8): TensorProto.INT8}  # fmt: skip
    values = [helper.make_tensor_value_info(k, kinds[v.dtype], [None] * v.ndim) for k, v in inputs.items()]
    made = [helper.make_tensor_value_info(name, out_kind, [None] * rank) for name in names]
    graph = helper.make_graph([node], "g", values, made)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[schema.body()], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    if inline:
        model = onnx.inliner.inline_local_functions(model)
        assert not model.functions
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, inputs)
    return found[0] if outputs == 1 else found
