"""What TensorRT asks of a plugin: shapes and types, combinations to time, and PTX with its launch.

TensorRT reads the annotations of these functions as objects, so this module postpones none. Every attribute stands in
every function, in the order of its registration: TensorRT passes all of them by position, whatever a function names.
Attributes are arrays of one element: TensorRT 10.x makes an int or a float of an array, which NumPy 2.4 refuses.
"""

import functools
from typing import Any, List, Tuple, Union  # noqa: UP035 (TensorRT compares with these)

import numpy as np
import tensorrt as trt
import tensorrt.plugin as trtp
from numpy.typing import NDArray

from tqdit.errors import UsageError
from tqdit.plugins import DOMAIN
from tqdit.plugins.aot import compile_kernel
from tqdit.plugins.kernels import Kernel, Launch
from tqdit.plugins.multi_region_attention import launch as attention
from tqdit.plugins.multi_region_integer_attention import launch as integer_attention
from tqdit.plugins.multi_region_softmax import launch as softmax
from tqdit.plugins.time_group_select import launch as select

Integers = NDArray[np.int32]
Reals = NDArray[np.float32]
FLOATS = "FP32|FP16|BF16"  # '|': the same of them wherever it stands in a combination
TYPES = {"fp32": trt.DataType.FLOAT, "fp16": trt.DataType.HALF, "bf16": trt.DataType.BF16, "i8": trt.DataType.INT8,
         "i64": trt.DataType.INT64}  # fmt: skip
NAMES_OF_TYPES = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16", "i8": "INT8"}  # in a combination
Compiled = Tuple[Union[str, bytes], Union[str, bytes], trtp.KernelLaunchParams, trtp.SymIntExprs]  # noqa: UP006, UP007


def define(capability: tuple[int, int], lazy: bool = False) -> None:
    """Register the plugins; later calls in the same process change nothing."""
    if hasattr(trtp.op, DOMAIN):
        return
    _define_time_group_select(capability, lazy)
    _define_multi_region_softmax(capability, lazy)
    _define_multi_region_numerator(capability, lazy)
    for numerators in (False, True):
        _define_multi_region_attention(capability, lazy, numerators)
        _define_multi_region_integer_attention(capability, lazy, numerators)


def _define_time_group_select(capability: tuple[int, int], lazy: bool) -> None:
    name = f"{DOMAIN}::TimeGroupSelect"

    @trtp.register(name, lazy_register=lazy)
    def describe(timestep: trtp.TensorDesc, boundaries: trtp.TensorDesc, table: trtp.TensorDesc) -> trtp.TensorDesc:
        selected = table.like()
        selected.shape_expr[0] = timestep.shape_expr[0]
        return selected

    @trtp.autotune(name)
    def combinations(
        timestep: trtp.TensorDesc,
        boundaries: trtp.TensorDesc,
        table: trtp.TensorDesc,
        outputs: Tuple[trtp.TensorDesc],  # noqa: UP006
    ) -> List[trtp.AutoTuneCombination]:  # noqa: UP006
        return [trtp.AutoTuneCombination(f"{time}, {time}, {FLOATS}, {FLOATS}", "LINEAR") for time in ("INT64", "FP32")]

    @trtp.aot_impl(name)
    def implementation(
        timestep: trtp.TensorDesc, boundaries: trtp.TensorDesc, table: trtp.TensorDesc,
        outputs: Tuple[trtp.TensorDesc], tactic: int,  # noqa: UP006
    ) -> Compiled:  # fmt: skip
        size = functools.reduce(lambda a, b: a * b, list(table.shape_expr)[1:], trtp.SymInt32(1))
        kernel = select.kernel(_type_name(table), _static(boundaries.shape_expr[0], name), _type_name(timestep))
        return _compiled(kernel, select.launch(timestep.shape_expr[0], size), capability)


def _define_multi_region_softmax(capability: tuple[int, int], lazy: bool) -> None:
    name = f"{DOMAIN}::MultiRegionSoftmax"

    @trtp.register(name, lazy_register=lazy)
    def describe(
        scores: trtp.TensorDesc, low_scale: trtp.TensorDesc, bits: Integers, high_scale: Reals
    ) -> trtp.TensorDesc:
        return scores.like()

    @trtp.autotune(name)
    def combinations(
        scores: trtp.TensorDesc, low_scale: trtp.TensorDesc, bits: Integers, high_scale: Reals,
        outputs: Tuple[trtp.TensorDesc],  # noqa: UP006
    ) -> List[trtp.AutoTuneCombination]:  # noqa: UP006  # fmt: skip
        return [trtp.AutoTuneCombination(f"{FLOATS}, FP32, {FLOATS}", "LINEAR")]

    @trtp.aot_impl(name)
    def implementation(
        scores: trtp.TensorDesc, low_scale: trtp.TensorDesc, bits: Integers, high_scale: Reals,
        outputs: Tuple[trtp.TensorDesc], tactic: int,  # noqa: UP006
    ) -> Compiled:  # fmt: skip
        images, heads, queries, columns = scores.shape_expr
        kernel = softmax.kernel(_type_name(scores), _static(columns, name), int(bits[0]), float(high_scale[0]))
        return _compiled(kernel, softmax.launch(kernel, images, heads, queries, low_scale.shape_expr[0]), capability)


