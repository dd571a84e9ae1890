"""`tqdit-inspect`: what it says about each kind of file, and about files that are damaged or unknown."""

import argparse
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file

import support
from tqdit.card import Latents
from tqdit.cli import main as cli
from tqdit.cli.inspect import _card, inspect, run
from tqdit.console import Console
from tqdit.engines.run.shards import SamplingJob, ShardFolder
from tqdit.errors import CheckpointError, FileFormatError, UsageError
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write
from tqdit.models import families


def facts(file, heads=None):
    return {name: str(value) for name, value in inspect(str(file), heads)}


def refusal(file, error, heads=None):
    with pytest.raises(error) as refused:
        inspect(str(file), heads)
    assert "\n" not in str(refused.value)
    return str(refused.value).removeprefix(f"{file}: ")


@pytest.mark.slow
def test_the_demo_model_is_described():
    said = facts("demo")
    assert said["kind"] == "diffusion transformer, origin 'demo'"
    assert said["port x"] == "state, float32 rows x 3 x 16 x 16"
    assert said["port timestep"] == "time, int64 rows"
    assert said["port class_labels"] == "request, int64 rows, 0..16, 16 in an unconditional row"
    assert said["prediction"].startswith("rows x ")
    assert said["state"] == "pixels"
    assert said["sampled with"].startswith("8 placed steps of dpm++2m-sde; any of ")
    assert "ddim" in said["sampled with"]
    assert said["as published"] == "250 steps of ddpm"
    assert said["guidance"] == "classifier-free, scale 1.5 unless chosen"
    assert said["parameters"].endswith(" million")
    assert len(said["fingerprint"]) == 64


def test_a_checkpoint_is_described(checkpoint):
    said = facts(checkpoint, heads=2)
    assert said["kind"] == "diffusion transformer, origin 'published'"
    assert "hidden_size=16, depth=2" in said["configuration"]
    assert said["port x"] == "state, float32 rows x 4 x 8 x 8"
    assert said["prediction"] == "rows x 8 x 8 x 8"
    assert said["state"] == "latents of scale 0.18215"
    assert said["guidance"] == "classifier-free of the first 3 channels, scale 1.5 unless chosen"
    assert said["classes"] == "5"


def test_a_checkpoint_of_unusual_width_asks_for_heads(checkpoint):
    assert "Pass --heads, or tell" in refusal(checkpoint, CheckpointError)


@pytest.mark.slow
def test_a_sharded_checkpoint_is_described_by_its_index(own_file):
    index = own_file.with_name("own.safetensors.index.json")
    names = load_file(own_file)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, own_file.name)}))
    assert facts(index)["fingerprint"] == facts(own_file)["fingerprint"]


def test_a_file_of_ours_needs_no_heads(own_file):
    assert "num_heads=2" in facts(own_file)["configuration"]


@pytest.mark.slow
def test_a_diffusers_directory_is_described(diffusers_folder):
    said = facts(diffusers_folder)
    assert said["kind"] == "diffusion transformer, origin 'diffusers'"
    assert "num_layers=2, " in said["configuration"]
    assert said["sampled with"].startswith("50 steps of ddim; ")
    assert said["guidance"].endswith("scale 4 unless chosen")


def test_a_network_that_is_no_dit_is_described_by_its_ports(monkeypatch):
    toys = Path(__file__).parents[1] / "toys" / "families"
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(toys)])
    monkeypatch.setattr("tqdit.cli.inspect.Path.exists", lambda _: True)
    said = facts("two-streams")
    assert said["port latents"] == "state, float32 rows x 5 x 12"
    assert said["port words"] == "request, int64 rows x 4, 0..6"
    assert said["port sigma"] == "time, float32 rows"
    assert said["state"] == "values as they are"
    assert "euler" in said["sampled with"]
    assert said["guidance"] == "none"
    assert "classes" not in said


def test_a_shift_of_latents_is_shown():
    model = support.tiny_model()
    card = replace(model, latents=Latents(0.5, 0.125)).card()
    assert dict(_card(card))["state"] == "latents of scale 0.5, shift 0.125"


def test_a_null_class_is_a_whole_number_in_a_file_too():
    """Which gives every null value as a float."""
    card = support.tiny_model().card()
    ports = [port if port.null is None else replace(port, null=float(port.null)) for port in card.signature.ports]
    said = dict(_card(replace(card, signature=replace(card.signature, ports=tuple(ports)))))
    assert said == dict(_card(card))


