"""The training of the text demo: where it starts, that it resumes, and the pipeline that it writes."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tqdit.demo import captions
from tqdit.demo.text_judge import TextJudge
from tqdit.demo.weights import shipped
from tqdit.files import sha256

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
SCRIPTS = Path(__file__).parents[2] / "scripts"
CALL = {"num_inference_steps": 2, "use_resolution_binning": False, "max_sequence_length": captions.MAX_TOKENS}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    spec = importlib.util.spec_from_file_location("train_text_demo", SCRIPTS / "train_text_demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_freshly_made_networks_compute_zero(script):
    networks = script.make_networks(0, width=32, layers=1)
    ids, mask = script.tokenize(script.make_tokenizer(), ["a red A on blue", ""])
    x, t = torch.randn(2, 3, 24, 24), torch.tensor([0.2, 0.9])
    assert not networks(x, t, ids, mask).any()
    torch.nn.init.ones_(networks.transformer.proj_out.weight)
    assert networks(x, t, ids, mask).any()


def test_the_tokenizer_knows_each_caption_and_no_other_word(script):
    tokenizer = script.make_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("two bold green As on black").input_ids) == [
        "two", "bold", "green", "a", "s", "on", "black", "</s>",
    ]  # fmt: skip
    assert tokenizer.convert_ids_to_tokens(tokenizer("a zebra").input_ids) == ["<unk>", "</s>"]  # no article
    scenes = captions.draw_scenes(300, np.random.default_rng(0))
    texts = [captions.caption(scene, phrasing) for scene in scenes for phrasing in range(captions.PHRASINGS)]
    longest = max(texts, key=len)
    found = tokenizer(texts).input_ids
    assert tokenizer.unk_token_id not in {number for ids in found for number in ids}
    assert max(map(len, found)) <= captions.MAX_TOKENS, longest
    unused = {*tokenizer.convert_tokens_to_ids(["<pad>", "<unk>", "an"])}
    assert {number for ids in found for number in ids} == set(range(len(captions.MARKS + captions.WORDS))) - unused


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """Runs the script with tiny networks and few drawings; returns its folder."""
    draw = captions.draw_scenes
    monkeypatch.setattr(captions, "draw_scenes", lambda count, *rest, **more: draw(min(count, 32), *rest, **more))

    def call(what: str, folder: str = "run", *more: str) -> Path:
        sizes = ["--width", "32", "--layers", "1", "--batch", "8", "--pool", "16", "--judge-steps", "1"]
        looks = ["--look-images", "16", "--steps", "2", "--save-minutes", "0"]
        monkeypatch.setattr(sys, "argv", ["", what, "--folder", str(tmp_path / folder), *sizes, *looks, *more])
        script.main()
        return tmp_path / folder

    return call


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_same_weights(script, run, monkeypatch):
    def train(folder: str) -> dict[str, torch.Tensor]:
        return torch.load(run("model", folder, "--samples", "32") / "model.pt", weights_only=True)["ema"]

    whole = train("whole")
    loss_of, calls = script.loss_of, iter([False, False, True])

    def interrupted(*args):
        if next(calls):
            raise KeyboardInterrupt
        return loss_of(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "loss_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("resumed")
    resumed = train("resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(value.any() for name, value in whole.items() if name.endswith("proj_out.weight"))


@pytest.mark.slow
def test_the_package_is_a_pipeline_that_diffusers_runs_and_a_judge(run, tmp_path, capsys):
    import diffusers
    from safetensors.torch import load_file

    run("judge")
    out = capsys.readouterr().out
    assert all(f"'{name}': " in out for name in ("letter", "weight", "ink", "ground", "count", "place"))
    trained = torch.load(run("model", "run", "--samples", "16") / "model.pt", weights_only=True)["ema"]
    look = (tmp_path / "run" / "log.jsonl").read_text().splitlines()[0]
    assert json.loads(look)["recognised"].keys() == {"letter", "weight", "ink", "ground", "count", "place"}
    capsys.readouterr()
    run("package", "run", "--output", str(tmp_path))
    folder = tmp_path / "text"
    judge = load_file(folder / "judge.safetensors")
    assert judge.keys() == TextJudge().state_dict().keys()
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    torch.testing.assert_close(weights["proj_out.bias"], trained["transformer.proj_out.bias"].half())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('"text/')]
    assert len(lines) == sum(path.is_file() for path in folder.rglob("*"))
    assert f'"text/judge.safetensors": "{sha256(folder / "judge.safetensors")}",' in lines
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is diffusers.PixArtSigmaPipeline
    assert {pipeline.text_encoder.dtype, pipeline.transformer.dtype} == {torch.float32}
    images = pipeline(["a red A on blue", "two 7s"], output_type="np", clean_caption=False, **CALL).images
    assert images.shape == (2, captions.IMAGE_SIZE, captions.IMAGE_SIZE, 3)
    assert images.std() > 0


def test_the_shipped_weights_had_as_many_steps_as_the_script_takes(script):
    state = json.loads(shipped("text/training.json").read_text())
    assert state["step"] == script.SAMPLES // script.BATCH


def test_the_vae_computes_the_identity(script):
    vae, x = script.identity_vae(), torch.rand(2, 3, 24, 24) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(x).sample, x, rtol=0, atol=5e-5)
        torch.testing.assert_close(vae.encode(x).latent_dist.sample(), x, rtol=0, atol=5e-5)
