"""Forms of one network, of which the fastest is kept."""

import time

import pytest

import support
from tables import Kind, make_table
from tqdit.cli import main as cli
from tqdit.engines.build import fastest
from tqdit.engines.build.backend import Fitness, builder
from tqdit.engines.build.fastest import build_fastest
from tqdit.engines.bundle import check_parts, read_manifest
from tqdit.engines.config import BuildConfig
from tqdit.errors import BackendError, TqditWarning, UsageError
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """One table in two forms of attention."""
    folder, table = tmp_path_factory.mktemp("forms"), make_table(support.tiny_model(), Kind())
    for form in ("float", "integer"):
        write(folder / f"{form}.onnx", *support.exported(ExportConfig(attention=form), table=table))
    return [folder / "float.onnx", folder / "integer.onnx"]


class Slow:
    """An engine that waits before each call."""

    def __init__(self, engine, seconds):
        self._engine, self._seconds, self.calls = engine, seconds, 0

    def __call__(self, inputs):
        self.calls += 1
        time.sleep(self._seconds)
        return self._engine(inputs)

    def close(self):
        self._engine.close()


@pytest.mark.slow
def test_step_graphs_are_measured_too(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        write(tmp_path / name, *support.exported(ExportConfig(graph="step")))
    manifest = build_fastest([tmp_path / "a.onnx", tmp_path / "b.onnx"], tmp_path / "a.engine")
    assert [(timing.file, timing.rows) for timing in manifest.measured] == [("a.onnx", 1), ("b.onnx", 1)]


@pytest.mark.parametrize("slow", ["float", "integer"])
def test_the_faster_one_is_kept_and_both_times_are_recorded(forms, tmp_path, monkeypatch, slow):
    real, opened = fastest.open_engine, []

    def opening(folder, manifest, *arguments, **keywords):
        wait = 0.05 if manifest.card.quantization.attention == slow else 0
        opened.append(Slow(real(folder, manifest, *arguments, **keywords), wait))
        return opened[-1]

    monkeypatch.setattr(fastest, "open_engine", opening)
    bundle = tmp_path / "a.engine"
    manifest = build_fastest(forms, bundle)
    assert manifest == read_manifest(bundle)
    check_parts(bundle, manifest)
    assert manifest.card.quantization.attention != slow
    assert [(timing.file, timing.attention, timing.rows) for timing in manifest.measured] == [
        ("float.onnx", "float", 2), ("integer.onnx", "integer", 2)
    ]  # fmt: skip
    times = {timing.attention: timing.median_ms for timing in manifest.measured}
    assert times.pop(slow) > 50 > min(times.values())
    assert [engine.calls for engine in opened] == [14, 14]
    assert [each.name for each in tmp_path.iterdir()] == ["a.engine"]


def test_where_it_cannot_run_the_first_is_kept_and_said_to_be_unmeasured(forms, tmp_path, monkeypatch):
    monkeypatch.setattr(builder("onnxruntime"), "fitness", lambda: Fitness(0, "no GPU. Install one."))
    with pytest.warns(
        TqditWarning, match=r"not measured \(no GPU\. Install one\): keeping .*integer\.onnx, the first of 2"
    ):
        manifest = build_fastest(forms[::-1], tmp_path / "a.engine")
    assert (manifest.measured, manifest.card.quantization.attention) == ((), "integer")


def test_an_engine_for_another_gpu_is_not_measured(forms, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise BackendError("built for compute capability 8.9, this GPU has 9.0.")

    monkeypatch.setattr(fastest, "open_engine", refuse)
    with pytest.warns(TqditWarning, match=r"not measured \(built for compute capability 8\.9"):
        manifest = build_fastest(forms, tmp_path / "a.engine")
    assert (manifest.measured, manifest.card.quantization.attention) == ((), "float")


def test_what_the_compiler_said_of_a_refused_one_is_kept(forms, tmp_path, monkeypatch):
    def refuse(source, output, *_):
        kept = output.with_name(f"{output.name}.layers.txt")
        kept.write_text("layers")
        raise BackendError(f"2 products would run in float. The compiler's own list of layers: {kept}")

    monkeypatch.setattr(fastest, "build_engine", refuse)
    with pytest.raises(BackendError, match=rf"list of layers: {tmp_path}/a\.engine\.layers\.txt$"):
        build_fastest(forms, tmp_path / "a.engine")
    assert [each.name for each in tmp_path.iterdir()] == ["a.engine.layers.txt"]


def test_files_of_different_networks_are_refused(forms, tmp_path):
    write(tmp_path / "other.onnx", *support.exported(ExportConfig(), pixels=True))
    with pytest.raises(UsageError, match=r"other\.onnx: of another network than .*float\.onnx"):
        build_fastest([forms[0], tmp_path / "other.onnx"], tmp_path / "a.engine")
    with pytest.raises(UsageError, match="--refit takes one file; 2 are given"):
        build_fastest(forms, tmp_path / "a.engine", config=BuildConfig(refit=True))


def test_the_command_takes_several_files(forms, tmp_path, capsys):
    bundle = tmp_path / "a.engine"
    assert cli.run("build", [*map(str, forms), "--backend", "onnxruntime", "-o", str(bundle)]) == 0
    told = "".join(capsys.readouterr())
    for timing in read_manifest(bundle).measured:
        assert f"{timing.file} (attention {timing.attention}): {timing.median_ms:.2f} ms for 2 rows" in told
