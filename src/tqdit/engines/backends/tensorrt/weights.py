"""Another spelling of integer weights, for products that lost their INT8.

Where a product with int8 weights behind a lone DequantizeLinear is split afterwards, as QKV is, and nothing but layout
stands between (float attention in float32), the compiler moves the split into the weights, which are then dequantized
at every run. Float weights behind QuantizeLinear and DequantizeLinear with the same scales are left alone; it folds
them to the same codes at build time. They are four times as large until then, so only products that need it get them.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tqdit.graph_names import SCOPE_KEY, scope_of

MAX_BYTES = 1_500_000_000  # of float weights; the file itself must stay below protobuf's 2 GB


def spell_out_weights(model: onnx.ModelProto, folder: Path, modules: Collection[str]) -> int:
    """Replace int8 weights of these modules by floats that are quantized in the graph, to the very same codes.

    `folder` is where external data lies. Changes the model in place; returns the number of weights, 0 if none can be
    replaced or all together would be too large.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    lone = [
        node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and scope_of(node) in modules
        and len(node.input) == 2
        and node.input[0] in constants
    ]
    if sum(4 * int(np.prod(constants[node.input[0]].dims)) for node in lone) > MAX_BYTES:
        return 0
    order = {node.name: index for index, node in enumerate(model.graph.node)}
    for node in sorted(lone, key=lambda node: -order[node.name]):  # from the end: earlier positions stay right
        codes, scale = (numpy_helper.to_array(constants[name], str(folder)) for name in node.input)
        axes = [attribute for attribute in node.attribute if attribute.name == "axis"]
        along = [1] * codes.ndim
        if scale.ndim:
            along[axes[0].i if axes else 1] = -1
        name = node.input[0]
        floats = (codes * scale.reshape(along)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(floats, f"{name}.float"))
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(scale.shape, np.int8), f"{name}.zero_point"))
        quantize = helper.make_node(
            "QuantizeLinear", [f"{name}.float", node.input[1], f"{name}.zero_point"], [f"{name}.codes_again"],
            f"{node.name}/QuantizeLinear",
        )  # fmt: skip
        quantize.attribute.extend(axes)
        quantize.metadata_props.add(key=SCOPE_KEY, value=scope_of(node))
        model.graph.node.insert(order[node.name], quantize)
        node.input[0] = f"{name}.codes_again"
    return len(lone)
