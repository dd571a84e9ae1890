"""Weights that are replaced in an engine that is there: the worker, the record and the bundle are the real ones, the
library is the stand-in of tests/fake_tensorrt with the attributes of each release. Nothing here ran on a GPU.
"""

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import support
from tables import Kind, make_table
from tqdit.cli import main as cli
from tqdit.engines import cuda
from tqdit.engines.backends.tensorrt.library import TENSORRT_RTX
from tqdit.engines.backends.tensorrt.refit import RECORD_FILE, Content
from tqdit.engines.build import engine as build_side
from tqdit.engines.build.engine import build_engine
from tqdit.engines.bundle import check_parts, read_manifest
from tqdit.engines.config import BatchRange, BuildConfig
from tqdit.errors import BackendError, TqditWarning, UsageError
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write
from tqdit.golden import Verdict

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[2]
ORIN = cuda.Device(None, "8.7", "Orin", 16)
REFIT = BuildConfig(refit=True, plugins=False)


@pytest.fixture(params=["11.4"])
def release(request, monkeypatch, tmp_path):
    """One release installed, in this process and in the worker; gives its calls."""
    calls = tmp_path / "calls"
    monkeypatch.setenv("TQDIT_TEST_SURFACE", str(TESTS / "data" / "tensorrt_surfaces" / f"{request.param}.json"))
    monkeypatch.setenv("TQDIT_TEST_CALLS", str(calls))
    monkeypatch.syspath_prepend(TESTS / "fake_tensorrt")
    monkeypatch.setattr(cuda, "find_device", lambda *_: ORIN)
    yield lambda: [json.loads(line) for line in calls.read_text().splitlines()]
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, source):
    """The same network with the weights of another seed, as a fused LoRA would leave it."""
    return exported(tmp_path_factory.mktemp("tuned"), seed=1)


def exported(folder, seed):
    table = make_table(support.tiny_model(seed=seed), Kind(groups=10))
    write(folder / "model.onnx", *support.exported(ExportConfig(), seed=seed, table=table))
    return folder / "model.onnx"


def weights_in(bundle):
    """Digests of the weights that the stand-in's plan holds."""
    return json.loads((bundle / "engine.plan").read_text())["weights"]


def ended(release):
    """How each build ended, in order: compiled, or refitted."""
    return [
        "refitted" if "refitted" in call else "compiled"
        for call in release()
        if call.keys() & {"refitted", "functions"}
    ]


@pytest.mark.parametrize("release", ["10.16", "11.4"], indirect=True)
def test_a_second_build_of_the_same_graph_replaces_the_weights(release, source, tuned, tmp_path):
    bundle = tmp_path / "a.engine"
    first = build_engine(source, bundle, "tensorrt", REFIT)
    assert (first.weights, ended(release)) == ("refittable", ["compiled"])
    assert "REFIT" in {call.get("flag") for call in release()}
    before = weights_in(bundle)
    second = build_engine(tuned, bundle, "tensorrt", REFIT)
    assert (second.weights, ended(release)) == ("refitted", ["compiled", "refitted"])
    elsewhere = build_engine(tuned, tmp_path / "b.engine", "tensorrt", REFIT)  # compiled from nothing
    assert weights_in(bundle) == weights_in(tmp_path / "b.engine") != before
    assert json.loads((bundle / "engine.plan").read_text())["refit"]
    record, compiled = ((folder / RECORD_FILE).read_bytes() for folder in (bundle, tmp_path / "b.engine"))
    assert record == compiled
    assert second == read_manifest(bundle)
    check_parts(bundle, second)
    assert second.card == elsewhere.card != first.card
    assert replace(second, weights="refittable", files={}) == replace(elsewhere, files={})  # the audit among others
    third = build_engine(source, bundle, "tensorrt", REFIT)  # and back again
    assert (third.weights, weights_in(bundle)) == ("refitted", before)


