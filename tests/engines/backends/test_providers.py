"""Execution providers of ONNX Runtime. A stand-in for the library records what is asked: no GPU provider runs here."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import support
from tqdit.cli import main as cli
from tqdit.engines import cuda, doctor
from tqdit.engines.backends.onnxruntime import build, providers, run
from tqdit.engines.build import proof
from tqdit.engines.build.engine import build_engine
from tqdit.engines.bundle import CALLS_FILE, MANIFEST, describe_parts, read_manifest, write_manifest
from tqdit.engines.config import BatchRange, BuildConfig
from tqdit.engines.gpu import GpuShare
from tqdit.engines.run.denoiser import Denoiser
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.step_batcher import StepBatcher
from tqdit.errors import BackendError, UsageError
from tqdit.exporter.onnx_writer import write
from tqdit.golden import GoldenCalls

EVERY = list(providers.PROVIDERS.values())


class Driver:
    """What we ask of libcuda: its functions fill the memory that they are given and return an error code."""

    names, multiprocessors, version = ["NVIDIA L4", "NVIDIA L4", "NVIDIA GeForce RTX 4090"], [58, 58, 128], 12080

    def cuInit(self, _flags):
        return 0

    def cuDriverGetVersion(self, out):
        out._obj.value = self.version
        return 0

    def cuDeviceGet(self, out, index):
        out._obj.value = index
        return 0 if index < len(self.names) else 101

    def cuDeviceGetName(self, out, size, device):
        out.value = self.names[device].encode()
        return 0 if size > len(self.names[device]) else 1

    def cuDeviceGetAttribute(self, out, attribute, device):
        out._obj.value = {75: 8, 76: 9, 16: self.multiprocessors[device]}[attribute]
        return 0


@pytest.fixture
def floating(tmp_path):
    path = tmp_path / "float.onnx"
    write(path, *support.exported(pixels=True))
    return path


@pytest.fixture
def gpu_library(monkeypatch):
    """ONNX Runtime that says it has every provider and runs all on the CPU; `asked` holds what sessions asked for."""
    import onnxruntime

    asked = []

    def session(source, options, providers, **settings):
        asked.append(providers)
        inner = onnxruntime.InferenceSession(source, options, providers=[providers[-1]], **settings)
        names = [entry[0] if isinstance(entry, tuple) else entry for entry in providers]
        inner.get_providers = lambda: names
        return inner

    library = SimpleNamespace(**{name: getattr(onnxruntime, name) for name in dir(onnxruntime)})
    library.InferenceSession, library.get_available_providers = session, lambda: EVERY
    for module in (build, run):
        monkeypatch.setattr(module, "load_library", lambda: library)
    monkeypatch.setattr(cuda, "driver_library", Driver)
    return asked


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_this_library_lacks_is_refused_with_the_pip_command(floating, tmp_path, provider):
    with pytest.raises(BackendError, match=rf"--provider {provider}: .* has no .*pip install 'onnxruntime-gpu>="):
        build_engine(floating, tmp_path / "m.engine", config=BuildConfig(provider=provider))
    assert not (tmp_path / "m.engine").exists()


def test_a_silent_fallback_to_the_cpu_is_an_error():
    session = SimpleNamespace(get_providers=lambda: [providers.CPU])
    with pytest.raises(BackendError, match="asked ONNX Runtime for CUDAExecutionProvider, got CPUExecutionProvider"):
        providers.check_got(session, "cuda")
    providers.check_got(session, "cpu")


def test_a_cuda_bundle_asks_for_cuda_when_built_and_when_opened(floating, tmp_path, gpu_library):
    build_engine(floating, tmp_path / "m.engine", config=BuildConfig(provider="cuda", precision="fp32"))
    manifest = read_manifest(tmp_path / "m.engine")
    assert manifest.target["provider"] == "CUDAExecutionProvider"
    with Sampler.open(tmp_path / "m.engine") as sampler:
        assert sampler.sample([0], seed=1).shape == (1, 8, 8, 3)
    assert gpu_library == [["CUDAExecutionProvider", providers.CPU]] * 2


@pytest.mark.slow
def test_the_gpu_of_an_index_is_asked_for(floating, quantized, tmp_path, gpu_library):
    build_engine(floating, tmp_path / "m.engine", config=BuildConfig(provider="cuda", precision="fp32", device=1))
    Sampler.open(tmp_path / "m.engine", device=2).close()
    assert [providers[0][1]["device_id"] for providers in gpu_library] == [1, 2]
    with pytest.raises(UsageError, match="device is -1"):
        Sampler.open(tmp_path / "m.engine", device=-1)


@pytest.mark.usefixtures("gpu_library")
def test_golden_calls_run_once_for_each_kind_of_gpu_and_driver(floating, tmp_path, monkeypatch):
    """That an engine was right on one GPU says nothing of another, as for engines of TensorRT."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda, "KERNEL_MODULE", tmp_path / "none")
    folder, verified = tmp_path / "m.engine", tmp_path / "cache" / "tqdit" / "verified"
    build_engine(floating, folder, config=BuildConfig(provider="cuda", precision="fp32"))
    fed = {"x": np.ones((3, 3, 8, 8), np.float32), "timestep": np.arange(3), "class_labels": np.arange(3)}
    with Denoiser.open(folder) as denoise:
        GoldenCalls(fed, denoise(**fed), np.zeros(3)).save(folder / CALLS_FILE)
    manifest = read_manifest(folder)
    (folder / MANIFEST).unlink()
    write_manifest(folder, replace(manifest, files=describe_parts(folder)))

    def places(device=None):
        Denoiser.open(folder, device=device).close()
        return sorted(json.loads(file.read_text())["place"] for file in verified.iterdir())

    (first,) = places()
    assert first.startswith("NVIDIA L4 8.9, 58 multiprocessors, driver of CUDA 12.8, cuda, ONNX Runtime ")
    assert places(0) == places(1) == [first]
    for _ in range(2):
        (other, again) = places(2)
        assert other.startswith("NVIDIA GeForce RTX 4090 8.9, 128 multiprocessors")
        assert again == first
    monkeypatch.setattr(Driver, "version", 13000)
    assert len(places()) == 3
    with pytest.raises(BackendError, match="cuDeviceGet of NVIDIA's driver failed for GPU 3 with error 101"):
        Denoiser.open(folder, device=3)


