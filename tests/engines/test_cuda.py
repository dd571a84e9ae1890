"""The CUDA part of the runtime on a real GPU: everything but TensorRT, whose place a copy on the stream takes."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import support
from fake_gpu import FakeEngine, FakeTensorRT
from tqdit.engines import cuda
from tqdit.engines.backends.tensorrt import run
from tqdit.engines.backends.tensorrt.library import TENSORRT
from tqdit.engines.run.backend import OpenEngine
from tqdit.engines.run.denoiser import Denoiser
from tqdit.errors import TqditError
from tqdit.exporter.graph import ExportConfig


def has_gpu():
    try:
        cuda.find_device()
    except TqditError:
        return False
    return True


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="needs an NVIDIA GPU and its driver")]


class CopyContext:
    """An execution context that copies x to the prediction by way of the scratch memory, in the place of an engine."""

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
        x, scratch, prediction = (
            cuda.core().Buffer.from_handle(address, size)
            for address in (self.addresses["x"], self.scratch, self.addresses["prediction"])
        )
        scratch.copy_from(x, stream=cuda.open_stream(stream))
        prediction.copy_from(scratch, stream=cuda.open_stream(stream))
        return True


class CopyTensorRT(FakeTensorRT):
    """Opens any plan as the network of `CopyContext`."""

    def __init__(self):
        super().__init__(None)
        self.tensors["prediction"] = self.tensors["x"]

    def Runtime(self, logger):
        def create(strategy):
            self.contexts.append(CopyContext())
            return self.contexts[-1]

        engine = FakeEngine(self)
        engine.device_memory_size_v2, engine.create_execution_context = 1 << 20, create
        return SimpleNamespace(deserialize_cuda_engine=lambda _: engine)


@pytest.fixture
def engine(tmp_path):
    (tmp_path / "engine.plan").write_bytes(b"plan")
    manifest = SimpleNamespace(
        batch=None, entry="engine.plan", target={}, versions={}, card=SimpleNamespace(rows_per_image=1)
    )
    made = run.TensorRTEngine(TENSORRT, tmp_path / "engine.plan", manifest, CopyTensorRT())
    yield made
    made.close()


def inputs(rows, seed):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((rows, 3, 4, 4), np.float32),
        "timestep": np.zeros(rows, np.int64),
        "class_labels": np.zeros(rows, np.int64),
    }


def on_device(engine, fed):
    """The arrays on the GPU."""
    made = {}
    with cuda.on_device(engine._device):
        for name, array in fed.items():
            buffer = engine._allocate(array.nbytes)
            source = cuda.core().Buffer.from_handle(array.ctypes.data, array.nbytes)
            buffer.copy_from(source, stream=engine._stream)
            engine._stream.sync()  # before the array of the host goes
            made[name] = cuda.DeviceArray(engine._device, buffer, array.shape, array.dtype, engine._stream)
    return made


def test_captured_graphs_replay_with_new_inputs(engine):
    for seed in range(5):
        for rows in (1, 4, 16):
            fed = inputs(rows, seed)
            assert np.array_equal(engine(fed), fed["x"])
    assert [context.executions for context in engine._trt.contexts] == [2, 2, 2]  # a run and a capture each


def test_device_arrays_travel_by_array_interface(engine):
    for seed in range(3):
        fed = inputs(2, seed)
        given = on_device(engine, fed)
        out = engine.run_on_device(given)
        assert np.array_equal(out.numpy(), fed["x"])
        again = engine.run_on_device(given | {"x": out})
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


def test_a_pipeline_hands_its_tensors_over_where_they_lie(engine, monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    DropIn = pytest.importorskip("tqdit.engines.run.drop_in", exc_type=ImportError).DropIn
    monkeypatch.setattr(type(engine), "__call__", None)  # the way through the host
    card = support.exported(ExportConfig(), pixels=True)[1]
    ports = tuple(
        replace(port, shape=(None, 3, 4, 4)) if port.kind == "state" else port for port in card.signature.ports
    )
    card = replace(card, signature=replace(card.signature, ports=ports, output=(None, 3, 4, 4)))
    transformer = DropIn(Denoiser(card, OpenEngine(engine), batch=4))
    for seed in range(3):
        fed = {name: torch.from_numpy(value).to(f"cuda:{engine.gpu}") for name, value in inputs(10, seed).items()}
        fed["x"] = fed["x"].half() * 2  # what the engine waits for
        sample = transformer(**fed).sample + 1
        assert sample.device == fed["x"].device
        assert torch.equal(sample, fed["x"] + 1)


def test_memory_goes_back(engine):
    free = free_bytes(engine)
    for seed in range(200):
        fed = inputs(1 + seed % 16, seed)
        engine(fed)
        out = engine.run_on_device(on_device(engine, fed))
        assert np.array_equal(out.numpy(), fed["x"])
    del out
    assert free - free_bytes(engine) < 64 << 20


def free_bytes(engine):
    with cuda.on_device(engine._device):
        _, free, _ = cuda.driver().cuMemGetInfo()
    return free
