"""The text demo draws what its prompts say; MODEL `text` is its pipeline."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import tqdit
from support import ALL
from tqdit.cli.main import run
from tqdit.demo import captions
from tqdit.demo.text_judge import load_text_judge, recognised
from tqdit.demo.weights import shipped_pipeline
from tqdit.exporter.graph import ExportConfig
from tqdit.models.directories import open_pipeline
from tqdit.models.load import load_model
from tqdit.models.model_card import read_pipeline_card
from tqdit.onnx_file import OnnxFile
from tqdit.quantization.table import read_scale_table
from tqdit.text import Tokens, unknown_words

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_the_judge_knows_fresh_drawings():
    rng = np.random.default_rng(99)
    scenes = captions.draw_scenes(480, rng)
    images = captions.colour(captions.draw_masks(scenes, rng), scenes, rng)
    states = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    for name, right in recognised(states, scenes, load_text_judge()).items():
        assert right.mean() >= 0.98, name


def test_held_out_captions_are_drawn():
    """Combinations that were never trained on. docs/text-demo.md has the shares of 320, far above what is asked."""
    rng = np.random.default_rng(5)
    scenes = captions.draw_scenes(64 if ALL else 20, rng, held_out=True)
    prompts = [captions.caption(scene, number % captions.PHRASINGS) for number, scene in enumerate(scenes)]
    pipeline = open_pipeline("text")
    pipeline.set_progress_bar_config(disable=True)
    assert sum(p.numel() for p in pipeline.transformer.parameters()) == 2_046_256
    call = read_pipeline_card(shipped_pipeline()).call
    images = pipeline(prompts, generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
    for name, right in recognised(images.clamp(0, 1) * 2 - 1, scenes, load_text_judge()).items():
        assert right.mean() >= 0.85, name


def test_the_python_of_its_page_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "text-demo.md").read_text("utf-8"), re.DOTALL)
    names = {}
    exec(code.replace("num_inference_steps=28", "num_inference_steps=2"), names)
    assert names["image"].size == (24, 24)


def test_the_name_is_all_that_a_user_must_know(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("inspect", ["text"]) == 0
    assert "PixArtTransformer2DModel" in capsys.readouterr().out
    (tmp_path / "two.txt").write_text("a bold red A on blue\ntwo green 7s on black\n")
    knobs = "--preset min-max --groups 2 --rows-per-group 4 --steps 4"
    assert run("calibrate", ["text", "--prompts", "two.txt", "-o", "t.safetensors", *knobs.split(), "-q"]) == 0
    table = read_scale_table(tmp_path / "t.safetensors")
    assert table.model == "text"
    assert load_model("text", interface=table.interface).source == "text"
    assert table.interface.text.prompts == ("a bold red A on blue", "two green 7s on black")


def test_words_that_its_tokenizer_does_not_know_are_named():
    tokenizer = Tokenizer.from_file(str(shipped_pipeline() / "tokenizer" / "tokenizer.json"))
    tokens = Tokens("tokenizer.json", "ids", "mask", 16, 0, False, True, "", "", "as it is")
    assert unknown_words(tokenizer, tokens, "a bold red A on blue") == []
    assert unknown_words(tokenizer, tokens, "a mauve Ω on mauve") == ["mauve", "Ω"]


def test_the_name_alone_loads_it():
    model = tqdit.load_model("text")
    assert (model.source, model.sampling.steps) == ("text", 28)
    assert str(ExportConfig().sampling(model)) == "8 placed steps of unipc"


def test_the_name_alone_exports_it_in_float_and_its_judge_evaluates_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tqdit.evaluate.tools.DATA_COUNT", 64)
    model = tqdit.load_model("text")
    path = tqdit.export(model, tmp_path / "text.onnx", text=shipped_pipeline())
    card = OnnxFile.read(path).own_card
    assert card.quantization is None
    assert card.guidance == model.guidance
    assert (card.sampling, card.as_published) == (model.proposed, model.sampling)
    tqdit.build(path, tmp_path / "text.engine", backend="onnxruntime")
    output = tmp_path / "e.json"
    line = [str(tmp_path / "text.engine"), "-n", "4", "--float-seeds", "0", "--metrics", "accuracy", "-o", str(output)]
    assert run("evaluate", line) == 0
    facts = json.loads(output.read_text())
    assert facts["extractor"]["name"] == "text judge"
    assert facts["subject"]["prompts"] == "; ".join(captions.draw_captions(4, held_out=True))
    assert facts["sets"]["subject"]["accuracy"]["value"] >= 0.75
    plain = shutil.copytree(tmp_path / "text.engine", tmp_path / "plain.engine")  # as one without --vae
    manifest = json.loads((plain / "manifest.json").read_text())
    (plain / "manifest.json").write_text(json.dumps(manifest | {"decoder": None}))
    assert run("evaluate", [*line, "--against", str(plain)]) == 0
    sets = json.loads(output.read_text())["sets"]
    assert sets["float"] == sets["subject"] == facts["sets"]["subject"]
