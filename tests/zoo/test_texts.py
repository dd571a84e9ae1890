"""Text encoders of recorded pipelines in the bundle: prompts without PyTorch."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import onnx
import pytest
import torch

import tqdit
from support import diffusers_dit, few, made_once, tiny_model
from tqdit.cli.main import run
from tqdit.engines.run.requests import encode, open_texts
from tqdit.engines.run.sampler import Sampler
from tqdit.errors import FileFormatError, MissingLibraryError, TqditWarning, UsageError
from tqdit.exporter import text as exporter
from tqdit.exporter.onnx_writer import _side_files
from tqdit.exporter.passes import weight_only
from tqdit.models.directories import open_pipeline
from tqdit.models.recorded import recorded_model
from tqdit.models.recording import Recording
from tqdit.onnx_file import read_card
from tqdit.quantization.table import read_scale_table
from tqdit.sampling import noise
from tqdit.text import TextEncoder
from zoo.pipelines import FAMILIES, vae
from zoo.test_pipelines import STEPS, relative
from zoo.texts import OTHERS, PROMPTS, TEXTS, pixart_with_t5

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

NEW = "an A of B"  # was not recorded


def latents(pipeline, arguments, prompt, **more):
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipeline(
            prompt, num_inference_steps=STEPS, output_type="latent", return_dict=False, **arguments, **more
        )[0]  # fmt: skip


def record(pipeline, arguments, prompts=PROMPTS):
    with tqdit.record(pipeline) as calls:
        for prompt in prompts:
            latents(pipeline, arguments, prompt, generator=torch.Generator().manual_seed(0))
    return calls.recording()


def make(name, folder):
    if name == "sd3":
        make_by_commands(folder)
        return
    pipeline, arguments = TEXTS[name]()
    recording = record(pipeline, arguments)
    recording.save(folder / "calls.safetensors")
    with tqdit.record(pipeline) as calls:
        latents(pipeline, arguments, NEW)
    calls.recording().save(folder / "new.safetensors")
    model = recorded_model(pipeline.transformer, recording.interface)
    tqdit.export(model, folder / "model.onnx", text=pipeline)
    tqdit.build(folder / "model.onnx", folder / "model.engine", backend="onnxruntime")


def make_by_commands(folder):
    """The same of the directory of a pipeline, with a calibration and a decoder."""
    size = {"height": 64, "width": 64}
    pipeline, _ = TEXTS["sd3"]()
    with contextlib.chdir(folder):
        pipeline.save_pretrained("dir")
        Path("prompts.txt").write_text("\n".join(PROMPTS))
        knobs = "--preset min-max --groups 3 --rows-per-group 4 --steps 6"
        for line in (
            f"calibrate dir --prompts prompts.txt -o t.safetensors {knobs} --height 64 --width 64",
            "export model.onnx --model dir --scales t.safetensors --text",
            "build model.onnx --backend onnxruntime",
        ):
            verb, *rest = line.split()
            assert run(verb, [*rest, "-q"]) == 0
        (kept,) = Path("t.safetensors.work").glob("calls-*.safetensors")
        shutil.copy(kept, "calls.safetensors")
        record(pipeline, size, [NEW]).save("new.safetensors")


@pytest.fixture(params=TEXTS)
def family(request):
    return request.param, made_once(f"texts-{request.param}", lambda folder: make(request.param, folder))


@pytest.fixture
def pixart():
    return made_once("texts-pixart-sigma", lambda folder: make("pixart-sigma", folder))


def test_a_prompt_becomes_what_the_pipeline_makes_of_it(family):
    """Of recorded prompts and of a new one, also with the unconditional row's values."""
    _, folder = family
    with tqdit.Sampler.open(folder / "model.engine") as sampler:
        for file, prompts in (("calls", PROMPTS), ("new", (NEW,))):
            expected = Recording.load(folder / f"{file}.safetensors").requests
            found = sampler.encode(prompts)
            assert set(found) == set(expected)
            for name, array in expected.items():
                assert found[name].dtype == array.dtype
                assert relative(found[name], array) < 1e-10


