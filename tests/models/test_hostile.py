"""Files that lie: recorded calls whose header does not fit, and pipeline directories that name foreign code."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

import tqdit
from tqdit.cli.main import run
from tqdit.errors import CheckpointError, FileFormatError, OutputError, UsageError
from tqdit.interface import RECORDING_KEY
from tqdit.models.directories import open_pipeline
from tqdit.models.making import bounded
from tqdit.models.recorded import recorded_model
from tqdit.models.recording import Recording

from .test_recording import Loop


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    pipeline = Loop()
    with tqdit.record(pipeline) as heard:
        pipeline(0)
    path = tmp_path_factory.mktemp("calls") / "calls.safetensors"
    return heard.recording().save(path), pipeline.transformer


def altered(path, target, change=lambda _: None, **arrays):
    """A copy of recorded calls with another interface or other arrays."""
    with safe_open(path, "np") as file:
        header = json.loads(file.metadata()[RECORDING_KEY])
    change(header["interface"])
    save_file({**load_file(path), **arrays}, target, {RECORDING_KEY: json.dumps(header)})
    return target


def table(interface):
    return interface["sampling"]["process"]["tables"][0]


STATES = np.ones((1, 4, 3, 8))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda i: table(i)["input_scale"].pop(), "4 steps"),
        (lambda i: table(i)["noise_weight"].append(0.0), "4 steps"),
        (lambda i: i["sampling"]["process"].update(sign=7), "7"),
        (lambda i: i["sampling"]["process"].update(time_scale=0), "a factor other than 0"),
        (lambda i: i["sampling"]["process"].update(training_steps=-7), "-7 training steps"),
        (lambda i: i.update(alike=["nothing"]), "'nothing'"),
        (lambda i: i.update(text={"prompts": ["a", "b"], "settings": {}}), "prompts"),
    ],
)
def test_recorded_calls_with_a_header_that_does_not_fit_are_refused(calls, tmp_path, change, found):
    with pytest.raises(FileFormatError, match=found):
        Recording.load(altered(calls[0], tmp_path / "x.safetensors", change))


@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_recorded_states_of_another_type_are_refused(calls, tmp_path, dtype):
    with pytest.raises(FileFormatError, match=f"'states' is {dtype}, expected float32"):
        Recording.load(altered(calls[0], tmp_path / "x.safetensors", states=STATES.astype(dtype)))


def constant(interface):
    interface["constants"]["nonsense"] = 1


def prediction(interface):
    interface["signature"]["output"] = [None, 5]


@pytest.mark.parametrize(("change", "found"), [(constant, "nonsense"), (prediction, r"predicts \(3, 8\).*\(5,\)")])
def test_calls_that_the_network_does_not_take_are_refused_in_one_line(calls, tmp_path, change, found):
    recording = Recording.load(altered(calls[0], tmp_path / "x.safetensors", change))
    with pytest.raises(UsageError, match=found) as caught:
        recorded_model(calls[1], recording.interface)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from zoo.texts import pixart_with_t5

    folder = tmp_path_factory.mktemp("pipeline") / "pixart"
    pixart_with_t5()[0].save_pretrained(folder)
    return folder


def index(folder, **changes):
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "pipeline")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"_class_name": ["own_code", "Pipeline"]}, "own_code"),
        ({"transformer": ["own_code", "Network"]}, "own_code"),
        ({"vae": ["subprocess", "Popen"]}, "subprocess"),
        ({"scheduler": ["schedulers.own", "Scheduler"]}, "schedulers.own"),
    ],
)
def test_a_pipeline_directory_runs_no_code_of_its_own(saved, tmp_path, monkeypatch, changes, found):
    """Not even if the module lies where Python looks for modules."""
    folder = copied(saved, tmp_path)
    index(folder, **changes)
    for place in (folder, folder / "transformer"):
        (place / "own_code.py").write_text("raise SystemExit('code of the directory ran')\n")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(CheckpointError, match=rf"'.*{found}.*', whose code would run.*use tqdit\.record\."):
        open_pipeline(str(folder))
    assert "own_code" not in sys.modules


@pytest.mark.parametrize(
    ("file", "name", "value", "error", "found"),
    [
        ("transformer/config.json", "num_layers", 10**9, CheckpointError, "parameters, its files hold"),
        ("vae/config.json", "layers_per_block", 10**9, CheckpointError, "parameters, its files hold"),
        ("text_encoder/config.json", "num_layers", 10**9, CheckpointError, "parameters, its files hold"),
        ("transformer/config.json", "sample_size", 10**6, UsageError, r"transformer.config\.json: tables .* of memory"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9, CheckpointError, "is 1000000000, expected"),
        ("scheduler/scheduler_config.json", "solver_order", 10**9, CheckpointError, "is 1000000000, expected"),
    ],
)
def test_a_configuration_that_claims_more_than_files_hold_is_refused(saved, tmp_path, file, name, value, error, found):
    """Each would take hours or all memory."""
    folder = copied(saved, tmp_path)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(error, match=found):
        open_pipeline(str(folder))


def test_layers_of_any_name_are_bounded(tmp_path):
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "diffusion_pytorch_model.safetensors")

    def made():
        for _ in range(10**9):
            nn.Linear(1, 1, device="meta")

    refused = pytest.raises(CheckpointError, match="more than 1004 parameters, its files hold 1 tensors")
    with refused, bounded(tmp_path, tmp_path):
        made()
    with bounded(tmp_path, tmp_path):
        nn.ModuleList(nn.Linear(1, 1) for _ in range(500))
    nn.ModuleList(nn.Linear(1, 1) for _ in range(600))  # not afterwards


def test_weights_that_no_file_holds_are_named(saved, tmp_path):
    folder = copied(saved, tmp_path)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["proj_out.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"transformer: its files lack 'proj_out\.bias'"):
        open_pipeline(str(folder))


def test_weights_that_are_not_numbers_are_named(saved, tmp_path):
    folder = copied(saved, tmp_path)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"decoder.conv_in.bias": tensors["decoder.conv_in.bias"] * np.nan}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"vae: 'decoder\.conv_in\.bias' holds NaN"):
        open_pipeline(str(folder))


class Raising:
    """A pipeline that raises what `error` says."""

    def __init__(self, error):
        self.transformer, self.scheduler, self.error = nn.Linear(1, 1), Loop().scheduler, error

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, prompt, generator, output_type, num_inference_steps=50):
        raise self.error


def calibrate(tmp_path, *arguments):
    prompts = tmp_path / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("a red square\n")
    return run(
        "calibrate", [str(tmp_path), "--prompts", str(prompts), "-o", str(tmp_path / "x.safetensors"), *arguments]
    )


@pytest.mark.parametrize("error", [ValueError("height must be\nodd"), torch.OutOfMemoryError("no"), KeyError("tokens")])
def test_what_a_pipeline_raises_is_one_line_with_its_prompt(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr("tqdit.models.directories.open_pipeline", lambda _: Raising(error))
    assert calibrate(tmp_path, "-q") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Raising refuses 'a red square'" in line


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--height", "0"], "--height is 0"),
        (["--width", "100000"], "--width is 100000"),
        (["--steps", "4", "--groups", "5"], "--groups is 5, --steps 4"),
    ],
)
def test_arguments_are_looked_at_before_the_pipeline_is_loaded(tmp_path, monkeypatch, capsys, arguments, found):
    monkeypatch.setattr("tqdit.models.directories.open_pipeline", lambda _: pytest.fail("was loaded"))
    assert calibrate(tmp_path, *arguments) == 2
    assert found in capsys.readouterr().err


def test_a_size_without_prompts_is_refused(tmp_path, capsys):
    assert run("calibrate", ["demo", "--height", "64", "-o", str(tmp_path / "x.safetensors")]) == 2
    assert "--height is of the images of --prompts" in capsys.readouterr().err


def test_a_file_of_prompts_has_a_bound(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tqdit.text.MOST_TEXT_BYTES", 5)
    assert calibrate(tmp_path) == 2
    assert "more than 5 bytes" in capsys.readouterr().err


class Bent(Loop):
    """A loop that changes the states between two steps, as a mask of an image to keep does."""

    def __init__(self):
        super().__init__()
        inner = self.scheduler.step

        def step(out, t, x, **options):
            return inner(out, t, x, **options)

        self.scheduler.step = step
        self.shift = 0.0

    def __call__(self, seed):
        self.scheduler.set_timesteps(4)
        x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(seed))
        for t in self.scheduler.timesteps:
            out = self.transformer(x, t.expand(1), torch.ones(1, 50))
            x = self.scheduler.step(out, t, x, return_dict=False)[0] + self.shift


def test_states_that_change_between_steps_are_refused():
    pipeline = Bent()
    pipeline.shift = 0.1
    with pytest.raises(UsageError, match="between steps 1 and 2"), tqdit.record(pipeline):
        pipeline(0)


def test_states_that_are_not_numbers_are_refused():
    pipeline = Bent()
    pipeline.shift = float("nan")
    with pytest.raises(UsageError, match=r"step 2 .* NaN"), tqdit.record(pipeline):
        pipeline(0)


def test_a_recorder_leaves_the_methods_that_an_object_had_of_its_own():
    pipeline = Bent()
    own = pipeline.scheduler.step
    with tqdit.record(pipeline):
        assert pipeline.scheduler.step is not own
    assert pipeline.scheduler.step is own
    assert "set_timesteps" not in vars(pipeline.scheduler)


def test_a_pipeline_is_recorded_once_at_a_time():
    pipeline = Loop()
    with tqdit.record(pipeline) as calls:
        with pytest.raises(UsageError, match="Loop is being recorded already"), tqdit.record(pipeline):
            pass
        pipeline(0)
    assert len(calls.recording()) == 1
    assert "step" not in vars(pipeline.scheduler)


def test_guided_and_unguided_chains_are_not_mixed():
    pipeline = Bent()
    guided = Loop()
    guided.transformer, guided.scheduler = pipeline.transformer, pipeline.scheduler
    with tqdit.record(pipeline) as calls:
        pipeline(0)
        guided(0)
    with pytest.raises(UsageError, match="some are guided"):
        calls.recording()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_of_another_precision_is_recorded(dtype):
    """Bent's text is alike in all rows, so the network is asked whether it reads the values."""
    pipeline = Bent()
    network = pipeline.transformer.to(dtype)
    network.register_forward_pre_hook(lambda _, args: tuple(each.to(dtype) for each in args))
    with tqdit.record(pipeline) as calls:
        pipeline(0)
    assert calls.recording().states.dtype == np.float32


def test_a_recording_that_cannot_be_written_is_one_line(calls, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("tqdit.models.recording.save_file", full)
    with pytest.raises(OutputError, match=r"x\.safetensors: cannot be written .*space"):
        Recording.load(calls[0]).save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