def _define_multi_region_numerator(capability: tuple[int, int], lazy: bool) -> None:
    name = f"{DOMAIN}::MultiRegionNumerator"

    @trtp.register(name, lazy_register=lazy)
    def describe(
        scores: trtp.TensorDesc, low_scale: trtp.TensorDesc, bits: Integers, high_scale: Reals
    ) -> Tuple[trtp.TensorDesc, trtp.TensorDesc]:  # noqa: UP006
        reciprocals = scores.like()
        reciprocals.dtype = trt.DataType.FLOAT
        reciprocals.shape_expr[3] = 1
        return scores.like(), reciprocals

    @trtp.autotune(name)
    def combinations(
        scores: trtp.TensorDesc, low_scale: trtp.TensorDesc, bits: Integers, high_scale: Reals,
        outputs: Tuple[trtp.TensorDesc, trtp.TensorDesc],  # noqa: UP006
    ) -> List[trtp.AutoTuneCombination]:  # noqa: UP006  # fmt: skip
        return [trtp.AutoTuneCombination(f"{FLOATS}, FP32, {FLOATS}, FP32", "LINEAR")]

    @trtp.aot_impl(name)
    def implementation(
        scores: trtp.TensorDesc, low_scale: trtp.TensorDesc, bits: Integers, high_scale: Reals,
        outputs: Tuple[trtp.TensorDesc, trtp.TensorDesc], tactic: int,  # noqa: UP006
    ) -> Compiled:  # fmt: skip
        images, heads, queries, columns = scores.shape_expr
        kernel = softmax.kernel(
            _type_name(scores), _static(columns, name), int(bits[0]), float(high_scale[0]), numerators=True
        )
        return _compiled(kernel, softmax.launch(kernel, images, heads, queries, low_scale.shape_expr[0]), capability)


def _define_multi_region_attention(capability: tuple[int, int], lazy: bool, numerators: bool) -> None:
    name = f"{DOMAIN}::MultiRegion{'Numerator' if numerators else ''}Attention"

    @trtp.register(name, lazy_register=lazy)
    def describe(
        q: trtp.TensorDesc, k: trtp.TensorDesc, v: trtp.TensorDesc, mask: trtp.TensorDesc,
        low_scale: trtp.TensorDesc, bits: Integers, high_scale: Reals, scale: Reals,
    ) -> trtp.TensorDesc:  # fmt: skip
        return q.like()

    @trtp.autotune(name)
    def combinations(
        q: trtp.TensorDesc, k: trtp.TensorDesc, v: trtp.TensorDesc, mask: trtp.TensorDesc,
        low_scale: trtp.TensorDesc, bits: Integers, high_scale: Reals, scale: Reals, outputs: Tuple[trtp.TensorDesc],  # noqa: UP006
    ) -> List[trtp.AutoTuneCombination]:  # noqa: UP006  # fmt: skip
        head, keys = _static(q.shape_expr[3], name), _static(k.shape_expr[2], name)
        return [
            trtp.AutoTuneCombination(
                f"{kind}, {kind}, {kind}, FP32, FP32, {kind}", "LINEAR",
                list(range(1, len(attention.candidates(kind.lower(), head, keys)) + 1)),
            )
            for kind in FLOATS.split("|")
        ]  # fmt: skip

    @trtp.aot_impl(name)
    def implementation(
        q: trtp.TensorDesc, k: trtp.TensorDesc, v: trtp.TensorDesc, mask: trtp.TensorDesc,
        low_scale: trtp.TensorDesc, bits: Integers, high_scale: Reals, scale: Reals,
        outputs: Tuple[trtp.TensorDesc], tactic: int,  # noqa: UP006
    ) -> Compiled:  # fmt: skip
        images, heads, queries, head = q.shape_expr
        masks, *lengths = mask.shape_expr
        heads_of_mask, rows_of_mask, columns_of_mask = (_static(length, name) for length in lengths)
        floats, keys, columns = _type_name(q), _static(k.shape_expr[2], name), _static(head, name)
        blocks = attention.candidates(floats, columns, keys)[tactic - 1]
        kernel = attention.kernel(floats, _static(queries, name), keys, columns, int(bits[0]), float(high_scale[0]),
                                  blocks, (heads_of_mask, rows_of_mask, columns_of_mask), numerators)  # fmt: skip
        launch = attention.launch(kernel, images, heads, low_scale.shape_expr[0], float(scale[0]), masks)
        return _compiled(kernel, launch, capability)