@pytest.mark.parametrize("name", few(OTHERS, "flux", "sana"))  # the one of wan is a T5 again
def test_text_encoders_of_other_families_reproduce_the_pipeline_s_embeddings(name, tmp_path):
    """Also of a prompt that was not recorded. The constants are of the negative prompt, and Flux's guidance."""
    pipeline, arguments = OTHERS[name]()
    recording = record(pipeline, arguments)
    graph = exporter.trace_text(pipeline, recorded_model(pipeline.transformer, recording.interface), "x")
    expected = record(pipeline, arguments, [NEW]).requests
    found = TextEncoder(tmp_path, graph.write(tmp_path, "x"))([NEW, PROMPTS[2]])
    assert set(found) == set(expected)
    for key, array in expected.items():
        assert relative(found[key][:1], array) < 1e-10
        assert relative(found[key][1:], recording.requests[key][2:]) < 1e-10


def test_encoders_with_int8_weights_differ_from_float_ones_as_much_as_their_card_says(pixart, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_only, "LEAST", 256)
    pipeline, _ = pixart_with_t5()
    recording = Recording.load(pixart / "calls.safetensors")
    model = recorded_model(pipeline.transformer, recording.interface)
    traced = exporter.trace_text(pipeline, model, "x", int8=True)
    card = traced.write(tmp_path, "x")
    graph = onnx.load(tmp_path / card.file)
    rounded = [each for each in graph.graph.initializer if each.data_type == onnx.TensorProto.INT8]
    assert len(rounded) >= sum(node.op_type == "MatMul" for node in graph.graph.node) / 2
    found = TextEncoder(tmp_path, card)(PROMPTS)["encoder_hidden_states"]
    expected = recording.requests["encoder_hidden_states"]
    errors = [relative(a, b) ** 0.5 for a, b in zip(found, expected, strict=True)]
    assert max(errors) == pytest.approx(card.int8_error, rel=1e-3)
    assert 1e-4 < card.int8_error < 0.05
    assert f"{card.int8_error:.2%}" in card.summary
    again = tmp_path / "again"
    again.mkdir()
    monkeypatch.setattr(exporter, "INT8_TOLERANCE", card.int8_error)
    with pytest.raises(UsageError, match="encoder_hidden_states"):
        traced.write(again, "x")


def test_what_a_pipeline_changes_in_a_prompt_is_changed_here(pixart):
    """PixArt takes lower case; characters that no recorded prompt had are tokens as for the pipeline's tokenizer."""
    with tqdit.Sampler.open(pixart / "model.engine") as sampler:
        first, second, third = sampler.encode(["  a Bold RED a on blue ", PROMPTS[0], "x%?"])["encoder_hidden_states"]
        np.testing.assert_array_equal(first, second)
        pipeline, _ = pixart_with_t5()
        with torch.no_grad():
            expected = pipeline.encode_prompt("x%?", False, max_sequence_length=10)[0][0]
        assert relative(third, expected) < 1e-10