def test_a_machine_without_a_driver_is_named_as_such(monkeypatch):
    def absent():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(cuda, "driver_library", absent)
    with pytest.raises(BackendError, match=r"no driver of an NVIDIA GPU here \(libcuda"):
        cuda.kind_of(0)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_engines_of_cpus_have_no_device(floating, tmp_path, backend):
    with pytest.raises(UsageError, match="--device"):
        build_engine(floating, tmp_path / "m.engine", backend, BuildConfig(device=0))
    build_engine(floating, tmp_path / "m.engine", backend)
    for opened in (Sampler.open, Denoiser.open, StepBatcher):
        with pytest.raises(UsageError, match="--device is the index of a GPU"):
            opened(tmp_path / "m.engine", device=0)
    assert (
        cli.run("sample", [str(tmp_path / "m.engine"), "-n", "1", "--device", "0", "-o", str(tmp_path / "a.npz")]) == 2
    )
    assert cli.run("inspect", [str(tmp_path / "m.engine"), "--verify", "--device", "0"]) == 2
    with pytest.raises(UsageError, match=f"--weight-budget has no meaning for {backend}"):
        Sampler.open(tmp_path / "m.engine", device=GpuShare(weight_budget_bytes=0))
    for command in (["sample"], ["inspect", "--verify"]):
        assert cli.run(command[0], [str(tmp_path / "m.engine"), *command[1:], "--weight-budget", "8"]) == 2


def test_a_cuda_bundle_is_not_opened_where_the_library_has_no_cuda(floating, tmp_path, gpu_library, monkeypatch):
    import onnxruntime

    build_engine(floating, tmp_path / "m.engine", config=BuildConfig(provider="cuda"))
    monkeypatch.setattr(run, "load_library", lambda: onnxruntime)
    with pytest.raises(BackendError, match=r"pip install 'onnxruntime-gpu>="):
        Sampler.open(tmp_path / "m.engine")


