"""The CUDA part of the runtime on a real GPU: everything but TensorRT, whose place a copy on the stream takes."""

import numpy as np
import pytest

from fake_gpu import FakeTensorRT
from tqdit.engines.backends.tensorrt import cuda, run
from tqdit.engines.backends.tensorrt.library import TENSORRT
from tqdit.errors import TqditError


def has_gpu():
    try:
        cuda.find_device()
    except TqditError:
        return False
    return True


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="needs an NVIDIA GPU and its driver")]


class CopyContext:
    """An execution context that copies x to x_next, twice over the scratch memory, as a stand-in for an engine."""

    def __init__(self):
        self.addresses, self.rows, self.executions = {}, 0, 0

    def set_device_memory(self, address, size):
        self.scratch = address

    def set_input_shape(self, name, shape):
        self.rows = shape[0]
        return shape[0] <= 16

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        self.executions += 1
        size = self.rows * 3 * 4 * 4 * 4
        cuda.copy(self.scratch, self.addresses["x"], size, "DeviceToDevice", stream)
        cuda.copy(self.addresses["x_next"], self.scratch, size, "DeviceToDevice", stream)
        return True


@pytest.fixture
def engine(tmp_path):
    from types import SimpleNamespace

    class Trt(FakeTensorRT):
        def Runtime(self, logger):
            def deserialize(plan):
                names = list(self.tensors)
                contexts = self.contexts

                def create(strategy):
                    contexts.append(CopyContext())
                    return contexts[-1]

                return SimpleNamespace(
                    device_memory_size_v2=1 << 20, num_io_tensors=len(names), get_tensor_name=lambda i: names[i],
                    get_tensor_dtype=lambda n: self.tensors[n][0], get_tensor_shape=lambda n: self.tensors[n][1],
                    get_tensor_mode=lambda n: "out" if n == "x_next" else "in", create_execution_context=create,
                )  # fmt: skip

            return SimpleNamespace(deserialize_cuda_engine=deserialize)

    (tmp_path / "engine.plan").write_bytes(b"plan")
    manifest = SimpleNamespace(batch=None, entry="engine.plan", target={}, versions={})
    made = run.TensorRTEngine(TENSORRT, tmp_path / "engine.plan", manifest, Trt(None))
    yield made
    made.close()


def inputs(rows, seed):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((rows, 3, 4, 4), np.float32), "step": np.zeros(rows, np.int64),
        "class_labels": np.zeros(rows, np.int64), "guidance_scale": np.ones(rows, np.float32),
        "noise": np.zeros((rows, 3, 4, 4), np.float32),
    }  # fmt: skip


def test_captured_graphs_replay_with_new_inputs(engine):
    for seed in range(5):
        for rows in (1, 4, 16):
            fed = inputs(rows, seed)
            assert np.array_equal(engine(fed), fed["x"])
    assert [context.executions for context in engine._trt.contexts] == [2, 2, 2]  # a run and a capture each


def test_device_arrays_travel_by_array_interface(engine):
    for seed in range(3):
        fed = inputs(2, seed)
        on_device = {}
        for name, array in fed.items():
            on_device[name] = cuda.DeviceArray(array.shape, array.dtype, 0)
            cuda.copy(on_device[name].address, array.ctypes.data, array.nbytes, "HostToDevice", 0)
        out = engine.run_on_device(on_device)
        assert np.array_equal(out.numpy(), fed["x"])
        again = engine.run_on_device(on_device | {"x": out})
        assert np.array_equal(again.numpy(), fed["x"])


def test_torch_tensors_are_taken_and_given(engine):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fed = {name: torch.from_numpy(value).cuda() for name, value in inputs(4, 0).items()}
        fed["x"] = fed["x"] * 2
        out = torch.as_tensor(engine.run_on_device(fed, stream), device="cuda")
        assert torch.equal(out, fed["x"])


def test_memory_goes_back(engine):
    free = cuda.call("cudaMemGetInfo")[0]
    for seed in range(200):
        fed = inputs(1 + seed % 16, seed)
        engine(fed)
        out = engine.run_on_device({n: _up(a) for n, a in fed.items()})
        assert np.array_equal(out.numpy(), fed["x"])
    del out
    assert free - cuda.call("cudaMemGetInfo")[0] < 64 << 20


def _up(array):
    made = cuda.DeviceArray(array.shape, array.dtype, 0)
    cuda.copy(made.address, array.ctypes.data, array.nbytes, "HostToDevice", 0)
    return made