def test_a_sampled_prompt_needs_no_torch(pixart, tmp_path):
    """And ends where the pipeline does, from the same noise; n and the order of prompts change nothing."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'diffusers', 'transformers', 'onnx', 'onnx_ir']))"
    arguments = ["-q", str(pixart / "model.engine"), "-o", str(tmp_path / "x.npz"), "-n", "3", "--batch", "2"]
    arguments += ["--prompt", NEW, "--prompt", PROMPTS[0]]
    code = f"{blocked}; from tqdit.cli.main import run; sys.exit(run('sample', {arguments!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    found = np.load(tmp_path / "x.npz")
    assert found["labels"].tolist() == [0, 1, 0]
    pipeline, call = pixart_with_t5()
    for image, prompt in enumerate((NEW, PROMPTS[0], NEW)):
        start = noise.normal(0, image, noise.INITIAL, (1, *found["latents"].shape[1:]))
        expected = latents(pipeline, call, prompt, latents=torch.from_numpy(start))
        assert relative(found["latents"][image], expected) < 1e-8


def refused(capsys, *arguments, code=2):
    assert run("sample", [*map(str, arguments), "-q"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_prompts_that_cannot_be_shown_are_one_line_before_the_engine_is_opened(pixart, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tqdit.cli.sample.Sampler.open", None)
    engine, output = pixart / "model.engine", ("-o", tmp_path / "x.npz")
    line = refused(capsys, engine, *output, "--prompt", "a red A " * 5)
    assert "16 tokens" in line
    assert "takes 10" in line
    assert "Use fewer words." in line
    assert "--embeddings, --prompt" in refused(
        capsys, engine, *output, "--prompt", "a", "--embeddings", pixart / "calls.safetensors"
    )
    assert "--classes, --embeddings, --prompt" in refused(capsys, engine, *output, "--prompt", "a", "--classes", 1)
    plain = tmp_path / "plain.engine"
    shutil.copytree(engine, plain)
    manifest = json.loads((plain / "manifest.json").read_text())
    manifest["card"]["text"] = None
    (plain / "manifest.json").write_text(json.dumps(manifest))
    assert "no text encoders" in refused(capsys, plain, *output, "--prompt", "a")
    with pytest.raises(UsageError, match="list of prompts"):
        Sampler(read_card(pixart / "model.onnx"), None).encode("a")


def test_altered_text_encoders_are_refused(pixart, tmp_path, capsys):
    card = read_card(pixart / "model.onnx").text
    for folder in (pixart, pixart / "model.engine"):
        assert all((folder / name).is_file() for name in card.files)
    assert {pixart / name for name in card.files} <= _side_files(pixart / "model.onnx")  # a new export removes them
    engine = shutil.copytree(pixart / "model.engine", tmp_path / "model.engine")
    with (engine / card.tokens[0].file).open("a") as file:
        file.write(" ")
    line = refused(capsys, engine, "-o", tmp_path / "x.npz", "--prompt", "a", code=1)
    assert card.tokens[0].file in line
    for name in ("model.onnx", *card.files):
        shutil.copy(pixart / name, tmp_path)
    (tmp_path / card.file).unlink()
    with pytest.raises(FileFormatError, match=rf"{card.file}: missing"):
        tqdit.build(tmp_path / "model.onnx", tmp_path / "again.engine", backend="onnxruntime")


def model_of(pixart, **changes):
    pipeline, _ = pixart_with_t5()
    model = recorded_model(pipeline.transformer, Recording.load(pixart / "calls.safetensors").interface)
    return pipeline, replace(model, text=replace(model.text, **changes))


def moved(text, name, factor):
    return {"values": {**text.values, name: text.values[name] * np.float32(factor)}}


def test_encoders_that_do_not_reproduce_recorded_embeddings_are_refused_with_the_figure(pixart, tmp_path, monkeypatch):
    _, model = model_of(pixart)
    pipeline, other = model_of(pixart, **moved(model.text, "encoder_hidden_states", 1.01))
    with pytest.raises(UsageError, match=r"'encoder_hidden_states'.*difference [19]\.\de-03, expected less than 1e-04"):
        exporter.trace_text(pipeline, other, "x")
    graph = exporter.trace_text(pipeline, model, "x")
    wrong = replace(graph, examples=other.text)
    with pytest.raises(UsageError, match=r"ONNX Runtime.*'encoder_hidden_states'.*difference 9\.9e-03"):
        wrong.write(tmp_path, "x")
    with pytest.raises(UsageError, match="fewer than two different prompts"):
        exporter.trace_text(pipeline, replace(model, text=None), "x")
    one = {name: array[:1] for name, array in model.text.values.items()}
    with pytest.raises(UsageError, match="fewer than two different prompts"):
        exporter.trace_text(*model_of(pixart, prompts=PROMPTS[:1], values=one), "x")
    with pytest.raises(FileFormatError, match="recorded prompts are damaged"):
        exporter.trace_text(*model_of(pixart, values=one), "x")
    monkeypatch.setattr(pipeline, "_text_preprocessing", lambda text, **_: [each[::-1] for each in text])
    with pytest.raises(UsageError, match=r"tokens of the recorded prompts.*got ' 1b deR A ' for ' A Red b1 '"):
        exporter.trace_text(pipeline, model, "x")
    assert type(pipeline.tokenizer).__name__ == "TokenizersBackend"  # not our listener


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_pipeline_in_half_precision_records_what_proves_its_encoders(kind, tmp_path):
    """Its embeddings tell which result is which; the graph is proved by what the encoders compute in float32."""
    pipeline, arguments = pixart_with_t5()
    exact = record(pipeline, arguments)
    pipeline.to(kind)
    recording = record(pipeline, arguments)
    name = "encoder_hidden_states"
    assert 1e-4 < relative(recording.requests[name], exact.requests[name]) ** 0.5 < 0.05
    graph = exporter.trace_text(pipeline, recorded_model(pipeline.transformer, recording.interface), "x")
    assert relative(graph.examples.values[name], recording.requests[name]) > 0
    card = graph.write(tmp_path, "x")
    (row,) = TextEncoder(tmp_path, card)([PROMPTS[1]])[name]
    assert row.dtype == np.float32
    text = recording.interface.text
    wrong = replace(recording.interface, text=replace(text, **moved(text, name, 2)))
    with pytest.raises(UsageError, match=r"least difference 5\.\de-01, expected less than (5|1)e-02"):
        exporter.trace_text(pipeline, recorded_model(pipeline.transformer, wrong), "x")


def test_embeddings_leave_nothing_to_prove_text_encoders_with():
    pipeline, arguments = FAMILIES["pixart-sigma"]()
    with tqdit.record(pipeline) as calls:
        pipeline.set_progress_bar_config(disable=True)
        pipeline(num_inference_steps=STEPS, output_type="latent", **arguments)
    assert calls.recording().interface.text is None


def test_several_prompts_and_images_of_a_call_are_told_apart():
    pipeline, arguments = pixart_with_t5()
    recording = record(pipeline, {**arguments, "num_images_per_prompt": 2}, [list(PROMPTS[:2]), PROMPTS[2]])
    assert len(recording) == 6
    assert recording.interface.text.prompts == PROMPTS
    for number, row in enumerate((0, 2, 4)):
        for name, array in recording.interface.text.values.items():
            np.testing.assert_array_equal(array[number], recording.requests[name][row])


def test_a_pipeline_directory_goes_from_prompts_to_pictures(tmp_path, monkeypatch):
    """As commands (`make_by_commands`)."""
    folder = made_once("texts-sd3", make_by_commands)
    engine, prompts = str(folder / "model.engine"), str(folder / "prompts.txt")
    monkeypatch.chdir(tmp_path)
    assert run("sample", [engine, "-q", "--prompt", PROMPTS[0], "-o", "a.npz"]) == 0
    found = np.load("a.npz")["arr_0"]
    assert found.shape == (1, 64, 64, 3)
    assert run("sample", [engine, "-q", "--prompt", PROMPTS[0], "-n", "3", "--shard-size", "2", "-o", "s"]) == 0
    assert run("sample", [engine, "-q", "--prompts", prompts, "-o", "three.npz"]) == 0
    np.testing.assert_array_equal(np.load("three.npz")["arr_0"][:1], found)
    assert len(np.load("three.npz")["arr_0"]) == len(PROMPTS)
    assert json.loads((tmp_path / "s" / "shards.json").read_text())["job"]["prompts"]["texts"] == [PROMPTS[0]]
    np.testing.assert_array_equal(next(tqdit.read_shards("s"))["arr_0"][:1], found)


def test_words_that_no_tokenizer_knows_are_named(pixart):
    card = read_card(pixart / "model.onnx")
    with pytest.warns(TqditWarning, match="'ω' of the prompt 'an Ω of B'"):
        encode(pixart / "model.engine", card, ["an Ω of B"])
    encode(pixart / "model.engine", card, [NEW])  # a warning would be an error


def test_an_engine_of_text_is_evaluated_on_prompts(tmp_path, monkeypatch, capsys):
    """Against a float engine of the directory that its card names; the layers on the calls that were kept."""
    folder = made_once("texts-sd3", make_by_commands)
    monkeypatch.chdir(folder)  # which the directory's name is relative to
    line = [
        "model.engine",
        "--scales",
        "t.safetensors",
        "-n",
        "2",
        "--float-seeds",
        "0",
        "-q",
        "-o",
        str(tmp_path / "e.json"),
    ]
    assert run("evaluate", line) == 2
    assert "--prompts FILE" in capsys.readouterr().err
    assert run("evaluate", [*line, "--prompts", "prompts.txt", "--layers", "--diagnosed", "1"]) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["subject"]["prompts"] == "; ".join(PROMPTS)
    assert 0 < found["paired"]["final_error"]["value"] < 1
    assert max(map(max, found["layers"]["errors"].values())) > 0
    assert (tmp_path / "diagnosis.json").is_file()
    assert run("evaluate", [*line, "--embeddings", "calls.safetensors", "--alone"]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["paired"] is None
    shutil.copy("t.safetensors", tmp_path)  # without the calls beside it
    line[2] = str(tmp_path / "t.safetensors")
    assert run("evaluate", [*line, "--prompts", "prompts.txt", "--layers"]) == 2
    assert "--rows FILE" in capsys.readouterr().err


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The prompts that the pipeline `dir` has drawn so far; `prompts.txt` holds PROMPTS."""
    monkeypatch.chdir(tmp_path)
    pipeline, _ = TEXTS["sd3"]()
    pipeline.save_pretrained("dir")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    found = []
    monkeypatch.setattr("tqdit.models.directories.open_pipeline", lambda _: pipeline)
    monkeypatch.setattr(type(pipeline), "check_inputs", lambda _, prompt, *__, **___: found.append(prompt))
    return found