def test_without_refit_nothing_is_kept_for_it(release, source, tuned, tmp_path):
    bundle = tmp_path / "a.engine"
    assert build_engine(source, bundle, "tensorrt", replace(REFIT, refit=False)).weights == "fixed"
    assert not (bundle / RECORD_FILE).exists()
    with pytest.warns(TqditWarning, match=r"not replaced, since it was built without --refit\. Compiling it"):
        assert build_engine(tuned, bundle, "tensorrt", REFIT).weights == "refittable"
    assert ended(release) == ["compiled", "compiled"]


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({}, {"TQDIT_TEST_FOLDED": "blocks.0.mlp.fc1"},
         r"value\(s\) that differ are part of its compiled code \(blocks\.0\.mlp\.fc1"),
        ({}, {"TQDIT_TEST_REFUSE_WEIGHTS": "wrong count\nof fc1"}, r"refused the weights \(wrong count of fc1\)"),
        ({"batch": BatchRange(1, 4, 4)}, {}, r"it was built with batch of 2, 32, 32 rows, now it is of 2, 8, 8 rows"),
        ({"optimization_level": 5}, {}, r"it was built with optimization_level None, now it is 5"),
    ],
)  # fmt: skip
def test_what_cannot_be_replaced_is_said_and_compiled(
    release, source, tuned, tmp_path, monkeypatch, changes, environment, message
):
    bundle = tmp_path / "a.engine"
    build_engine(source, bundle, "tensorrt", REFIT)
    config, before = replace(REFIT, **changes), weights_in(bundle)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(TqditWarning, match=rf"a\.engine: its weights are not replaced, since .*{message}.*Compiling it"):
        manifest = build_engine(tuned, bundle, "tensorrt", config)
    assert manifest.weights == "refittable"
    assert ended(release) == ["compiled", "compiled"]
    assert weights_in(bundle) != before


def test_a_damaged_engine_is_compiled(release, source, tuned, tmp_path):
    build_engine(source, tmp_path / "a.engine", "tensorrt", REFIT)
    (tmp_path / "a.engine" / "engine.plan").write_text("x")
    with pytest.warns(TqditWarning, match="truncated or altered"):
        manifest = build_engine(tuned, tmp_path / "a.engine", "tensorrt", REFIT)
    assert manifest.weights == "refittable"
    assert ended(release) == ["compiled", "compiled"]


def test_another_graph_is_compiled(release, source, tmp_path):
    bundle, other = tmp_path / "a.engine", tmp_path / "other.onnx"
    build_engine(source, bundle, "tensorrt", REFIT)
    write(other, *support.exported(ExportConfig(attention="float"), table=make_table(support.tiny_model(), Kind())))
    with pytest.warns(TqditWarning, match="since (other products are quantized|the file holds another graph)"):
        manifest = build_engine(other, bundle, "tensorrt", REFIT)
    assert manifest.weights == "refittable"
    assert ended(release) == ["compiled", "compiled"]


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        (replace(ORIN, capability="8.9"), "built for compute_capabilities 8.7, this GPU has 8.9"),
        (replace(ORIN, multiprocessors=8), "built for multiprocessors 16, this GPU has 8"),
    ],
)
def test_an_engine_of_another_gpu_is_compiled(release, source, tuned, tmp_path, monkeypatch, gpu, message):
    build_engine(source, tmp_path / "a.engine", "tensorrt", REFIT)
    monkeypatch.setattr(cuda, "find_device", lambda *_: gpu)
    with pytest.warns(TqditWarning, match=message):
        manifest = build_engine(tuned, tmp_path / "a.engine", "tensorrt", REFIT)
    assert manifest.weights == "refittable"
    assert ended(release) == ["compiled", "compiled"]


def test_a_refitted_engine_that_is_wrong_is_compiled(release, source, tuned, tmp_path, monkeypatch):
    """By its golden calls, which cannot run here: the verdicts are given."""
    bundle = tmp_path / "a.engine"
    build_engine(source, bundle, "tensorrt", REFIT)
    verdicts = [Verdict(np.array([0.5]), np.array([0.01]), 0.0), Verdict(np.array([0.01]), np.array([0.01]), 0.0)]
    monkeypatch.setattr(build_side, "CALLS_FILE", "engine.plan")
    monkeypatch.setattr(build_side, "verify_bundle", lambda *_: verdicts.pop(0))
    with pytest.warns(TqditWarning, match=r"golden calls is 5\.0e-01.*Compiling it"):
        manifest = build_engine(tuned, bundle, "tensorrt", REFIT)
    assert (manifest.weights, manifest.verified.error) == ("refittable", 0.01)


def test_a_build_that_fails_leaves_the_engine_as_it_was(release, source, tuned, tmp_path, monkeypatch):
    bundle = tmp_path / "a.engine"
    build_engine(source, bundle, "tensorrt", REFIT)
    before = {file.name: file.read_bytes() for file in bundle.iterdir()}
    monkeypatch.setenv("TQDIT_TEST_REFUSE_WEIGHTS", "wrong count")
    monkeypatch.setenv("TQDIT_TEST_FAIL", "Error Code 10: no implementation")
    with pytest.warns(TqditWarning), pytest.raises(BackendError, match="Error Code 10"):
        build_engine(tuned, bundle, "tensorrt", REFIT)
    assert {file.name: file.read_bytes() for file in bundle.iterdir()} == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.engine", "calls"]


