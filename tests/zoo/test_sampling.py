"""Engines of recorded pipelines sampled without PyTorch: request values from a file."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

import tqdit
from support import made_once
from tqdit.calibration import placing
from tqdit.cli.main import run
from tqdit.engines.bundle import read_manifest
from tqdit.engines.run.ray_workers import Worker
from tqdit.engines.run.requests import read_embeddings
from tqdit.engines.run.shards import INDEX, describe_job
from tqdit.errors import UsageError
from tqdit.files import sha256
from tqdit.models.recording import Recording
from tqdit.sampling.schedule import SamplingSpec, samplers_of
from zoo.pipelines import FAMILIES
from zoo.test_pipelines import KNOBS, make

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")]

PROMPTS = 3


@pytest.fixture(scope="module")
def flux():
    return made_once("zoo-flux", lambda folder: make("flux", folder))


def values(seed=0):
    """Of three prompts, and the guidance that Flux takes as an input."""
    rng = np.random.default_rng(seed)
    text, pooled = rng.standard_normal((PROMPTS, 6, 32)), rng.standard_normal((PROMPTS, 32))
    return {
        "encoder_hidden_states": text.astype(np.float32), "pooled_projections": pooled.astype(np.float32),
        "guidance": np.full(PROMPTS, 3.5, np.float32),
    }  # fmt: skip


@pytest.fixture
def embeddings(tmp_path):
    path = tmp_path / "prompts.safetensors"
    save_file(values(), path)
    return path


def sampled(folder, output, *more, backend="onnxruntime"):
    assert run("sample", [str(folder / f"{backend}.engine"), "-q", "-o", str(output), *map(str, more)]) == 0
    return dict(np.load(output))


def refused(capsys, arguments, code=1):
    assert run("sample", [*map(str, arguments), "-q"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_image_shows_its_prompt_in_any_batch_beside_any_neighbours(flux, embeddings, tmp_path, backend):
    alone = sampled(flux, tmp_path / "a.npz", "--embeddings", embeddings, "-n", 5, "--batch", 1, backend=backend)
    assert alone["labels"].tolist() == [0, 1, 2, 0, 1]
    assert len(np.unique(alone["latents"].reshape(5, -1), axis=0)) == 5
    together = sampled(flux, tmp_path / "b.npz", "--embeddings", embeddings, "-n", 5, "--batch", 4, backend=backend)
    np.testing.assert_array_equal(together["latents"], alone["latents"])
    with tqdit.Sampler.open(flux / f"{backend}.engine") as sampler:
        requests = sampler.read_requests(embeddings)
        for image in (4, 1, 2):  # in another order
            one = sampler.sample_latents(
                {name: array[[image % PROMPTS]] for name, array in requests.items()}, first_image=image
            )
            np.testing.assert_array_equal(one[0], alone["latents"][image])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_embeddings_need_no_torch(flux, embeddings, tmp_path, backend):
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'diffusers', 'transformers', 'onnx', 'onnx_ir']))"
    arguments = [flux / f"{backend}.engine", "-q", "--embeddings", embeddings, "-o", tmp_path / "x.npz"]
    code = f"{blocked}; from tqdit.cli.main import run; sys.exit(run('sample', {[*map(str, arguments)]!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    expected = sampled(flux, tmp_path / "y.npz", "--embeddings", embeddings, backend=backend)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["latents"], expected["latents"])


def test_recorded_calls_are_a_file_of_request_values(flux, tmp_path):
    recording = Recording.load(flux / "calls.safetensors")
    found = sampled(flux, tmp_path / "a.npz", "--embeddings", flux / "calls.safetensors")
    with tqdit.Sampler.open(flux / "onnxruntime.engine") as sampler:
        np.testing.assert_array_equal(found["latents"], sampler.sample_latents(recording.requests))
    assert found["labels"].tolist() == list(range(len(recording)))


def test_shards_keep_the_file_s_sha256_and_refuse_another_one(flux, embeddings, tmp_path, capsys):
    arguments = [
        flux / "onnxruntime.engine", "--embeddings", embeddings, "-n", 5, "--shard-size", 2, "-o", tmp_path / "shards"
    ]  # fmt: skip
    assert run("sample", [*map(str, arguments), "-q"]) == 0
    job = json.loads((tmp_path / "shards" / INDEX).read_text())["job"]
    assert job["prompts"] == {
        "count": PROMPTS, "texts": [], "sha256": sha256(embeddings), "file": str(embeddings)
    }  # fmt: skip
    whole = sampled(flux, tmp_path / "whole.npz", "--embeddings", embeddings, "-n", 5)
    shards = list(tqdit.read_shards(tmp_path / "shards"))
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([shard[name] for shard in shards]), array)
    moved = embeddings.rename(tmp_path / "moved.safetensors")
    capsys.readouterr()
    arguments[2] = moved
    assert run("sample", [*map(str, arguments), "-q"]) == 0  # the same file elsewhere
    capsys.readouterr()
    save_file(values(seed=1), moved)
    line = refused(capsys, arguments)
    assert f"holds samples of another run: prompts {PROMPTS} of {job['prompts']['sha256'][:8]} (asked for" in line
    assert sha256(moved)[:8] in line


def test_a_worker_of_a_cluster_makes_the_same_shard(flux, embeddings):
    """It receives the values: their file need not be on its machine."""
    engine = flux / "onnxruntime.engine"
    manifest = read_manifest(engine)
    prompts = read_embeddings(embeddings, manifest.card.signature)
    embeddings.unlink()
    job = describe_job(engine, manifest, prompts, 0, 5, 2)
    worker = Worker(None, 1)
    assert worker.open(str(engine), job.engine)
    job, prompts = pickle.loads(pickle.dumps((job, prompts)))
    with tqdit.Sampler.open(engine) as sampler:
        expected = sampler.sample_latents(prompts.take(np.array([2, 0])), first_image=2)
    np.testing.assert_array_equal(worker.make(job, 1, prompts)["latents"], expected)


@pytest.mark.parametrize(("changes", "message"), [
    ({"guidance": None}, "'encoder_hidden_states'.*'pooled_projections'.*takes.*'guidance'"),
    ({"more": np.zeros((3, 2), np.float32)}, "'more'.*FluxTransformer2DModel takes"),
    ({"pooled_projections": np.zeros((3, 31), np.float32)}, r"'pooled_projections' is float32\[3, 31\].*\(N, 32\)"),
    ({"pooled_projections": np.zeros((3, 32), np.int64)}, r"'pooled_projections' is int64\[3, 32\].*floating"),
    ({"pooled_projections": np.zeros((2, 32), np.float32)}, r"lengths \[2, 3\]"),
    ({"guidance": np.full(3, np.nan, np.float32)}, "'guidance' holds NaN"),
])  # fmt: skip
def test_a_wrong_file_is_one_line_before_the_engine_is_opened(flux, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.setattr("tqdit.cli.sample.Sampler.open", None)
    arrays = {name: array for name, array in {**values(), **changes}.items() if array is not None}
    save_file(arrays, tmp_path / "x.safetensors")
    arguments = [flux / "onnxruntime.engine", "--embeddings", tmp_path / "x.safetensors", "-o", tmp_path / "x.npz"]
    line = refused(capsys, arguments)
    assert str(tmp_path / "x.safetensors") in line
    assert re.search(message, line)


def test_other_files_and_flags_are_refused(flux, embeddings, tmp_path, capsys):
    engine, output = flux / "onnxruntime.engine", tmp_path / "x.npz"
    assert "--embeddings FILE" in refused(capsys, [engine, "-o", output], 2)
    assert "--classes, --embeddings" in refused(
        capsys, [engine, "-o", output, "--classes", "1", "--embeddings", embeddings], 2
    )
    assert "no such file" in refused(capsys, [engine, "-o", output, "--embeddings", tmp_path / "none"])
    save_torch_file({"pooled_projections": torch.zeros(3, 32, dtype=torch.bfloat16)}, tmp_path / "half.safetensors")
    assert "BF16" in refused(capsys, [engine, "-o", output, "--embeddings", tmp_path / "half.safetensors"])


def test_another_sampler_takes_any_number_of_steps(flux, embeddings, tmp_path):
    """Euler's steps where the recorded ones lay are the recorded chain, up to float32 of the scheduler."""
    with tqdit.Sampler.open(flux / "float.engine") as sampler:
        chain = sampler.card.sampling
        assert {"euler", "unipc", "dpm++2m"} <= set(samplers_of(chain.process))
        recorded = sampler.sample_latents(values())
        times = chain.schedule.timesteps.tolist()
        again = sampler.sample_latents(values(), sampler="euler", timesteps=times)
        assert np.square(again - recorded).sum() < 1e-10 * np.square(recorded).sum()
    found = sampled(flux, tmp_path / "a.npz", "--embeddings", embeddings, "--sampler", "unipc", "--steps", 5)
    assert all(np.isfinite(array).all() for array in found.values())


def test_steps_are_placed_for_a_recorded_pipeline(flux, monkeypatch):
    """Its chains ask for what was recorded."""
    monkeypatch.setattr(placing, "LONG", ("dpm++2m", 24))
    rows = Recording.load(flux / "calls.safetensors")
    network = FAMILIES["flux"]()[0].transformer
    knobs = {**KNOBS, "calls": 3}
    table = tqdit.calibrate(network, rows=rows, **knobs)
    assert table.placed is not None
    process = rows.interface.sampling.process
    spec = SamplingSpec(process, table.placed.sampler, 3, table.placed.timesteps)
    assert str(spec) == f"3 placed steps of {table.placed.sampler}"


def test_a_step_graph_of_a_recorded_pipeline_is_refused(flux, tmp_path):
    """Its requests have values of their own in unconditional rows, and constants."""
    rows = Recording.load(flux / "calls.safetensors")
    network = FAMILIES["flux"]()[0].transformer
    with pytest.raises(UsageError, match=r"Flux.*--graph denoiser"):
        tqdit.export(network, tmp_path / "s.onnx", rows=rows, graph="step", sampler="euler", steps=4)
