"""Boundaries of groups of timesteps in the type of the graph's timestep."""

import numpy as np
import onnx_ir as ir
import pytest

from tqdit.exporter.passes.groups import GroupSelector, in_type

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [np.int64, np.float32])
def test_boundaries_of_the_graph_divide_timesteps_as_the_table_does(dtype):
    boundaries = np.sort(np.random.default_rng(0).uniform(-3, 1000, 200))
    rounded = in_type(boundaries, np.dtype(dtype))
    assert rounded.dtype == dtype
    if dtype == np.int64:
        timesteps = np.arange(-4, 1001)
    else:
        near = boundaries.astype(np.float32)
        timesteps = np.concatenate([near, np.nextafter(near, np.float32(-9)), np.nextafter(near, np.float32(2000))])
    np.testing.assert_array_equal(timesteps[:, None] >= rounded, timesteps[:, None] >= boundaries)


@pytest.mark.parametrize(("kind", "expected"), [(ir.DataType.INT64, np.int64), (ir.DataType.FLOAT, np.float32)])
def test_the_type_of_the_boundaries_is_that_of_the_timestep(kind, expected):
    groups = GroupSelector(ir.Value(name="timestep", type=ir.TensorType(kind)), np.array([250.0, 500.0]))
    assert groups.boundaries.dtype == expected
    assert groups.boundaries.tolist() == [250, 500]