def test_recorded_prompts_are_kept_for_further_commands(drawn, tmp_path, capsys):
    """The pipeline is most of the work: settings that cannot be refuse before it, or after its first prompt."""
    line = "dir --prompts prompts.txt -o t.safetensors --preset min-max --rows-per-group 4 --height 64 --width 64"
    assert run("calibrate", [*line.split(), "--steps", "6"]) == 2
    assert drawn == []
    assert "--groups is 10" in capsys.readouterr().err
    line += " --steps 6 --groups 3"
    assert run("calibrate", line.split()) == 0
    assert drawn == list(PROMPTS)
    first = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "t.safetensors").unlink()
    assert run("calibrate", line.split()) == 0
    assert drawn == list(PROMPTS)
    assert (tmp_path / "t.safetensors").read_bytes() == first
    (kept,) = (tmp_path / "t.safetensors.work").glob("calls-*.safetensors")
    assert str(kept.name) in capsys.readouterr().err
    assert repr(Recording.load(kept)).startswith("Recording(requests=3, ")
    assert run("calibrate", [*line.split(), "--seed", "1"]) == 0
    assert len(drawn) == 2 * len(PROMPTS)


CARD = {"call": {"height": 64, "width": 64, "num_inference_steps": 6}, "prompts": list(PROMPTS)}