def test_the_tensorrt_provider_gets_profiles_and_a_cache_in_the_bundle(floating, tmp_path, gpu_library):
    config = BuildConfig(provider="tensorrt", precision="fp32", batch=BatchRange(1, 4, 8))
    build_engine(floating, tmp_path / "m.engine", config=config)
    (name, options), *others = gpu_library[0]
    assert name == "TensorrtExecutionProvider"
    assert others == ["CUDAExecutionProvider", providers.CPU]
    assert options["trt_engine_cache_enable"]
    assert (options["trt_int8_enable"], options["trt_fp16_enable"]) == (False, False)
    image = "x3x8x8"
    for key, rows in (("min", 2), ("opt", 8), ("max", 16)):  # guidance: two rows an image
        expected = f"x:{rows}{image},timestep:{rows},class_labels:{rows}"
        assert options[f"trt_profile_{key}_shapes"] == expected
    manifest = read_manifest(tmp_path / "m.engine")
    assert manifest.batch == BatchRange(1, 4, 8)
    Sampler.open(tmp_path / "m.engine").close()
    assert gpu_library[1][0][1]["trt_engine_cache_path"] == str(tmp_path / "m.engine")
    with pytest.raises(UsageError, match="9"):
        Sampler.open(tmp_path / "m.engine", batch=9)


@pytest.mark.slow
def test_a_proof_also_runs_the_cuda_provider(quantized, gpu_library, capsys, monkeypatch):
    gpu = doctor.Gpu(0, "NVIDIA L4", "8.9", 58, 24_000_000_000)
    monkeypatch.setattr(doctor, "find_gpus", lambda: (doctor.Driver("12.8", "8.7"), (gpu,)))
    monkeypatch.setattr(proof, "prove_kernels", lambda _: iter(()))
    monkeypatch.setattr(proof, "load_library", build.load_library)
    assert cli.run("doctor", ["--prove", str(quantized), "--device", "0"]) == 0
    said = capsys.readouterr().out
    assert "ok       onnxruntime, cuda: build and audit: quantized products" in said
    assert "ok       onnxruntime, cuda: run and compare: difference from ONNX Runtime" in said
    assert [("CUDAExecutionProvider", {"device_id": 0}), "CPUExecutionProvider"] in gpu_library
    library = build.load_library()
    monkeypatch.setattr(library, "get_available_providers", lambda: [providers.CPU])
    assert cli.run("doctor", ["--prove", str(quantized)]) == 0
    assert "cuda" not in capsys.readouterr().out.split("onnxruntime: build")[1]


@pytest.mark.slow
def test_integers_that_nothing_proves_are_refused(quantized, tmp_path, gpu_library):
    with pytest.raises(BackendError, match=r"would run in float on onnxruntime.*hides the compiled layers"):
        build_engine(quantized, tmp_path / "m.engine", config=BuildConfig(provider="tensorrt"))
    kept = build_engine(quantized, tmp_path / "m.engine", config=BuildConfig(provider="tensorrt", allow_fallback=True))
    assert kept.audit.integer == 0
    options = gpu_library[-1][0][1]  # without them TensorRT may choose neither type
    assert (options["trt_int8_enable"], options["trt_fp16_enable"]) == (True, True)
    assert len(kept.audit.fallen_back) == 14


def test_a_batch_range_has_no_meaning_for_providers_that_take_any(floating, tmp_path):
    with pytest.raises(UsageError, match="--batch has no meaning for --provider cpu"):
        build_engine(floating, tmp_path / "m.engine", config=BuildConfig(batch=BatchRange()))


def test_a_closed_engine_says_so(floating, tmp_path):
    build_engine(floating, tmp_path / "m.engine")
    engine = run.OrtEngine(tmp_path / "m.engine" / "graph.onnx", 1)
    engine.close()
    with pytest.raises(UsageError, match="closed"):
        engine({})
