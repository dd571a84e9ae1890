"""Checkpoints of one's own through the whole flow, as their model cards tell.

Pixels of any number of channels, with and without classes, a null class and guidance, diffusion and flow.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import support
import tqdit
from tqdit.cli.main import main
from tqdit.engines.run.sampler import Sampler
from tqdit.errors import TqditWarning
from tqdit.models.dit import DiT, randomize
from tqdit.models.load import load_model
from tqdit.onnx_file import read_card
from tqdit.sampling.chains import Chains, run

pytestmark = pytest.mark.slow
SMALL = ["--preset", "tq-dit", "--steps", "4", "--groups", "2", "--rows-per-group", "2", "--chains", "1", "-q"]
OWN = {
    "grey, six classes, no null class": (1, 5, {"space": "pixels", "num_classes": 6}),
    "five channels, unconditional, flow": (
        5, None, {"space": "pixels", "process": {"type": "flow", "shift": 1.2}, "steps": 6},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_an_own_checkpoint_goes_through_the_whole_flow(name, tmp_path, monkeypatch, capsys):
    channels, classes, card = OWN[name]
    monkeypatch.chdir(tmp_path)
    config = replace(support.TINY, depth=1, in_channels=channels, out_channels=channels, num_classes=classes)
    torch.save(randomize(DiT(config), scale=0.2).state_dict(), "own.pt")
    (tmp_path / "own.json").write_text(json.dumps({"heads": 2, **card}))
    assert main(["calibrate", "own.pt", *SMALL]) == 0
    assert main(["export", "-q"]) == 0
    assert main(["build", "--backend", "onnxruntime", "-q"]) == 0
    outputs = ["samples.npz", "samples.png"]
    codes = [main(["sample", "-n", "6", "-q", "-o", output]) for output in outputs]
    said = capsys.readouterr().err.splitlines()
    if channels == 1:
        assert (codes, said) == ([0, 0], [])
        assert np.load("samples.npz")["arr_0"].shape == (6, 8, 8, 3)
        assert np.load("samples.npz")["arr_1"].tolist() == [0, 1, 2, 3, 4, 5]
    else:
        assert codes == [0, 1]
        assert len(said) == 1
        assert "states of shape (5, 8, 8)" in said[0]
        assert np.load("samples.npz")["latents"].shape == (6, 5, 8, 8)
    model = load_model("own.pt")
    chains = Chains(model.signature, model.guidance, 2)
    for image in range(2):
        request = {} if classes is None else {"class_labels": np.int64(5)}
        chains.add(model.sampling.choose(4).schedule, request, 1.0, 7, image)
    expected = run(chains, model)
    with Sampler.open("model.engine") as sampler:
        found = sampler.sample_latents(2 if classes is None else [5, 5], seed=7)
    assert np.linalg.norm(found - expected) < 0.2 * np.linalg.norm(expected)  # int8 against float


def test_a_network_in_memory_is_calibrated_and_exported(theirs, tmp_path):
    """As after a LoRA was merged; to the end of it, the module is the caller's."""
    names = [name for name, _ in theirs.named_modules()]
    table = tqdit.calibrate(theirs, preset="min-max", steps=4, groups=2, rows_per_group=2, chains=1)
    with pytest.warns(TqditWarning, match="4 steps of ddim; sampling 9 steps of ddim"):
        path = tqdit.export(theirs, tmp_path / "model.onnx", scales=table, steps=9)
    card = read_card(path)
    assert (card.fingerprint, card.model) == (table.fingerprint, "DiTTransformer2DModel in memory")
    assert (card.sampling.steps, card.quantization.sampling) == (9, card.sampling.choose(4))
    assert [name for name, _ in theirs.named_modules()] == names
