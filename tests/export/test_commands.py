"""`tqdit-export` as a user meets it."""

import signal
import subprocess
import sys

import pytest
from safetensors.torch import save_file

import support
from tqdit.cli import run
from tqdit.onnx_file import read_card


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "dit.safetensors"
    save_file(dict(support.tiny_model().network.state_dict()), path)
    return path


def export(*arguments):
    return run("export", ["-q", *map(str, arguments)])


def test_a_published_checkpoint_exports_as_its_origin_samples(checkpoint, tmp_path, capsys):
    output = tmp_path / "model.onnx"
    assert export(output, "--model", checkpoint, "--heads", "2") == 0
    assert capsys.readouterr().out == f"{output}\n"
    card = read_card(output)
    assert (card.sampling.steps, card.sampling.sampler, card.sampling.guided_channels) == (250, "ddpm", 3)
    assert (card.origin, card.latent_scale, card.guided) == ("published", 0.18215, True)


def test_the_demo_model_exports_with_no_arguments(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert export() == 0
    card = read_card(tmp_path / "model.onnx")
    assert (card.model, card.num_classes, card.latent_scale, card.sampling.steps) == ("demo", 16, None, 250)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--steps", "0"], 2, "--steps is 0; a chain has 1 to 1000 steps"),
        (["--model", "absent.pt"], 1, "absent.pt: no such file"),
        (["--model", "model.onnx"], 1, "model.onnx: no such file or directory"),
        (["--vae", "somewhere"], 1, "works on images and needs no decoder"),
        (["/dev/null/model.onnx"], 1, "cannot be written"),
    ],
)
def test_a_bad_request_gets_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    assert export(*arguments) == code
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_file_is_not_overwritten_without_force(checkpoint, tmp_path, capsys):
    output = tmp_path / "model.onnx"
    output.write_text("mine")
    assert export(output, "--model", checkpoint, "--heads", "2") == 1
    assert "was not written by tqdit" in capsys.readouterr().err
    assert output.read_text() == "mine"


def test_ctrl_c_in_the_middle_of_an_export_leaves_the_old_file(checkpoint, tmp_path):
    output = tmp_path / "out" / "model.onnx"
    output.parent.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "tqdit.cli", "export", str(output), "--model", str(checkpoint), "--heads", "2"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("tracing"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; nothing was changed" in err
    assert "Traceback" not in err
    assert list(output.parent.iterdir()) == []