@pytest.fixture
def samples(tmp_path):
    path = tmp_path / "samples.npz"
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(path, arr_0=images, labels=np.arange(4))
    return path


def test_samples_are_described_by_their_arrays(samples):
    assert facts(samples) == {"kind": "samples", "arr_0": "uint8 (4, 8, 8, 3)", "labels": "int64 (4,)"}


def test_compressed_samples_are_described_as_well(tmp_path):
    np.savez_compressed(tmp_path / "s.npz", arr_0=np.zeros((2, 3), np.float32))
    assert facts(tmp_path / "s.npz")["arr_0"] == "float32 (2, 3)"


def test_samples_larger_than_the_memory_are_described_from_their_headers(samples, monkeypatch):
    monkeypatch.setattr(np, "load", None)
    assert facts(samples)["arr_0"] == "uint8 (4, 8, 8, 3)"


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_samples_are_refused(samples, part):
    whole = samples.read_bytes()
    samples.write_bytes(whole[: int(part * len(whole))])
    assert "or truncated" in refusal(samples, FileFormatError)


def test_a_zip_file_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("readme.txt", "not an array, but long enough to be one" * 10)
    assert refusal(tmp_path / "s.npz", FileFormatError).startswith("damaged or truncated (the magic string is not")


def test_a_picture_with_the_name_of_samples_is_not_called_damaged(tmp_path):
    (tmp_path / "s.npz").write_bytes(b"\x89PNG\r\n\x1a\n and more")
    assert refusal(tmp_path / "s.npz", FileFormatError) == "not an .npz of arrays. Sample again."


def test_samples_that_claim_more_than_the_file_holds_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("arr_0.npy", (tmp_path / "a.npy").read_bytes().replace(b"(4, 3), }", b"(4, 9), }"))
    assert "'arr_0', uint8 (4, 9), claims 36 bytes, the file holds 12" in refusal(tmp_path / "s.npz", FileFormatError)


def test_pickled_code_in_samples_does_not_run(tmp_path):
    victim = tmp_path / "victim"

    class Hostile:
        def __reduce__(self):
            import os

            return os.mkdir, (str(victim),)

    np.savez(tmp_path / "s.npz", arr_0=np.array([Hostile()], dtype=object))
    assert facts(tmp_path / "s.npz")["arr_0"] == "object (1,)"
    assert not victim.exists()


@pytest.mark.parametrize("name", ["model.onnx", "empty.onnx"])
def test_a_damaged_onnx_file_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"" if name.startswith("empty") else b"\xff" * 100)
    known = "empty or truncated: 0 bytes, expected" if name.startswith("empty") else "not"
    assert refusal(path, FileFormatError) == f"{known} an ONNX file. Export it again."


BARE = """
import sys
for name in {libraries}:
    sys.modules[name] = None
from tqdit.cli.main import run
sys.exit(run("inspect", sys.argv[1:]))
"""


def inspected_without(libraries, *arguments):
    """What a machine without these libraries prints: exit code, stdout, stderr."""
    code = BARE.format(libraries=list(libraries))
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


RUNTIME = ("onnx", "onnx_ir", "safetensors", "torch", "diffusers")


@pytest.fixture
def exported(tmp_path):
    path = tmp_path / "model.onnx"
    write(path, *support.exported())
    return path


@pytest.mark.slow
def test_an_onnx_file_is_described_without_onnx(exported):
    code, said, error = inspected_without(RUNTIME, str(exported))
    assert (code, error) == (0, "")
    lines = dict(line.split("  ", 1) for line in said.splitlines())
    everything = {name: str(value) for name, value in inspect(str(exported))}
    known = {name: value.strip() for name, value in lines.items() if name != "nodes"}
    assert known == {name: everything[name] for name in everything if name not in ONLY_ONNX_KNOWS}
    assert "needs onnx, which is not installed. Run: pip install 'onnx>=" in lines["nodes"]


ONLY_ONNX_KNOWS = ("size", "opsets", "nodes", "inputs", "outputs")


@pytest.mark.slow
def test_a_scale_table_is_described_without_the_libraries_of_calibration(capsys):
    golden = Path(__file__).parents[1] / "data" / "scales.safetensors"
    code, said, error = inspected_without(RUNTIME, str(golden))
    assert (code, error) == (0, "")
    assert cli.run("inspect", [str(golden)]) == 0
    assert said == capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torch", "safetensors"])
