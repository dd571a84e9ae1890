"""`tqdit-export` as a user meets it."""

import signal
from dataclasses import replace

import pytest
from safetensors.torch import save_file

import support
from tables import Kind, make_table
from tqdit.card import Latents
from tqdit.cli.main import run
from tqdit.engines.bundle import read_manifest
from tqdit.errors import FileFormatError, TqditWarning
from tqdit.exporter.graph import ExportConfig, export_graph
from tqdit.exporter.onnx_writer import write
from tqdit.models.load import load_model
from tqdit.onnx_file import read_card
from tqdit.quantization.table import write_scale_table
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.process import Diffusion


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "dit.safetensors"
    save_file(dict(support.tiny_model().network.state_dict()), path)
    path.with_suffix(".json").write_text('{"num_classes": 5}')
    return path


def export(*arguments):
    return run("export", ["-q", *map(str, arguments)])


@pytest.mark.slow
def test_a_published_checkpoint_exports_as_its_origin_samples(checkpoint, tmp_path, capsys):
    output = tmp_path / "model.onnx"
    assert export(output, "--model", checkpoint, "--heads", "2") == 0
    assert capsys.readouterr().out == f"{output}\n"
    card = read_card(output)
    assert card.graph == "denoiser"
    assert (card.sampling.steps, card.sampling.sampler) == (250, "ddpm")
    assert (card.origin, card.latents, card.guidance) == ("published", Latents(0.18215), Guidance(1.5, channels=3))


@pytest.mark.slow
def test_steps_and_sampler_are_what_the_file_proposes_and_unguided_files_have_no_guidance(checkpoint, tmp_path):
    output = tmp_path / "model.onnx"
    wanted = ["--steps", "20", "--sampler", "ddim", "--unguided"]
    assert export(output, "--model", checkpoint, "--heads", "2", *wanted) == 0
    card = read_card(output)
    assert (card.sampling.steps, card.sampling.sampler, card.guidance) == (20, "ddim", None)


