"""DLPack with memory of the host, which NumPy and torch read: the code is the same for a GPU's but for the device."""

import gc
import weakref

import numpy as np
import pytest
import torch

from tqdit.engines.backends.tensorrt import dlpack

HOST = (1, 0)


class Lender:
    """Lends an array of ours."""

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return HOST

    def __dlpack__(self, **_):
        return dlpack.export(self.array.ctypes.data, self.array.shape, self.array.dtype, HOST, self)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8])
@pytest.mark.parametrize(
    "take", [np.from_dlpack, lambda lender: torch.from_dlpack(lender).numpy()], ids=["numpy", "torch"]
)
def test_others_see_our_memory(dtype, take):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    seen = take(Lender(array))
    assert seen.dtype == array.dtype
    assert np.array_equal(seen, array)
    array[1, 2, 3] = 99
    assert seen[1, 2, 3] == 99


@pytest.mark.slow
def test_our_memory_lives_as_long_as_it_is_used():
    lender = Lender(np.ones(3, np.float32))
    alive = weakref.ref(lender)
    taken = torch.from_dlpack(lender)
    del lender
    gc.collect()
    assert alive() is not None
    assert taken.sum() == 3
    del taken
    gc.collect()
    assert alive() is None


def test_a_capsule_that_nobody_takes_lets_go():
    lender = Lender(np.ones(3, np.float32))
    alive, before = weakref.ref(lender), len(dlpack._exported)
    capsule = lender.__dlpack__()
    assert len(dlpack._exported) == before + 1
    del lender, capsule
    gc.collect()
    assert alive() is None
    assert len(dlpack._exported) == before


@pytest.mark.parametrize("make", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_we_see_the_memory_of_others(make):
    array = make([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    capsule = array.__dlpack__()
    seen = dlpack.borrow(capsule)
    address = array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()
    kind = np.float64 if isinstance(array, np.ndarray) else np.float32
    assert (seen.address, seen.shape, seen.dtype, seen.device) == (address, (2, 3), kind, HOST)
    assert seen.strides in (None, (3, 1))
    assert dlpack.borrow(array.T.__dlpack__()).strides == (1, 3)
    assert np.array_equal(np.from_dlpack(Again(capsule)), np.asarray(array))  # borrowing took nothing


class Again:
    def __init__(self, capsule):
        self.capsule = capsule

    def __dlpack_device__(self):
        return HOST

    def __dlpack__(self, **_):
        return self.capsule


def test_what_numpy_has_no_word_for_is_refused():
    with pytest.raises(BufferError, match="DLPack type code"):
        dlpack.borrow(torch.zeros(2, dtype=torch.bfloat16).__dlpack__())


def test_lending_a_thousand_times_keeps_nothing():
    array = np.ones(8, np.float32)
    before = len(dlpack._exported)
    for _ in range(1000):
        torch.from_dlpack(Lender(array))
        Lender(array).__dlpack__()
    gc.collect()
    assert len(dlpack._exported) == before