def test_a_checkpoint_needs_libraries_and_says_which(own_file, library):
    code, said, error = inspected_without([library], str(own_file))
    assert (code, said) == (1, "")
    assert error.startswith(
        f"tqdit-inspect: inspecting a checkpoint needs {library}, which is not installed. Run: pip "
    )
    assert len(error.splitlines()) == 1


def test_an_onnx_file_without_its_weights_is_refused_by_their_name(tmp_path):
    graph = onnx.parser.parse_graph("g (float[2] x) => (float[2] y) { y = Add(x, w) }")
    graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "w"))
    path = tmp_path / "model.onnx"
    onnx.save(
        onnx.helper.make_model(graph), path, save_as_external_data=True, location="weights.data", size_threshold=0
    )  # fmt: skip
    assert facts(path)["written by"] == "unknown, not by tqdit"
    (tmp_path / "weights.data").unlink()
    with pytest.raises(FileFormatError) as error:
        inspect(str(path))
    assert str(error.value).startswith(f"{tmp_path / 'weights.data'}: missing")
    assert str(path) in str(error.value)


def test_a_damaged_checkpoint_is_refused(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert "damaged or truncated" in refusal(checkpoint, CheckpointError)


def test_a_folder_of_unknown_kind_is_refused(tmp_path):
    said = refusal(tmp_path, UsageError)
    assert all(name in said for name in ("manifest.json", "shards.json", "model_index.json", "config.json"))


def test_a_folder_of_shards_tells_its_job(tmp_path):
    job = SamplingJob("0" * 64, 20, "ddim", (3, 5), 1.5, seed=7, count=300)
    ShardFolder(tmp_path, job, {}).write_index()
    assert facts(tmp_path) == {
        "kind": "samples in shards",
        "shards": "0 of 3 done, of 128 images each",
        "samples": "300 of 2 class(es), seed 7",
        "sampled with": "20 steps of ddim, guidance: scale 1.5",
        "engine": f"manifest {'0' * 64}",
    }
    for chain, said in (
        ({"full_calls": (0, 9, 18, 19)}, "20 steps of ddim, 4 of them with full calls, guidance: scale 1.5"),
        ({"guidance_interval": (100.0, 400.0)}, "20 steps of ddim, guidance: scale 1.5 from timestep 100 to 400"),
    ):
        ShardFolder(tmp_path, replace(job, **chain), {}).write_index()
        assert facts(tmp_path)["sampled with"] == said


@pytest.mark.slow
def test_a_step_graph_names_no_other_sampler(tmp_path):
    write(tmp_path / "step.onnx", *support.exported(ExportConfig("step")))
    assert facts(tmp_path / "step.onnx")["sampled with"] == "20 steps of ddpm"


@pytest.mark.parametrize(
    ("file", "plot", "message"),
    [
        ("demo", "x.png", "demo: is not a scale table."),
        ("{samples}", "x.png", "is not a scale table."),
        ("missing", "x.jpeg", "--plot x.jpeg: unknown kind of picture. Name a file with .png, .svg, .pdf."),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_printed(samples, capsys, file, plot, message):
    assert cli.run("inspect", [file.format(samples=samples), "--plot", plot]) == 2
    out, line = capsys.readouterr()
    assert out == ""
    assert message in line


@pytest.mark.parametrize("name", ["picture.png", "no-suffix"])
def test_a_file_of_unknown_kind_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    said = refusal(tmp_path / name, UsageError)
    assert all(suffix in said for suffix in (".onnx", ".npz", ".safetensors", ".pt", ".pth", ".bin", ".index.json"))


def test_a_missing_file_is_refused(tmp_path):
    said = refusal(tmp_path / "x.onnx", UsageError)
    assert all(fact in said for fact in ("no such file", "'demo'", "'text'"))


def test_the_command_prints_one_fact_a_line_in_two_columns(samples, capsys):
    run(argparse.Namespace(file=str(samples), heads=None, lint=False, verify=False, plot=None), Console())
    assert capsys.readouterr().out == "kind    samples\narr_0   uint8 (4, 8, 8, 3)\nlabels  int64 (4,)\n"


def test_a_name_that_no_file_can_have_is_one_line(capsys):
    assert cli.run("inspect", ["x" * 300]) in (1, 2)
    assert len(capsys.readouterr().err.splitlines()) == 1