def _define_multi_region_integer_attention(capability: tuple[int, int], lazy: bool, numerators: bool) -> None:
    name = f"{DOMAIN}::MultiRegion{'Numerator' if numerators else ''}IntegerAttention"

    @trtp.register(name, lazy_register=lazy)
    def describe(
        q: trtp.TensorDesc, k: trtp.TensorDesc, v: trtp.TensorDesc, mask: trtp.TensorDesc, scale: trtp.TensorDesc,
        low_scale: trtp.TensorDesc, out_scale: trtp.TensorDesc, out_shift: trtp.TensorDesc,
        bits: Integers, high_scale: Reals, out_type: Integers,
    ) -> trtp.TensorDesc:  # fmt: skip
        attended = q.like()
        attended.dtype = TYPES[_out_type(out_type, name)]
        return attended

    @trtp.autotune(name)
    def combinations(
        q: trtp.TensorDesc, k: trtp.TensorDesc, v: trtp.TensorDesc, mask: trtp.TensorDesc, scale: trtp.TensorDesc,
        low_scale: trtp.TensorDesc, out_scale: trtp.TensorDesc, out_shift: trtp.TensorDesc,
        bits: Integers, high_scale: Reals, out_type: Integers, outputs: Tuple[trtp.TensorDesc],  # noqa: UP006
    ) -> List[trtp.AutoTuneCombination]:  # noqa: UP006  # fmt: skip
        tactics = integer_attention.candidates(_static(q.shape_expr[3], name), _static(k.shape_expr[2], name))
        types = ["INT8"] * 3 + ["FP32"] * 5 + [NAMES_OF_TYPES[_out_type(out_type, name)]]
        return [trtp.AutoTuneCombination(", ".join(types), "LINEAR", list(range(1, len(tactics) + 1)))]

    @trtp.aot_impl(name)
    def implementation(
        q: trtp.TensorDesc, k: trtp.TensorDesc, v: trtp.TensorDesc, mask: trtp.TensorDesc, scale: trtp.TensorDesc,
        low_scale: trtp.TensorDesc, out_scale: trtp.TensorDesc, out_shift: trtp.TensorDesc,
        bits: Integers, high_scale: Reals, out_type: Integers,
        outputs: Tuple[trtp.TensorDesc], tactic: int,  # noqa: UP006
    ) -> Compiled:  # fmt: skip
        images, heads, queries, head = q.shape_expr
        masks, *lengths = mask.shape_expr
        heads_of_mask, rows_of_mask, columns_of_mask = (_static(length, name) for length in lengths)
        keys, columns = _static(k.shape_expr[2], name), _static(head, name)
        blocks = integer_attention.candidates(columns, keys)[tactic - 1]
        kernel = integer_attention.kernel(
            _out_type(out_type, name), _static(queries, name), keys, columns, int(bits[0]), float(high_scale[0]),
            blocks, (heads_of_mask, rows_of_mask, columns_of_mask), numerators,
        )  # fmt: skip
        rows = [each.shape_expr[0] for each in (scale, low_scale, out_scale, out_shift)]
        return _compiled(kernel, integer_attention.launch(kernel, images, heads, masks, *rows), capability)


def _compiled(kernel: Kernel, launch: Launch, capability: tuple[int, int]) -> Compiled:
    compiled = compile_kernel(kernel, capability)
    parameters = trtp.KernelLaunchParams(
        grid_x=launch.programs, block_x=compiled.threads, shared_mem=compiled.shared_bytes
    )
    scalars = trtp.SymIntExprs.from_tuple([trtp.SymInt32(scalar) for scalar in launch.scalars])
    return compiled.name, compiled.ptx, parameters, scalars


def _type_name(tensor: Any) -> str:
    return {kind: name for name, kind in TYPES.items()}[tensor.dtype]


def _out_type(number: Integers, name: str) -> str:
    found = integer_attention.OUT_TYPES.get(int(number[0]))
    if found is None:
        known = ", ".join(map(str, integer_attention.OUT_TYPES))
        raise UsageError(f"{name}: 'out_type' is {int(number[0])}, expected one of {known}. Export the file again.")
    return found


def _static(size: Any, name: str) -> int:
    if not size.is_constant:
        raise UsageError(f"{name}: its kernel needs tokens, head size and groups fixed at build time; only the batch "
                         "may vary. Export with fixed sizes or build with --no-plugins.")  # fmt: skip
    return int(size.constant_value())
