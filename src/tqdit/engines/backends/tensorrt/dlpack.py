"""DLPack by hand: a capsule around memory that we own, and a look into somebody else's.

The structures are those of DLPack 0.8's `dlpack.h`, which every array library exchanges by default
(https://dmlc.github.io/dlpack/latest/c_api.html).
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

CUDA = 2  # kDLCUDA
NAME = b"dltensor"
_CODES = {"i": 0, "u": 1, "f": 2}
_KINDS = {code: kind for kind, code in _CODES.items()}


class Borrowed(NamedTuple):
    """What a capsule describes; valid for as long as the capsule lives."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # in elements
    dtype: np.dtype[Any]
    device: tuple[int, int]  # (kind, index)


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor."""


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Managed._fields_ = (("tensor", _DLTensor), ("manager", ctypes.c_void_p), ("deleter", _Deleter))
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, _Destructor)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
# The same two for a capsule that is being destroyed: no reference to it may be made.
_dying_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_dying_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)

_exported: dict[int, tuple[Any, ...]] = {}  # what capsules keep alive, by their address


def _let_go(address: int) -> None:
    """The consumer needs the memory no more."""
    _exported.pop(address, None)


def _destroy(capsule: int) -> None:
    """A capsule dies; where it still has its first name, nobody took it."""
    if _dying_is_valid(capsule, NAME):
        _let_go(_dying_pointer(capsule, NAME))


_delete_callback, _destroy_callback = _Deleter(_let_go), _Destructor(_destroy)  # must live as long as the capsules


def export(address: int, shape: tuple[int, ...], dtype: np.dtype[Any], device: tuple[int, int], owner: Any) -> Any:
    """A capsule of contiguous memory; `owner` lives until the consumer lets go."""
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    tensor = _DLTensor(
        address, *device, len(shape), _CODES[dtype.kind], 8 * dtype.itemsize, 1,
        ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64)), None, 0,
    )  # fmt: skip
    managed = _Managed(tensor, None, _delete_callback)
    where = ctypes.addressof(managed)
    _exported[where] = (managed, sizes, owner)
    return _new(where, NAME, _destroy_callback)


def borrow(capsule: Any) -> Borrowed:
    """Read a capsule without taking it: hold it for as long as its memory is used."""
    tensor = _Managed.from_address(_pointer(capsule, NAME)).tensor
    if tensor.lanes != 1 or tensor.code not in _KINDS:
        raise BufferError(f"DLPack type code {tensor.code} with {tensor.lanes} lane(s) is no number of NumPy's.")
    return Borrowed(
        (tensor.data or 0) + tensor.byte_offset,
        tuple(tensor.shape[: tensor.ndim]),
        tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None,
        np.dtype(f"{_KINDS[tensor.code]}{tensor.bits // 8}"),
        (tensor.device_type, tensor.device_id),
    )
