"""A program: drives our plugins through NVIDIA's own `tensorrt.plugin`, without TensorRT's libraries or a GPU.

    LD_LIBRARY_PATH=STUBS python tests/plugins/tensorrt_contract.py [TACTICS]

The Python half of the plugin machinery is in the bindings wheel; here it calls our functions as TensorRT would: types,
symbolic shapes, combinations, tactics, then the kernel and its launch. What TensorRT's C++ half supplies, symbolic
integers and descriptors, is replaced by the few Python objects below. Prints one JSON text. TACTICS is how many
tactics of a plugin are tried, of which each is compiled; without it all are.
"""

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import tensorrt_bindings as trt

sys.modules["tensorrt"] = trt  # the front package, which would fetch the libraries, does the same
sys.modules["tensorrt.plugin"] = importlib.import_module("tensorrt_bindings.plugin")

from tensorrt_bindings.plugin import _lib, _tensor, _validate  # noqa: E402

from tqdit.plugins import tensorrt_definitions  # noqa: E402

TACTICS = int(sys.argv[1]) if len(sys.argv) > 1 else None


class Size(trt.IDimensionExpr):
    """A symbolic integer: a constant, or a function of the batch."""

    @classmethod
    def of(cls, value, constant=True):
        made = cls.__new__(cls)  # the C++ class has no constructor
        made.value, made.constant = value, constant
        return made

    def is_constant(self):
        return self.constant

    def get_constant_value(self):
        assert self.constant
        return self.value


class Builder:
    """Evaluates expressions for the batch at hand and remembers that they vary."""

    def constant(self, value):
        return Size.of(value)

    def operation(self, op, a, b):
        rules = {
            trt.DimensionOperation.SUM: lambda x, y: x + y,
            trt.DimensionOperation.SUB: lambda x, y: x - y,
            trt.DimensionOperation.PROD: lambda x, y: x * y,
            trt.DimensionOperation.FLOOR_DIV: lambda x, y: x // y,
        }
        return Size.of(rules[op](a.value, b.value), a.constant and b.constant)


class Setter(dict):
    nbSymExprs = 0  # noqa: N815 (TensorRT's name)


def described(kind, shape):
    described = trt.DynamicPluginTensorDesc()
    described.desc.type, described.desc.format, described.desc.dims = kind, trt.TensorFormat.LINEAR, trt.Dims(shape)
    return described


# These wrap a symbolic integer for C++, which cannot hold ours.
trt.DimsExprs = lambda length: [None] * length
_tensor.SymExprImpl = lambda expr: expr._expr.value


FIELD_TYPES = {trt.PluginFieldType.INT32: np.int32, trt.PluginFieldType.FLOAT32: np.float32}


def create(name, attributes):
    """The plugin as the ONNX parser has it made: by the creator, of fields of the types that the creator declares.

    The creator's constructor calls into TensorRT's libraries, which are empty here, so it gets its fields directly.
    """
    definition = _lib.QDP_REGISTRY[f"tqdit::{name}"]
    types = _validate._parse_register_inputs(definition.register_func, False)[-1]
    creator = _lib._TemplatePluginCreator(name, "tqdit", types)
    fields = [
        trt.PluginField(field.name, np.array([attributes[field.name]], FIELD_TYPES[field.type]), field.type)
        for field in creator.field_names
    ]
    assert [field.name for field in fields] == list(attributes)
    request = trt.QuickPluginCreationRequest.PREFER_AOT
    return creator.create_plugin(name, "tqdit", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD, request)


