"""Where Triton kernels run in the tests: on the GPU, or in Triton's interpreter where there is none.

`conftest.py` imports this before anything else, since Triton decides when it is imported.
"""

import os
import warnings

import numpy as np
import torch

from tqdit.plugins import kernels
from tqdit.plugins.multi_region_attention import launch as attention
from tqdit.plugins.multi_region_integer_attention import launch as integer_attention
from tqdit.plugins.multi_region_softmax import launch as softmax
from tqdit.plugins.time_group_select import launch as select

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

NO_MASK = np.zeros((1, 1, 1, 1), np.float32)
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8}
UNWRITTEN = {"i8": -99}


def tensor(array: np.ndarray, floats: str | None = None) -> torch.Tensor:
    made = torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)
    return made if floats is None else made.to(TYPES[floats])


def launched(kernel, launch, inputs, shape, floats) -> np.ndarray:
    """The result as float32; what the kernel does not write stays 12345, of int8 -99."""
    return launched_with(kernel, launch, inputs, [(shape, floats)])[0]


def launched_with(kernel, launch, inputs, outputs) -> list[np.ndarray]:
    """As above, several results of these shapes and types."""
    out = tuple(torch.full(shape, UNWRITTEN.get(floats, 12345.0), dtype=TYPES[floats], device=DEVICE)
                for shape, floats in outputs)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the interpreter computes -inf - -inf in NumPy
        kernels.run(kernel, launch, inputs, out)
    return [each.float().cpu().numpy() for each in out]


def run_softmax(scores, low_scale, bits, high_scale, floats="fp32"):
    images, heads, queries, columns = scores.shape
    kernel = softmax.kernel(floats, columns, bits, high_scale)
    launch = softmax.launch(kernel, images, heads, queries, len(low_scale))
    return launched(kernel, launch, (tensor(scores, floats), tensor(low_scale)), scores.shape, floats)


def run_numerator(scores, low_scale, bits, high_scale, floats="fp32"):
    """(numerators, reciprocals of their sums)."""
    images, heads, queries, columns = scores.shape
    kernel = softmax.kernel(floats, columns, bits, high_scale, numerators=True)
    launch = softmax.launch(kernel, images, heads, queries, len(low_scale))
    outputs = [(scores.shape, floats), ((*scores.shape[:3], 1), "fp32")]
    return launched_with(kernel, launch, (tensor(scores, floats), tensor(low_scale)), outputs)


def run_select(timestep, boundaries, table, floats="fp32"):
    time = "i64" if timestep.dtype == np.int64 else "fp32"
    kernel = select.kernel(floats, len(boundaries), time)
    shape = (len(timestep), *table.shape[1:])
    launch = select.launch(len(timestep), int(np.prod(shape[1:])))
    return launched(kernel, launch, (tensor(timestep), tensor(boundaries), tensor(table, floats)), shape, floats)


def run_attention(q, k, v, mask, low_scale, bits, high_scale, scale, floats="fp32", blocks=None,
                  numerators=False):  # fmt: skip
    images, heads, queries, head = q.shape
    kernel = attention.kernel(floats, queries, k.shape[2], head, bits, high_scale, blocks, mask.shape[1:],
                              numerators)  # fmt: skip
    launch = attention.launch(kernel, images, heads, len(low_scale), scale, len(mask))
    inputs = (*(tensor(each, floats) for each in (q, k, v)), tensor(mask), tensor(low_scale))
    return launched(kernel, launch, inputs, q.shape, floats)


def run_integer_attention(inputs, bits, high_scale, out="fp32", blocks=None, numerators=False):
    """inputs: those of the op by name, in its order; q, k and v of any type that holds their codes."""
    q, k, mask = inputs["q"], inputs["k"], inputs["mask"]
    images, heads, queries, head = q.shape
    kernel = integer_attention.kernel(out, queries, k.shape[2], head, bits, high_scale, blocks, mask.shape[1:],
                                      numerators)  # fmt: skip
    rows = (len(inputs[name]) for name in ("mask", "scale", "low_scale", "out_scale", "out_shift"))
    launch = integer_attention.launch(kernel, images, heads, *rows)
    tensors = tuple(tensor(each, "i8" if name in "qkv" else None) for name, each in inputs.items())
    return launched(kernel, launch, tensors, q.shape, out)


def regions(
    scores: np.ndarray, low_scale: np.ndarray, bits: int, high_scale: float, numerators: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(quantized probabilities, how far each may be off because its quotient lies at a rounding tie), in float64.

    numerators: those of the quantized numerators.

    At a tie the last bit of a float32 operation decides, and the two neighbouring codes are both right.
    """
    top = 2 ** (bits - 1) - 1
    s1 = low_scale.astype(np.float64).reshape(-1, 1, 1, 1)
    exponent = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True).astype(np.float64))
    total = exponent.sum(-1, keepdims=True)
    p = exponent if numerators else exponent / total

    def rounded(scale):
        exact = p / scale
        return np.round(exact), np.abs(exact - np.floor(exact) - 0.5) < 1e-5 * (1 + exact)

    (low, low_tie), (high, high_tie) = rounded(s1), rounded(high_scale)
    is_low = low <= top
    quantized = np.where(is_low, low * s1, np.minimum(high, top) * high_scale)
    between = np.abs(np.minimum(high, top) * high_scale - top * s1)  # from one region to the other
    off = np.where(low_tie & (np.abs(low - top) <= 1), np.maximum(between + high_scale, s1),
                   np.where(is_low, low_tie * s1, high_tie * high_scale))  # fmt: skip
    return (quantized / total, off / total) if numerators else (quantized, off)