@pytest.mark.slow
def test_a_chain_other_than_that_of_the_scales_is_said(checkpoint, tmp_path, capsys):
    """The file proposes the chain that the scales were found for, unless the command says otherwise."""
    table = make_table(load_model(str(checkpoint), heads=2), Kind())
    scales, output = tmp_path / "scales.safetensors", tmp_path / "model.onnx"
    write_scale_table(scales, replace(table, settings={"steps": 100}))
    arguments = [str(output), "--model", str(checkpoint), "--heads", "2", "--scales", str(scales)]
    assert run("export", arguments) == 0
    assert "100 steps of ddpm; the file" not in capsys.readouterr().err
    assert read_card(output).sampling.steps == 100
    assert run("export", [*arguments, "-q", "--steps", "50", "--sampler", "ddim"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "100 steps of ddpm" in line]
    assert len(said) == 1
    assert "50 steps of ddim" in said[0]
    card = read_card(output)
    assert (card.sampling.steps, card.sampling.sampler) == (50, "ddim")
    found_for = card.quantization.sampling
    assert (found_for.steps, found_for.sampler) == (100, "ddpm")
    assert card.remark(found_for) is None
    for other in ({"full_calls": 50}, {"guidance_interval": (100, 400)}):  # no scales can be found for these
        assert card.remark(found_for.choose(**other)) is None
    assert "100 steps of ddpm; sampling 50 steps of ddim" in card.remark(card.sampling)  # which tqdit-sample says


@pytest.mark.slow
def test_scales_of_another_process_are_said(checkpoint):
    """A model card that was edited after the calibration."""
    model = load_model(str(checkpoint), heads=2)
    process = {"type": "diffusion", "beta_end": 0.012, "learned_variance": True}
    table = replace(make_table(model, Kind()), settings={"process": process})
    with pytest.warns(TqditWarning, match="250 steps of ddpm; sampling 250 steps of ddpm in another process"):
        _, card = export_graph(model, ExportConfig(), table)
    assert card.quantization.sampling.process == Diffusion(beta_end=0.012, learned_variance=True)
    assert card.sampling.process == Diffusion(learned_variance=True)
    with pytest.raises(FileFormatError, match=r"setting 'process' is damaged .*Calibrate again"):
        export_graph(model, ExportConfig(), replace(table, settings={"process": {"type": "diffusion", "beta_end": 2}}))


@pytest.mark.slow
def test_the_demo_model_exports_with_no_arguments():
    card = read_card(support.demo_file())
    assert (card.model, len(card.class_names), card.latents) == ("demo", 16, None)
    assert (str(card.sampling), str(card.as_published)) == ("8 placed steps of dpm++2m-sde", "250 steps of ddpm")
    assert card.remark(card.sampling) is None


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--steps", "0"], 2, " steps is 0; expected a whole number from 1 to 1000"),
        (["--opset", "17"], 2, "opset 17 is not possible: exports use 20 (the first with Gelu) to 23"),
        (["--scales", "absent.safetensors"], 2, "absent.safetensors: no such file. Write it with tqdit-calibrate"),
        (["--model", "absent.pt"], 1, "absent.pt: no such file"),
        (["--model", "model.onnx"], 1, "model.onnx: no such file or directory"),
        (["--vae", "somewhere"], 1, "somewhere: no config.json in it"),
        (["/dev/null/model.onnx"], 1, "cannot be written"),
        (["model.engine"], 2, "model.engine: tqdit-export writes an ONNX file. Give it a name that ends in .onnx."),
    ],
)
def test_a_bad_request_gets_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    assert export(*arguments) == code
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_scales_lie_beside_and_their_model_is_taken(checkpoint, tmp_path, monkeypatch, capsys):
    """./scales.safetensors is used if it is there, and its model is the default; --float ignores it."""
    monkeypatch.chdir(tmp_path)
    model = load_model(str(checkpoint), heads=2)
    write_scale_table(tmp_path / "scales.safetensors", make_table(model, Kind(groups=2)))
    assert export("int8.onnx", "--heads", "2") == 0
    assert export("float.onnx", "--heads", "2", "--float", "--model", checkpoint) == 0
    quantized, floating = read_card(tmp_path / "int8.onnx"), read_card(tmp_path / "float.onnx")
    assert quantized.quantization is not None
    assert quantized.fingerprint == floating.fingerprint == model.fingerprint
    assert floating.quantization is None
    assert run("build", ["-q", "int8.onnx"]) == 0
    manifest = read_manifest(tmp_path / "int8.engine")
    assert manifest.precision == "int8"
    assert manifest.audit is not None
    assert manifest.audit.fallen_back == ()
    capsys.readouterr()
    assert run("build", ["-q", "int8.onnx", "--precision", "fp32", "-o", "stripped.engine"]) == 0
    assert read_manifest(tmp_path / "stripped.engine").precision == "fp32"
    assert run("build", ["-q", "float.onnx", "--precision", "int8"]) == 2
    err = capsys.readouterr().err
    assert "holds a float graph, asked for int8. Export it with a scale table" in err


@pytest.mark.slow
def test_a_table_of_another_model_and_a_missing_model_are_refused(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_scale_table(tmp_path / "scales.safetensors", make_table(support.tiny_model(seed=3), Kind()))
    assert export("--model", checkpoint, "--heads", "2") == 2
    assert export() == 2
    err = capsys.readouterr().err
    assert "the scale table was calibrated for model 'tiny'" in err
    assert "calibrated for 'tiny', which is not there. Pass --model" in err
    assert not (tmp_path / "model.onnx").exists()


def test_an_onnx_file_is_no_model(tmp_path, capsys):
    (tmp_path / "other.onnx").write_bytes(b"onnx")
    assert export(tmp_path / "model.onnx", "--model", tmp_path / "other.onnx") == 1
    assert "other.onnx: unsupported file type '.onnx'" in capsys.readouterr().err


def test_a_foreign_file_is_not_overwritten_without_force(checkpoint, tmp_path, capsys):
    output = tmp_path / "model.onnx"
    output.write_text("mine")
    assert export(output, "--model", checkpoint, "--heads", "2") == 1
    assert "was not written by tqdit" in capsys.readouterr().err
    assert output.read_text() == "mine"


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_an_export_leaves_the_old_file(checkpoint, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out" / "model.onnx"
    output.parent.mkdir()
    write(output, *support.exported())
    before = output.read_bytes()
    monkeypatch.setattr("torch.onnx.export", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # which Python has in a process of its own
    try:
        assert export(output, "--model", checkpoint, "--heads", "2") == 130
    finally:
        signal.signal(signal.SIGINT, ours)
    assert "interrupted; nothing was changed" in capsys.readouterr().err
    assert [file.name for file in output.parent.iterdir()] == ["model.onnx"]
    assert output.read_bytes() == before
