"""The builder against the recorded attributes of TensorRT 10.16 and 11.4: which settings reach which release.

The library is a fake in tests/fake_tensorrt that lacks what the release lacks; the worker process, Polygraphy and the
audit are the real ones. Nothing is compiled and nothing runs on a GPU.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import support
from tables import Kind, make_table
from tqdit.cli import main as cli
from tqdit.engines import cuda
from tqdit.engines.backends.tensorrt import builder, worker
from tqdit.engines.build import proof
from tqdit.engines.build.engine import build_engine
from tqdit.engines.bundle import read_manifest
from tqdit.engines.config import BatchRange, BuildConfig
from tqdit.errors import BackendError, TqditWarning, UsageError
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write
from tqdit.golden import Verdict

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[2]
RELEASES = ["10.16", "11.4"]


@pytest.fixture(params=support.few(RELEASES, "11.4"))
def release(request, monkeypatch, tmp_path):
    """One release installed, in this process and in the worker; gives its calls."""
    calls = tmp_path / "calls"
    monkeypatch.setenv("TQDIT_TEST_SURFACE", str(TESTS / "data" / "tensorrt_surfaces" / f"{request.param}.json"))
    monkeypatch.setenv("TQDIT_TEST_CALLS", str(calls))
    monkeypatch.syspath_prepend(TESTS / "fake_tensorrt")
    monkeypatch.setattr(cuda, "find_device", lambda *_: cuda.Device(None, "8.7", "Orin", 16))
    yield lambda: [json.loads(line) for line in calls.read_text().splitlines()]
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    write(path, *support.exported(ExportConfig(), table=make_table(support.tiny_model(), Kind(groups=10))))
    return path


FAST = {"float_type": "fp32"}  # nothing to cast


def test_a_build_with_every_option(release, source, tmp_path):
    cache, progress = tmp_path / "timings", []
    cache.write_bytes(b"old")
    config = BuildConfig(
        batch=BatchRange(1, 4, 8), workspace_bytes=1 << 30, timing_cache=cache, optimization_level=4,
        version_compatible=True, lean_runtime="exclude", plugins=False, **FAST,
    )  # fmt: skip
    manifest = build_engine(source, tmp_path / "a.engine", "tensorrt", config, lambda *step: progress.append(step))
    calls = release()
    assert [call["strongly_typed"] for call in calls if "strongly_typed" in call] == [True]
    flags = {call["flag"] for call in calls if "flag" in call}
    assert flags == {"TF32", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"}  # no type flag: the network has types
    assert {"pool": "WORKSPACE", "bytes": 1 << 30} in calls
    assert {"timing_cache": "old"} in calls
    assert cache.read_bytes() == b"old+timings"
    settings = {call["set"]: call["to"] for call in calls if "set" in call}
    assert settings["builder_optimization_level"] == 4
    assert settings["profiling_verbosity"] == "DETAILED"
    profiles = {call["profile"]: call["shapes"] for call in calls if "profile" in call}  # guidance: two rows an image
    assert profiles == {
        "x": [[2, 4, 8, 8], [8, 4, 8, 8], [16, 4, 8, 8]], "timestep": [[2], [8], [16]], "class_labels": [[2], [8], [16]]
    }  # fmt: skip
    assert {"functions": 0} in calls  # inlined beforehand
    assert ("Building engine", 2, 2) in progress
    assert manifest == read_manifest(tmp_path / "a.engine")
    assert manifest.audit.line.startswith("quantized products: 14 int8, 0 simulated by choice")
    assert manifest.audit.fallen_back == ()
    assert manifest.target["compute_capabilities"] == "8.7"
    assert (manifest.target["device"], manifest.target["multiprocessors"]) == ("Orin", "16")
    assert manifest.target["version_compatible"] == "exclude"
    assert set(manifest.plugins.values()) == {"body: --no-plugins"}


def test_defaults_ask_for_nothing_special(release, source, tmp_path):
    manifest = build_engine(source, tmp_path / "a.engine", "tensorrt", BuildConfig(**FAST))
    calls = release()
    assert {call["flag"] for call in calls if "flag" in call} == {"TF32"}
    assert not any("pool" in call for call in calls)
    assert manifest.batch == BatchRange(1, 16, 16)
    assert "version_compatible" not in manifest.target
    assert set(manifest.plugins.values()) == {manifest.plugins["TimeGroupSelect"]}
    assert manifest.plugins["TimeGroupSelect"].startswith("body: TensorRT 1")  # this fake has no plugin module


def test_plugins_get_the_custom_ops_as_they_are(release, source, tmp_path, monkeypatch):
    from tqdit.plugins import tensorrt as plugins

    monkeypatch.setattr(plugins, "why_unavailable", lambda: None)
    monkeypatch.setenv("TQDIT_TEST_PLUGINS", "1")
    manifest = build_engine(source, tmp_path / "a.engine", "tensorrt", BuildConfig(**FAST))
    assert manifest.plugins == {"TimeGroupSelect": "plugin", "MultiRegionSoftmax": "plugin"}
    assert {"functions": 2} in release()


def test_a_plugin_that_is_not_taken_is_said(release, source, tmp_path, monkeypatch):
    from tqdit.plugins import tensorrt as plugins

    monkeypatch.setattr(plugins, "why_unavailable", lambda: None)
    manifest = build_engine(source, tmp_path / "a.engine", "tensorrt", BuildConfig(**FAST))
    assert set(manifest.plugins.values()) == {"body: TensorRT took none for it"}


def test_plugins_that_fail_give_way_to_portable_ones_and_then_to_the_bodies(release, source, tmp_path, monkeypatch):
    from tqdit.plugins import tensorrt as plugins

    monkeypatch.setattr(plugins, "why_unavailable", lambda: None)
    monkeypatch.setenv("TQDIT_TEST_REFUSE_PLUGINS", "Error Code 1: onShapeChange")
    with pytest.warns(TqditWarning, match="trying without: .*onShapeChange") as warned:
        manifest = build_engine(source, tmp_path / "a.engine", "tensorrt", BuildConfig(**FAST))
    assert [str(one.message).split()[3] for one in warned] == ["8.6", "8.0"]
    assert [call["functions"] for call in release() if "functions" in call] == [2, 2, 0]
    assert set(manifest.plugins) == {"TimeGroupSelect", "MultiRegionSoftmax"}
    assert all(kind.startswith("body: with plugins: ") for kind in manifest.plugins.values())


def test_plugins_that_compute_something_else_give_way_to_the_bodies(release, source, tmp_path, monkeypatch):
    """Where the golden calls run at build. They cannot run here: the verdicts are given."""
    from tqdit.engines.build import engine
    from tqdit.plugins import tensorrt as plugins

    verdicts = [Verdict(np.array([0.5]), np.array([0.01]), 0.0), Verdict(np.array([0.01]), np.array([0.01]), 0.0)]
    monkeypatch.setattr(plugins, "why_unavailable", lambda: None)
    monkeypatch.setattr(engine, "CALLS_FILE", "engine.plan")
    monkeypatch.setattr(engine, "verify_bundle", lambda *_: verdicts.pop(0))
    monkeypatch.setenv("TQDIT_TEST_PLUGINS", "1")
    with pytest.warns(TqditWarning, match=r"golden calls is 5\.0e-01.*without plugins"):
        manifest = build_engine(source, tmp_path / "a.engine", "tensorrt", BuildConfig(**FAST))
    assert set(manifest.plugins.values()) == {"body: --no-plugins"}
    assert manifest.verified.error == 0.01


def test_a_failure_without_plugins_is_tried_once(release, source, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDIT_TEST_FAIL", "Error Code 10: no implementation")
    with pytest.raises(BackendError, match="Error Code 10"):
        build_engine(source, tmp_path / "a.engine", "tensorrt", BuildConfig(plugins=False, **FAST))
    assert len([call for call in release() if "functions" in call]) == 1


def test_int8_on_blackwell_ultra_is_warned_of(release, source, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "find_device", lambda *_: cuda.Device(None, "10.3", "NVIDIA B300", 148))
    with pytest.warns(TqditWarning, match=r"NVIDIA B300.*10\.3.*--precision fp8 or bf16"):
        build_engine(source, tmp_path / "a.engine", "tensorrt", BuildConfig(**FAST))
    build_engine(source, tmp_path / "b.engine", "tensorrt", BuildConfig(precision="fp32"))  # a warning is an error


def test_what_the_library_reports_is_the_reason(release, source, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDIT_TEST_FAIL", "Error Code 10: no implementation\nfor node x")
    with pytest.raises(
        BackendError, match=r"TensorRT 1.* cannot compile it \(Error Code 10: no implementation for node x"
    ):
        build_engine(source, tmp_path / "a.engine", "tensorrt", BuildConfig(**FAST))


def test_what_the_inspector_said_is_kept_if_the_audit_refuses(release, source, tmp_path, monkeypatch):
    output, kept = tmp_path / "a.engine", tmp_path / "a.engine.layers.txt"
    build_engine(source, output, "tensorrt", BuildConfig(**FAST))
    assert not (output / "layers.txt").exists()
    monkeypatch.setenv("TQDIT_TEST_FALLBACK", "1")
    with pytest.raises(BackendError, match=r"14 quantized product\(s\) would run in float.*a\.engine\.layers\.txt"):
        build_engine(source, output, "tensorrt", BuildConfig(**FAST))
    assert json.loads(kept.read_text())["Layers"][0]["LayerType"] == "gemm"


def test_scales_per_token_are_said_to_cost_float32_tensors(release, source, tmp_path, capsys):
    dynamic = tmp_path / "dynamic.onnx"
    write(dynamic, *support.exported(ExportConfig(), table=make_table(support.tiny_model(), Kind(dynamic=True))))
    for file, said in ((source, False), (dynamic, True)):
        arguments = [str(file), "--backend", "tensorrt", "--float-type", "fp32", "-o", str(tmp_path / "a.engine")]
        assert cli.run("build", arguments) == 0
        assert ("tqdit-calibrate --backend tensorrt finds static scales" in "".join(capsys.readouterr())) is said


def test_the_report_of_a_proof_has_what_the_inspector_said(release, source, monkeypatch):
    """Whether the audit accepts it or not: without it nobody could tell why a GPU's engine was refused."""
    found = next(proof.prove_engine(source, "tensorrt"))
    assert found.outcome == "ok"
    assert json.loads(found.layers)["Layers"][0]["LayerType"] == "gemm"
    monkeypatch.setenv("TQDIT_TEST_FALLBACK", "1")
    (refused,) = proof.prove_engine(source, "tensorrt")
    assert refused.outcome == "failed"
    assert "14 quantized product(s) would run in float" in refused.detail
    assert refused.detail.endswith("The compiler's own list of layers is in the report.")
    assert json.loads(refused.layers)["Layers"]