def drive(name, kinds, out_kinds, shapes, attributes, dynamic):
    """All calls of one plugin in TensorRT's order; the inputs `dynamic` have a batch for their first dimension."""
    definition = _lib.QDP_REGISTRY[f"tqdit::{name}"]
    plugin = create(name, attributes).clone()
    types = plugin.get_output_data_types(list(kinds), [len(shape) for shape in shapes])
    sizes = [
        [Size.of(size, constant=i > 0 or j not in dynamic) for i, size in enumerate(shape)]
        for j, shape in enumerate(shapes)
    ]
    out_shapes = plugin.get_output_shapes(sizes, [], Builder())
    in_out = [described(kind, shape) for kind, shape in zip(kinds, shapes, strict=True)]
    for kind, shape in zip(out_kinds, out_shapes, strict=True):
        in_out.append(described(kind, [size.value for size in shape]))
    inputs, outputs = in_out[: len(kinds)], in_out[len(kinds) :]
    combinations = plugin.get_supported_format_combinations(in_out, len(kinds))
    plugin.configure_plugin(inputs, outputs)
    tactics = sorted(plugin.get_valid_tactics())
    kernels = []
    for tactic in tactics[:TACTICS] or [0]:
        plugin.set_tactic(tactic)
        launch, scalars = SimpleNamespace(), Setter()
        plugin.get_launch_params(sizes, in_out, len(kinds), launch, scalars, Builder())
        entry, ptx = plugin.get_kernel([each.desc for each in inputs], [each.desc for each in outputs])
        kernels.append(
            {"entry": entry, "ptx": ptx.decode(), "launch": vars(launch),
             "scalars": [scalars[i] for i in range(scalars.nbSymExprs)],
             "parameters": ptx.decode().split(".visible .entry")[1].split(")")[0].count(".param ")}
        )  # fmt: skip
    return {
        "out_types": [str(kind) for kind in types],
        "out_shapes": [[size.value for size in shape] for shape in out_shapes],
        "combinations": len(combinations) // len(in_out),
        "attributes": definition.aot_impl_attr_names,
        "annotations": [str(each) for each in definition.input_attrs.values()],
        "kernels": kernels,
    }


def main():
    tensorrt_definitions.define((8, 0), lazy=True)
    tensorrt_definitions.define((8, 0), lazy=True)  # changes nothing
    half, single, integer = trt.DataType.HALF, trt.DataType.FLOAT, trt.DataType.INT64
    attention = {"bits": 8, "high_scale": 1 / 127, "scale": 0.01}
    results = {
        "TimeGroupSelect": drive(
            "TimeGroupSelect", (integer, integer, single), (single,), [(70,), (9,), (10, 1, 1, 3)], {}, {0}
        ),
        "TimeGroupSelect real": drive(
            "TimeGroupSelect", (single, single, half), (half,), [(70,), (9,), (10, 1, 1, 3)], {}, {0}
        ),
    }
    for name, outputs in (("MultiRegionSoftmax", (half,)), ("MultiRegionNumerator", (half, single))):
        shapes, attributes = [(3, 2, 50, 50), (3,)], {"bits": 8, "high_scale": 1 / 127}
        results[name] = drive(name, (half, single), outputs, shapes, attributes, {0, 1})
    for name in ("MultiRegionAttention", "MultiRegionNumeratorAttention"):
        kinds, shapes = (half, half, half, single, single), [(3, 2, 200, 72)] * 3 + [(3, 1, 1, 200), (3,)]
        results[name] = drive(name, kinds, (half,), shapes, attention, {0, 1, 2, 3, 4})
        other = drive(name, kinds, (half,), shapes, attention | {"scale": 0.02}, {0, 1, 2, 3, 4})
        results[name]["of_another_scale"] = other["kernels"]
    for name in ("MultiRegionIntegerAttention", "MultiRegionNumeratorIntegerAttention"):
        kinds = (trt.DataType.INT8,) * 3 + (single,) * 5
        cases = (("", 200, 3, trt.DataType.INT8), (" half", 50, 10, half))  # 50 tokens: one tactic to compile
        for label, tokens, out_type, out_kind in cases:
            shapes = [(3, 2, tokens, 72)] * 2 + [(3, 2, 72, tokens), (3, 1, 1, tokens), (3,), (1,), (3,), (3,)]
            attributes = {"bits": 8, "high_scale": 1 / 127, "out_type": out_type}
            results[f"{name}{label}"] = drive(name, kinds, (out_kind,), shapes, attributes, {0, 1, 2, 3, 4, 6, 7})
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
