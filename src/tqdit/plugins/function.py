"""Building the function body of an op from ONNX text."""

from __future__ import annotations

import onnx

from tqdit.plugins import DOMAIN, VERSION

# TensorRT's parser looks for a plugin by these attributes of the node; every other runtime ignores them.
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION), "aot": 1}


def parse_body(text: str, opset: int) -> onnx.FunctionProto:
    """A function from ONNX text, for a model of this opset, with the plugin attributes declared."""
    function = onnx.parser.parse_function(text)
    for entry in function.opset_import:
        entry.version = opset
    function.attribute.extend(PLUGIN_ATTRIBUTES)
    return function