def test_the_command_says_what_it_did(release, source, tuned, tmp_path, capsys):
    bundle = tmp_path / "a.engine"
    for file in (source, tuned):
        assert cli.run("build", [str(file), "--backend", "tensorrt", "--refit", "-o", str(bundle)]) == 0
    told = capsys.readouterr()
    assert (told.out + told.err).count("replaced the weights of the engine that was there") == 1
    assert cli.main(["inspect", str(bundle)]) == 0
    assert "refitted" in capsys.readouterr().out


def test_refit_and_a_version_compatible_plan_are_refused(release, source, tmp_path):
    with pytest.raises(UsageError, match="--refit does not go with --version-compatible"):
        build_engine(source, tmp_path / "a.engine", "tensorrt", replace(REFIT, version_compatible=True))


def test_weights_are_streamed_by_a_flag(release, source, tmp_path):
    config = BuildConfig(weight_streaming=True, plugins=False)
    assert build_engine(source, tmp_path / "a.engine", "tensorrt", config).streams_weights
    assert "WEIGHT_STREAMING" in {call.get("flag") for call in release()}


@pytest.mark.parametrize(("field", "missing"), [("refit", "REFIT"), ("weight_streaming", "WEIGHT_STREAMING")])
def test_a_release_without_the_setting_is_named(release, source, tmp_path, monkeypatch, field, missing):
    surface = json.loads(Path(TESTS / "data" / "tensorrt_surfaces" / "11.4.json").read_text())
    surface["classes"]["BuilderFlag"].remove(missing)
    (tmp_path / "less.json").write_text(json.dumps(surface))
    monkeypatch.setenv("TQDIT_TEST_SURFACE", str(tmp_path / "less.json"))
    flag = field.replace("_", "-")
    with pytest.raises(UsageError, match=rf"--{flag}: TensorRT 11\.4\S* has no BuilderFlag\.{missing}"):
        build_engine(source, tmp_path / "a.engine", "tensorrt", BuildConfig(plugins=False, **{field: True}))


@pytest.mark.parametrize("field", ["refit", "weight_streaming"])
def test_other_backends_refuse_both(source, tmp_path, field):
    with pytest.raises(UsageError, match=f"--{field.replace('_', '-')} has no meaning for onnxruntime"):
        build_engine(source, tmp_path / "a.engine", "onnxruntime", BuildConfig(**{field: True}))


def test_a_digest_of_the_graph_knows_everything_but_the_weights(tmp_path):
    def content(weight=1.0, shape=(2, 2), attribute=1, text=""):
        node = helper.make_node("Softmax", ["x"], ["y"], "a", axis=attribute)
        model = helper.make_model(helper.make_graph([node], "g", [], [], [
            numpy_helper.from_array(np.full((3,), weight, np.float16), "w"),
            numpy_helper.from_array(np.array(shape, np.int64), "shape"),
        ]))  # fmt: skip
        model.doc_string = text
        return Content.of(model, tmp_path)

    same = content()
    assert content(text="another day") == same
    assert content(weight=2.0).graph == same.graph
    assert content(weight=2.0).weights != same.weights
    assert content(shape=(4, 1)).graph != same.graph
    assert content(attribute=0).graph != same.graph
    assert same.weights == {"w": hashlib.sha256(np.full((3,), 1, np.float16).tobytes()).hexdigest()}


def test_weights_beside_a_file_have_the_same_digests(source, tmp_path):
    shutil.copy(source, tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    inline = Content.of(model, tmp_path)
    onnx.save(model, tmp_path / "b.onnx", save_as_external_data=True, location="b.data", size_threshold=0)
    assert Content.of(onnx.load(tmp_path / "b.onnx", load_external_data=False), tmp_path) == inline


def test_the_real_tensorrt_rtx_has_both_and_refits_only_where_a_driver_is(source, tmp_path):
    """Without a driver release 1.7.1 refuses to compile such an engine, whatever it is made of."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for x86-64 only")
    TENSORRT_RTX.check_offers(trt, BuildConfig(refit=True, weight_streaming=True))
    assert {"serialize_with_config", "weight_streaming_budget_v2", "streamable_weights_size"} <= set(
        dir(trt.ICudaEngine)
    )
    assert {"get_all_weights", "get_missing_weights", "refit_cuda_engine"} <= set(dir(trt.Refitter))
    assert "refit_from_file" in dir(trt.OnnxParserRefitter)
    manifest = build_engine(
        source, tmp_path / "a.engine", "tensorrt-rtx", BuildConfig(targets=("8.9",), weight_streaming=True)
    )
    assert manifest.audit.fallen_back == ()
    if _has_gpu():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match="With --refit it needs a GPU and NVIDIA's driver to compile, too"):
        build_engine(source, tmp_path / "b.engine", "tensorrt-rtx", BuildConfig(targets=("8.9",), refit=True))


def _has_gpu():
    try:
        cuda.find_device()
    except BackendError:
        return False
    return True
