"""What the operators between a constant and its use do to it: type, layout and, where it is small, its numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from tqdit.lint.values import Quantized, Value

SMALL = 65536  # elements; scales and zero points lie far below, weights mostly above

Attributes = Mapping[str, AttributeProto]
_Fold = Callable[[Attributes, Sequence[Value], Value], Value]
_ARITHMETIC: dict[str, Callable[..., NDArray[Any]]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide,
}  # fmt: skip
_SCALARS: dict[str, tuple[str, int]] = {
    "value_float": ("f", TensorProto.FLOAT),
    "value_floats": ("floats", TensorProto.FLOAT),
    "value_int": ("i", TensorProto.INT64),
    "value_ints": ("ints", TensorProto.INT64),
}


def from_tensor(tensor: TensorProto, folder: Path | None) -> Value:
    """A constant; its numbers only where it is small, read from `folder` where they lie outside the file."""
    shape = tuple(tensor.dims)
    value = Value(True, tensor.data_type, shape, origin=tensor.name)
    if (value.size or 0) > SMALL:
        return value
    if tensor.data_location == TensorProto.EXTERNAL:
        loaded = None if folder is None else _load(tensor, folder)
        if loaded is None:
            return value
        tensor = loaded
    try:
        return replace(value, array=numpy_helper.to_array(tensor).reshape(shape))
    except (ValueError, TypeError, KeyError):  # damaged: the checker's business, not the lint's
        return value


def _load(tensor: TensorProto, folder: Path) -> TensorProto | None:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    try:
        onnx.external_data_helper.load_external_data_for_tensor(copy, str(folder))
    except (OSError, ValueError, onnx.checker.ValidationError):
        return None
    copy.data_location = TensorProto.DEFAULT
    return copy


def constant_node(attributes: Attributes, folder: Path | None) -> Value:
    """The output of a Constant node."""
    if "value" in attributes:
        return from_tensor(attributes["value"].t, folder)
    for name, (field, dtype) in _SCALARS.items():
        if name in attributes:
            array = np.array(getattr(attributes[name], field), helper.tensor_dtype_to_np_dtype(dtype))
            return Value(True, dtype, array.shape, array)
    return Value(constant=True)


def fold(op_type: str, attributes: Attributes, inputs: Sequence[Value], bare: Value) -> Value:
    """`bare`, the output's type and constness, with what can be said beyond these."""
    if op_type in _ARITHMETIC:
        return _arithmetic(op_type, inputs, bare)
    if op_type in _LAYOUT and inputs:
        return replace(_LAYOUT[op_type](attributes, inputs, bare), constant=bare.constant)
    return bare


def _arithmetic(op_type: str, inputs: Sequence[Value], bare: Value) -> Value:
    if len(inputs) != 2 or inputs[0].array is None or inputs[1].array is None:
        return bare
    a, b = inputs[0].array, inputs[1].array
    if not np.issubdtype(a.dtype, np.floating) or not bare.constant:
        return bare
    try:
        with np.errstate(all="ignore"):
            array = _ARITHMETIC[op_type](a, b)
    except ValueError:  # shapes that do not go together
        return bare
    return replace(bare, shape=array.shape, array=array) if array.size <= SMALL else bare


def _identity(attributes: Attributes, inputs: Sequence[Value], bare: Value) -> Value:
    return inputs[0]


def _cast(attributes: Attributes, inputs: Sequence[Value], bare: Value) -> Value:
    """The numbers too: a float32 scale may become 0 in float16. A cast dequantized value is still that product's."""
    source, dtype = inputs[0], bare.dtype
    array = None
    if source.array is not None and dtype and not np.iscomplexobj(source.array):
        with np.errstate(all="ignore"), contextlib.suppress(KeyError, ValueError, TypeError):  # no numeric type
            array = source.array.astype(helper.tensor_dtype_to_np_dtype(dtype))
    return replace(source, dtype=dtype, array=array)


def _transpose(attributes: Attributes, inputs: Sequence[Value], bare: Value) -> Value:
    source = inputs[0]
    if source.shape is None:
        return replace(source, quantized=_without_axis(source.quantized))
    order = list(attributes["perm"].ints) if "perm" in attributes else list(reversed(range(len(source.shape))))
    if sorted(order) != list(range(len(source.shape))):
        return bare
    quantized = source.quantized
    if quantized is not None and quantized.axis is not None:
        quantized = replace(quantized, axis=order.index(quantized.axis))
    array = None if source.array is None else source.array.transpose(order)
    return replace(source, shape=tuple(source.shape[i] for i in order), array=array, quantized=quantized)


def _reshape(attributes: Attributes, inputs: Sequence[Value], bare: Value) -> Value:
    """The new shape is not followed for large tensors, hence neither is the axis of their scales."""
    source, target = inputs[0], inputs[1].array if len(inputs) > 1 else None
    changed = replace(source, shape=None, array=None, quantized=_without_axis(source.quantized))
    if source.array is None or target is None:
        return changed
    known = source.array.shape
    try:
        sizes = [known[i] if n == 0 and i < len(known) else int(n) for i, n in enumerate(target.flat)]
        array = source.array.reshape(sizes)
    except (ValueError, OverflowError):
        return changed
    return replace(changed, shape=array.shape, array=array)


def _squeeze(attributes: Attributes, inputs: Sequence[Value], bare: Value) -> Value:
    """One number or a vector is all that scales need of it."""
    source = inputs[0]
    array = None if source.array is None else source.array.reshape(-1 if source.array.size > 1 else ())
    shape = None if array is None else array.shape
    return replace(source, shape=shape, array=array, quantized=_without_axis(source.quantized))


def _other_shape(attributes: Attributes, inputs: Sequence[Value], bare: Value) -> Value:
    """The numbers stay what they are; a single one is a single one in any shape."""
    squeezed = _squeeze(attributes, inputs, bare)
    return squeezed if squeezed.shape == () else replace(squeezed, shape=None)


def _without_axis(quantized: Quantized | None) -> Quantized | None:
    return None if quantized is None else replace(quantized, axis=None)


_LAYOUT: dict[str, _Fold] = {
    "Identity": _identity, "Cast": _cast, "CastLike": _cast, "Transpose": _transpose, "Reshape": _reshape,
    "Squeeze": _squeeze, "Unsqueeze": _other_shape, "Flatten": _other_shape,
}  # fmt: skip
