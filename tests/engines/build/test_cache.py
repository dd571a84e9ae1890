"""Engines that were built before with the same of everything."""

import types
from dataclasses import replace

import pytest

import support
import tqdit
from tables import Kind, make_table
from tqdit.cli import main as cli
from tqdit.engines import cuda
from tqdit.engines.backends.tensorrt import builder as tensorrt
from tqdit.engines.backends.tensorrt.library import TENSORRT, TENSORRT_RTX
from tqdit.engines.build import cache
from tqdit.engines.build.backend import builder
from tqdit.engines.build.cache import build_cached, key_of
from tqdit.engines.bundle import check_parts, read_manifest
from tqdit.engines.config import BuildConfig
from tqdit.errors import OutputError, TqditWarning, UsageError
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write


def exported(folder, seed=0):
    table = make_table(support.tiny_model(seed=seed), Kind())
    write(folder / "model.onnx", *support.exported(ExportConfig(), seed=seed, table=table))
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("model"))


@pytest.fixture
def builds(monkeypatch):
    """Where each engine was built, in order."""
    real, places = cache.build_fastest, []

    def build(files, output, *rest):
        places.append(output.name)
        return real(files, output, *rest)

    monkeypatch.setattr(cache, "build_fastest", build)
    return places


@pytest.mark.slow
def test_the_second_build_takes_it(source, builds, tmp_path):
    first, found = build_cached([source], tmp_path / "a.engine", tmp_path / "kept")
    assert found is None
    second, found = build_cached([source], tmp_path / "b.engine", tmp_path / "kept")
    assert found.parent == tmp_path / "kept"
    manifest = tqdit.build(source, tmp_path / "c.engine", backend="onnxruntime", cache=tmp_path / "kept")
    assert manifest == read_manifest(tmp_path / "c.engine")
    assert builds == ["a.engine"]
    assert first == second == read_manifest(tmp_path / "b.engine")
    check_parts(tmp_path / "b.engine", second)
    (tmp_path / "b.engine" / "graph.onnx").unlink()  # an engine that goes leaves the kept one as it is
    check_parts(found, second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.engine", "b.engine", "c.engine", "kept"]


@pytest.mark.slow
def test_anything_else_makes_another_key(source, tmp_path, monkeypatch):
    def key(files=(source,), backend="onnxruntime", **settings):
        return key_of(files, backend, BuildConfig(**settings))

    keys = [key(), key(allow_fallback=True), key(backend="openvino"), key([source, source]),
            key([exported(tmp_path, seed=1)])]  # fmt: skip
    assert key(timing_cache=tmp_path / "timings") == keys[0]  # where timings lie changes no engine
    monkeypatch.setattr(cache, "installed_packages", lambda: {"onnxruntime": "9.9"})
    keys.append(key())
    monkeypatch.setattr(cache, "PACKAGE", tmp_path / "clone")  # of the same version
    (tmp_path / "clone").mkdir()
    for text in ("", "a mend"):
        (tmp_path / "clone" / "cast.py").write_text(text)
        keys.append(key())
    assert len(set(keys)) == len(keys)
    assert all(len(each) == 32 for each in keys)


@pytest.mark.parametrize(
    ("line", "release"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (builder)", "570.86.15"),
        ("something else", ""),
        (None, ""),
    ],
)
def test_drivers_of_one_cuda_release_are_told_apart(line, release, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "KERNEL_MODULE", tmp_path / "version")
    monkeypatch.setattr(cuda, "driver", lambda: types.SimpleNamespace(cuDriverGetVersion=lambda: (0, 12080)))
    if line is not None:
        (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc 12.3.0\n")
    kind = cuda.Device(None, "8.9", "NVIDIA L4", 58).kind
    assert kind == f"NVIDIA L4 8.9, 58 multiprocessors, driver {release} of CUDA 12.8".replace("  ", " ")


def test_a_gpu_and_its_driver_are_in_the_key_of_what_is_compiled_for_it(monkeypatch):
    gpu = cuda.Device(None, "8.9", "NVIDIA L4", 58)
    here = {"gpu": gpu, "driver": 12080}
    driver = types.SimpleNamespace(cuDriverGetVersion=lambda: (0, here["driver"]))
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    monkeypatch.setattr(cuda, "find_device", lambda *_: here["gpu"])
    places = [tensorrt.place(TENSORRT, BuildConfig())]
    for change in (
        {"gpu": replace(gpu, multiprocessors=60)},
        {"gpu": replace(gpu, name="NVIDIA L40")},
        {"driver": 13000},
    ):
        here |= change
        places.append(tensorrt.place(TENSORRT, BuildConfig()))
    assert len(set(places)) == 4
    monkeypatch.setattr(cuda, "find_device", lambda *_: pytest.fail("no GPU is needed"))
    assert "NVIDIA" not in tensorrt.place(TENSORRT_RTX, BuildConfig())


def test_a_provider_for_gpus_has_the_gpu_in_its_key(monkeypatch):
    kinds = ["an L4", "an L40"]
    monkeypatch.setattr(cuda, "kind_of", lambda index: kinds[index])
    for provider in ("cuda", "tensorrt"):
        found = {builder("onnxruntime").place(BuildConfig(provider=provider, device=index)) for index in (0, 1)}
        assert found == set(kinds)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_another_kind_of_processor_has_engines_of_its_own(backend, monkeypatch):
    found = set()
    for features in ((), ("avx2",), ("avx2", "avx512_vnni")):
        monkeypatch.setattr("tqdit.engines.cpu.features", lambda features=features: features)
        found.add(builder(backend).place(BuildConfig()))
    assert len(found) == 3


def test_of_several_files_the_machine_that_measures_counts(source, monkeypatch):
    keys = []
    for gpus in ((), ("an L4",)):
        monkeypatch.setattr(cache, "find_gpus", lambda gpus=gpus: ("driver", gpus))
        keys += [key_of(files, "openvino", BuildConfig()) for files in ([source], [source, source])]
    assert keys[0] == keys[2]
    assert keys[1] != keys[3]


def test_an_engine_that_was_not_measured_against_the_others_is_not_kept(source, tmp_path, monkeypatch):
    real = cache.build_fastest
    monkeypatch.setattr(cache, "build_fastest", lambda files, *rest: real(files[:1], *rest))
    for name in ("a.engine", "b.engine"):
        _, found = build_cached([source, source], tmp_path / name, tmp_path / "kept")
        assert found is None
        assert read_manifest(tmp_path / name).measured == ()
    assert not [*(tmp_path / "kept").iterdir()]


@pytest.mark.parametrize(
    ("name", "message"),
    [("graph.onnx", "truncated or altered"), ("manifest.json", "damaged"), ("manifest.json missing", "not an engine")],
)
def test_a_kept_engine_that_is_damaged_is_built_again(source, builds, tmp_path, name, message):
    _, _ = build_cached([source], tmp_path / "a.engine", tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    part = kept / name.split()[0]
    if name == part.name:
        part.write_bytes(part.read_bytes()[:-3])
    else:
        part.unlink()
    with pytest.warns(TqditWarning, match=rf"{message}.*Building it"):
        manifest, found = build_cached([source], tmp_path / "b.engine", tmp_path / "kept")
    assert found is None
    assert builds == ["a.engine", "b.engine"]
    check_parts(kept, manifest)
    check_parts(tmp_path / "b.engine", manifest)


def test_a_cache_that_is_read_only_gives_what_it_has(source, builds, tmp_path, monkeypatch):
    build_cached([source], tmp_path / "a.engine", tmp_path / "kept")
    monkeypatch.setattr(cache, "check_writable", lambda place: pytest.fail(f"{place} need not be written"))
    manifest, found = build_cached([source], tmp_path / "b.engine", tmp_path / "kept")
    assert found is not None
    check_parts(tmp_path / "b.engine", manifest)
    assert builds == ["a.engine"]


def test_of_two_builds_at_once_the_first_engine_stays_in_the_cache(source, tmp_path, monkeypatch):
    real = cache.build_fastest

    def build(files, output, *rest):
        if output.name == "b.engine":  # another one ends before this one
            build_cached([source], tmp_path / "a.engine", tmp_path / "kept")
        return real(files, output, *rest)

    monkeypatch.setattr(cache, "build_fastest", build)
    manifest, _ = build_cached([source], tmp_path / "b.engine", tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    assert (kept / "graph.onnx").samefile(tmp_path / "a.engine" / "graph.onnx")
    check_parts(tmp_path / "b.engine", manifest)


def test_an_engine_that_cannot_be_kept_is_there_all_the_same(source, tmp_path, monkeypatch):
    def full(*_):
        raise OutputError("kept: cannot be written (No space left on device).")

    monkeypatch.setattr(cache, "_keep", full)
    with pytest.warns(TqditWarning, match="No space left.*built and not kept"):
        manifest, found = build_cached([source], tmp_path / "a.engine", tmp_path / "kept")
    assert found is None
    check_parts(tmp_path / "a.engine", manifest)


def test_what_cannot_be_kept_is_refused_before_the_build(source, builds, tmp_path):
    (tmp_path / "kept").write_text("a file of somebody")
    with pytest.raises(OutputError, match="kept"):
        build_cached([source], tmp_path / "a.engine", tmp_path / "kept")
    with pytest.raises(UsageError, match="--refit"):
        build_cached([source], tmp_path / "a.engine", tmp_path / "other", config=BuildConfig(refit=True))
    for place in (tmp_path / "a.engine", tmp_path / "a.engine" / "kept"):
        with pytest.raises(UsageError, match="lies in the engine"):
            build_cached([source], tmp_path / "a.engine", place)
    assert builds == []


def test_the_command_says_that_nothing_was_compiled(source, tmp_path, capsys):
    command = [str(source), "--backend", "onnxruntime", "--cache", str(tmp_path / "kept")]
    for name, said in (("a.engine", False), ("b.engine", True)):
        assert cli.run("build", [*command, "-o", str(tmp_path / name)]) == 0
        found = capsys.readouterr()
        assert found.out.strip() == str(tmp_path / name)
        assert ("nothing compiled" in found.err) == said