def test_a_lean_runtime_alone_has_no_meaning(release, source, tmp_path):
    with pytest.raises(UsageError, match="--exclude-lean-runtime goes with --version-compatible"):
        build_engine(source, tmp_path / "a.engine", "tensorrt", BuildConfig(lean_runtime="exclude", **FAST))


def test_the_gpu_of_an_index_is_the_compiler_s_too(release, source, tmp_path, monkeypatch):
    asked, jobs = [], []

    def stop():
        raise BackendError("made current")

    monkeypatch.setattr(
        cuda, "find_device", lambda *index: asked.append(index) or cuda.Device(None, "8.9", "L4", 58, 3)
    )
    monkeypatch.setattr(builder, "run_worker", lambda job, _: jobs.append(job) or stop())
    with pytest.raises(BackendError, match="made current"):
        build_engine(source, tmp_path / "a.engine", "tensorrt", BuildConfig(device=3, plugins=False, **FAST))
    assert asked == [(3,)]
    assert jobs[0].device == 3
    here = SimpleNamespace(handle=SimpleNamespace(set_current=stop))
    monkeypatch.setattr(cuda, "find_device", lambda index: asked.append(index) or here)
    with pytest.raises(BackendError, match="made current"):  # before TensorRT sees a GPU
        worker.compile_job(jobs[0], lambda _: None)
    assert asked[-1] == 3


