"""The drop-in on an engine whose GPU computes on the host: what stays on the GPU, and what passes through the host."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import support
from fake_gpu import FakeCuda, FakeTensorRT, compute, residual_of
from tqdit.engines import cuda
from tqdit.engines.backends.tensorrt import run
from tqdit.engines.backends.tensorrt.library import TENSORRT
from tqdit.engines.bundle import Manifest
from tqdit.engines.config import BatchRange
from tqdit.engines.run import drop_in
from tqdit.engines.run.backend import InParts, OpenEngine
from tqdit.engines.run.denoiser import Denoiser
from tqdit.engines.run.drop_in import DropIn
from tqdit.errors import UsageError
from tqdit.exporter.graph import ExportConfig
from tqdit.models.arguments import digest

GPU = 1  # of the engine


class OnGpu:
    """A torch tensor of the host, as one on a GPU describes itself."""

    def __init__(self, tensor):
        array = tensor.numpy()
        self.__cuda_array_interface__ = array.__array_interface__ | {"strides": array.strides, "version": 2}


class Recorder(run.TensorRTEngine):
    """Notes which way each call came."""

    ways: list[tuple]

    def __call__(self, inputs):
        self.ways.append(("host", len(inputs["x"])))
        return super().__call__(inputs)

    def outputs(self, inputs):
        self.ways.append(("outputs", len(inputs["x"])))
        return super().outputs(inputs)

    def run_on_device(self, inputs, stream=None, out=None):
        self.ways.append(("gpu", len(inputs["x"]), stream))
        assert all(isinstance(value, torch.Tensor) for value in (*inputs.values(), out))
        super().run_on_device({name: OnGpu(value) for name, value in inputs.items()}, stream, OnGpu(out))


@pytest.fixture
def engine(monkeypatch, tmp_path):
    fake = FakeCuda()
    monkeypatch.setattr(cuda, "core", lambda: fake)
    monkeypatch.setattr(cuda, "driver", lambda: fake)
    monkeypatch.setattr(cuda, "KERNEL_MODULE", Path("/there/is/no/driver"))
    monkeypatch.setattr(drop_in, "gpu_of", lambda _: GPU)
    monkeypatch.setattr(drop_in, "stream_of", lambda _: 77)
    _, card = support.exported(ExportConfig(forecast=True), pixels=True)
    (tmp_path / "engine.plan").write_bytes(b"plan")
    manifest = Manifest(
        backend="tensorrt", precision="int8", card=card, entry="engine.plan", decoder=None, versions={}, target={},
        files={}, batch=BatchRange(1, 2, 2),
    )  # fmt: skip
    trt = FakeTensorRT(fake, batch=(2, 4), shape=card.state_shape, residual=card.residual)
    opened = Recorder(TENSORRT, tmp_path / "engine.plan", manifest, trt, GPU)
    opened.ways = []
    yield opened
    opened.close()


def transformer_of(engine):
    card = support.exported(ExportConfig(), pixels=True)[1]
    return DropIn(Denoiser(card, OpenEngine(engine), batch=4))


def arguments(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((rows, 3, 8, 8), np.float32),
        "timestep": rng.integers(0, 1000, rows),
        "class_labels": rng.integers(0, 5, rows),
    }


def as_tensors(given):
    return {name: torch.from_numpy(value) for name, value in given.items()}


@pytest.mark.parametrize("rows", [1, 3, 4, 10])
def test_tensors_on_the_gpu_of_the_engine_stay_there(engine, rows):
    transformer = transformer_of(engine)
    for seed in range(3):
        engine.ways.clear()
        given = arguments(rows, seed)
        found = transformer(**as_tensors(given)).sample
        np.testing.assert_array_equal(found.numpy(), compute(given))
        parts = [min(4, rows - start) for start in range(0, rows, 4)]
        assert engine.ways == [("gpu", part, 77) for part in parts]


def test_what_a_pipeline_passes_is_brought_into_the_types_of_the_graph(engine):
    """Half precision, one timestep for all rows as a number, a tensor that is not contiguous."""
    transformer = transformer_of(engine)
    given = arguments(2) | {"timestep": np.array([7, 7])}
    x = torch.from_numpy(given["x"]).to(torch.bfloat16)
    found = transformer(x.transpose(2, 3).contiguous().transpose(2, 3), 7, torch.from_numpy(given["class_labels"]))
    expected = compute(given | {"x": x.float().numpy()})
    assert found.sample.dtype == torch.bfloat16
    assert torch.equal(found.sample, torch.from_numpy(expected).to(torch.bfloat16))
    assert engine.ways == [("gpu", 2, 77)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"timestep": torch.tensor([1, 1000])},
            r"'timestep' 1000 is out of range; this model knows timesteps 0\.\.999",
        ),
        ({"timestep": torch.tensor([19.98, 3.0])}, r"timestep 19\.98 is not a whole number"),
        ({"class_labels": torch.tensor([0, 6])}, r"'class_labels' 6 is out of range"),
        ({"class_labels": torch.zeros(2)}, "'class_labels' holds float32 numbers, expected whole ones"),
        ({"class_labels": torch.zeros(3).long()}, r"'class_labels' has the shape \(3,\), expected \(2,\)"),
        ({"x": torch.zeros(2, 3, 4, 4)}, r"'x' has the shape \(2, 3, 4, 4\), expected \(2, 3, 8, 8\)"),
        ({"x": torch.zeros(0, 3, 8, 8), "timestep": 3}, "expected a non-empty array"),
    ],
)
def test_what_the_graph_cannot_take_is_refused_on_the_gpu_too(engine, wrong, message):
    with pytest.raises(UsageError, match=message):
        transformer_of(engine)(**as_tensors(arguments(2)) | wrong)


def test_another_gpu_a_cpu_and_an_engine_of_fixed_rows_pass_through_the_host(engine, monkeypatch):
    given = arguments(2)
    for place in (None, 0):
        monkeypatch.setattr(drop_in, "gpu_of", lambda _, place=place: place)
        np.testing.assert_array_equal(transformer_of(engine)(**as_tensors(given)).sample.numpy(), compute(given))
    monkeypatch.setattr(drop_in, "gpu_of", lambda _: GPU)
    in_parts = transformer_of(InParts(engine, 2))(**as_tensors(given)).sample
    np.testing.assert_array_equal(in_parts.numpy(), compute(given))
    assert engine.ways == [("host", 2)] * 3


def test_a_tensor_of_the_host_is_on_no_gpu():
    assert drop_in.gpu_of(torch.zeros(1)) is None
    sparse = torch.zeros(2, 3, 8, 8).to_sparse()
    card = support.exported(ExportConfig(), pixels=True)[1]
    with pytest.raises(UsageError, match="'x' is no dense tensor"):
        DropIn(Denoiser(card, lambda inputs: inputs["x"]))(sparse, 3, torch.zeros(2).long())


def test_calls_pass_through_the_host_while_some_are_forecast(engine):
    """Rows in parts of at most 4, a residual each; then they stay on the GPU again."""
    forecasts = []

    class Forecast:
        def __call__(self, inputs):
            forecasts.append(inputs)
            return compute(inputs)

        def close(self):
            pass

    card = support.exported(ExportConfig(forecast=True), pixels=True)[1]
    transformer = DropIn(Denoiser(card, OpenEngine(engine), batch=4, forecast=Forecast()))
    scheduler = SimpleNamespace(timesteps=torch.tensor([800, 700, 600, 500]))
    transformer.forecast(scheduler, (0, 2, 3))
    given, residuals = arguments(6), []
    for time in (800, 700, 600, 500):
        now = given | {"timestep": np.full(6, time)}
        residuals.append(residual_of(now, card.residual))
        np.testing.assert_array_equal(transformer(**as_tensors(now)).sample.numpy(), compute(now))
    assert engine.ways == [("outputs", 4), ("outputs", 2)] * 3
    assert [len(part["residual"]) for part in forecasts] == [4, 2]
    found = np.concatenate([part["residual"] for part in forecasts])
    np.testing.assert_allclose(found, 2 * residuals[1] - residuals[0], rtol=1e-5)
    transformer.forecast(scheduler, None)
    transformer(**as_tensors(arguments(2)))
    assert engine.ways[-1] == ("gpu", 2, 77)


def test_a_constant_tensor_is_brought_to_the_host_once(engine, monkeypatch):
    """Positions on the GPU, the same in each step of a chain; a digest needs them on the host."""
    digests, ids = [], torch.arange(12.0).reshape(4, 3)
    card = replace(support.exported(ExportConfig(), pixels=True)[1], constants={"ids": digest(ids)})
    monkeypatch.setattr(drop_in, "digest", lambda value: digests.append(value) or digest(value))
    transformer, given = DropIn(Denoiser(card, OpenEngine(engine), batch=4)), as_tensors(arguments(2))
    for same in (ids, ids.clone(), ids):
        transformer(**given, ids=same)
    assert len(digests) == 1
    ids[0, 0] = 7
    with pytest.raises(UsageError, match="'ids' is not what it was"):
        transformer(**given, ids=ids)