def test_a_pipeline_s_card_tells_prompts_and_arguments_of_its_calls(drawn, tmp_path):
    """A flag goes before what the card says."""
    (tmp_path / "dir" / "model.json").write_text(json.dumps(CARD))
    line = "dir -o t.safetensors --preset min-max --rows-per-group 4 --groups 2 -q"
    assert run("calibrate", line.split()) == 0
    assert drawn == list(PROMPTS)
    assert read_scale_table(tmp_path / "t.safetensors").interface.sampling.steps == 6
    (tmp_path / "one.txt").write_text("a word")
    assert run("calibrate", [*line.split(), "--prompts", "one.txt", "--steps", "5"]) == 0
    assert drawn == [*PROMPTS, "a word"]
    assert read_scale_table(tmp_path / "t.safetensors").interface.sampling.steps == 5


@pytest.mark.parametrize(("card", "says"), [
    ('{"call": {"height": [64]}}', "call"), ('{"prompts": "red"}', "prompts"), ('{"space": "pixels"}', "space"),
    ("{", "truncated"),
])  # fmt: skip
def test_a_damaged_card_of_a_pipeline_is_one_line_before_it_is_loaded(tmp_path, monkeypatch, capsys, card, says):
    monkeypatch.chdir(tmp_path)
    TEXTS["sd3"]()[0].save_pretrained("dir")
    (tmp_path / "dir" / "model.json").write_text(card)
    monkeypatch.setattr("tqdit.models.directories.open_pipeline", None)
    capsys.readouterr()
    assert run("calibrate", ["dir", "-q"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.json" in line
    assert says in line
    assert "any-pipeline.md" in line


def test_an_argument_that_the_pipeline_does_not_take_is_named(drawn, tmp_path, capsys):
    (tmp_path / "dir" / "model.json").write_text(json.dumps({**CARD, "call": {"hight": 64}}))
    assert run("calibrate", ["dir", "-q"]) == 2
    assert "takes no hight" in capsys.readouterr().err
    assert drawn == []


def test_a_loop_that_the_groups_do_not_fit_is_refused_after_one_prompt(drawn, capsys):
    line = "dir --prompts prompts.txt -o t.safetensors --groups 29 --height 64 --width 64"
    assert run("calibrate", line.split()) == 2  # the pipeline's own number of steps is 28
    assert drawn == [PROMPTS[0]]
    assert "--groups is 29" in capsys.readouterr().err


def test_recorded_calls_are_described_without_libraries(pixart):
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'diffusers', 'safetensors', 'onnx', 'onnx_ir']))"
    code = (
        f"{blocked}; from tqdit.cli.main import run; sys.exit(run('inspect', [{str(pixart / 'calls.safetensors')!r}]))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    said = dict(line.split("  ", 1) for line in found.stdout.splitlines())
    assert "PixArtTransformer2DModel" in said["kind"]
    assert said["requests"].strip() == str(len(PROMPTS))
    assert "10 x 24" in said["port encoder_hidden_states"]
    assert f"{STEPS} steps of DPMSolverMultistepScheduler" in said["sampled with"]
    assert PROMPTS[0] in said["prompts kept"]


def test_a_pipeline_directory_is_described(tmp_path, capsys):
    FAMILIES["sd3"]()[0].save_pretrained(tmp_path)
    assert run("inspect", [str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "SD3Transformer2DModel" in said
    assert "--prompts" in said


def test_only_the_directory_of_a_whole_pipeline_takes_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    FAMILIES["sd3"]()[0].transformer.save_pretrained("alone")
    (tmp_path / "prompts.txt").write_text("a letter")
    for model in ("demo", "alone"):
        assert run("calibrate", [model, "--prompts", "prompts.txt", "-o", "t.safetensors"]) == 1
        assert "model_index.json" in capsys.readouterr().err
    assert run("export", ["m.onnx", "--float", "--model", "alone", "--text"]) == 1
    assert "model_index.json" in capsys.readouterr().err
    assert run("calibrate", ["alone", "--rows", "calls.safetensors", "--width", "64", "-o", "t.safetensors"]) == 2
    assert "--prompts" in capsys.readouterr().err


def test_an_engine_with_text_encoders_asks_for_a_prompt(pixart, tmp_path, capsys):
    for shown in ([], ["--classes", "1"]):
        line = refused(capsys, pixart / "model.engine", "-o", tmp_path / "x.png", *shown)
        assert "images of this engine show prompts, not classes. Pass --prompt TEXT" in line


def test_prompts_without_an_image_are_counted(pixart, tmp_path, capsys):
    line = [str(pixart / "model.engine"), "-o", str(tmp_path / "x.npz"), "--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    assert run("sample", [*line, "-n", "1"]) == 0
    assert "1 image for 2 prompts: the last 1 has none" in capsys.readouterr().err
    assert run("sample", line) == 0
    assert "prompts" not in capsys.readouterr().err


def test_bars_of_libraries_are_silent_and_on_again(tmp_path, capfd):
    diffusers.utils.logging.enable_progress_bar()
    TEXTS["pixart-sigma"]()[0].save_pretrained(tmp_path)
    capfd.readouterr()
    open_pipeline(str(tmp_path))
    assert "%" not in capfd.readouterr().err
    assert diffusers.utils.logging.is_progress_bar_enabled()


def one_prompt(family, *more):
    """Arguments of tqdit-calibrate for one prompt and a pipeline that is written to the current directory."""
    OTHERS[family]()[0].save_pretrained("dir")
    Path("prompts.txt").write_text(PROMPTS[0])
    line = "dir --prompts prompts.txt --steps 2 --groups 2 --height 32 --width 32 --preset min-max --rows-per-group 2"
    return [*line.split(), *more, "-o", "t.safetensors"]


def kept_calls():
    (kept,) = Path("t.safetensors.work").glob("calls-*.safetensors")
    return Recording.load(kept)


def test_the_guidance_scale_of_prompts_is_the_pipeline_s(tmp_path, monkeypatch, capsys):
    """Flux takes it as an input of its network; to the loop it has no guidance."""
    monkeypatch.chdir(tmp_path)
    arguments = one_prompt("flux", "--guidance-scale", "2.5")
    assert run("calibrate", [*arguments, "--frames", "5"]) == 2
    assert "FluxPipeline takes no num_frames" in capsys.readouterr().err
    assert run("calibrate", arguments) == 0
    assert kept_calls().requests["guidance"].tolist() == [2.5]


def test_another_guidance_scale_than_the_recorded_one_is_refused(pixart):
    pipeline, _ = pixart_with_t5()
    with pytest.raises(UsageError, match=r"--guidance-scale is 9; .* 4\.5"):
        tqdit.calibrate(pipeline.transformer, rows=pixart / "calls.safetensors", groups=2, guidance_scale=9.0)


def test_frames_of_prompts_are_chosen(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = one_prompt("wan", "--frames", "5")
    assert run("calibrate", [*arguments, "--height", "33"]) == 2  # the pipeline's own refusal
    assert "33" in capsys.readouterr().err
    assert run("calibrate", arguments) == 0
    assert kept_calls().states.shape[3] == 2  # a frame of latents, and four frames in another


def test_a_pipeline_of_classes_takes_no_prompts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    diffusers.DiTPipeline(diffusers_dit(), vae(), diffusers.DDIMScheduler()).save_pretrained("dir")
    (tmp_path / "prompts.txt").write_text("a letter")
    assert run("calibrate", ["dir", "--prompts", "prompts.txt", "-o", "t.safetensors"]) == 2
    assert "takes no prompt" in capsys.readouterr().err
    for model in ("demo", "dir"):
        assert run("export", ["m.onnx", "--float", "--model", model, "--text"]) == 2
        assert "has no text encoders" in capsys.readouterr().err


def test_an_engine_of_classes_asks_for_classes():
    with pytest.raises(UsageError, match="--classes"):
        open_texts(Path("x.engine"), tiny_model().card())


def test_a_pipeline_of_text_without_transformers_is_not_called_damaged(tmp_path, monkeypatch):
    TEXTS["pixart-sigma"]()[0].save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingLibraryError, match="transformers"):
        open_pipeline(str(tmp_path))