def test_without_a_gpu_it_does_not_start(release, source, tmp_path, monkeypatch):
    def no_gpu(*_):
        raise BackendError("no usable NVIDIA GPU here (no GPU).")

    monkeypatch.setattr(cuda, "find_device", no_gpu)
    with pytest.raises(BackendError, match="no usable NVIDIA GPU here"):
        build_engine(source, tmp_path / "a.engine", "tensorrt", BuildConfig(**FAST))


def test_the_runtime_uses_nothing_that_a_release_lacks():
    """Attributes that run.py touches, on both releases."""
    used = {
        "ICudaEngine": {
            "create_execution_context", "device_memory_size_v2", "get_tensor_name", "get_tensor_dtype",
            "get_tensor_shape", "get_tensor_mode", "num_io_tensors",
        },
        "IExecutionContext": {"set_device_memory", "set_input_shape", "set_tensor_address", "execute_async_v3"},
        "Runtime": {"deserialize_cuda_engine", "engine_host_code_allowed", "load_runtime"},
        "ExecutionContextAllocationStrategy": {"USER_MANAGED"},
        "TensorIOMode": {"INPUT", "OUTPUT"},
        "Logger": {"ERROR", "INTERNAL_ERROR"},
    }  # fmt: skip
    for name in RELEASES:
        surface = json.loads((TESTS / "data" / "tensorrt_surfaces" / f"{name}.json").read_text())["classes"]
        assert {
            kind: sorted(names - set(surface[kind])) for kind, names in used.items() if names - set(surface[kind])
        } == {}
