"""The Python of the guides runs as it stands, and every command in them is spelled right."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from tqdit import cli
from tqdit.engines import build_engine
from tqdit.export import ExportConfig, export_graph, write
from tqdit.models import load_model
from tqdit.models.dit import randomize

DOCS = Path(__file__).parents[2] / "docs"
PYTHON = re.findall(r"```python\n(.*?)```", (DOCS / "guides" / "diffusers-pipeline.md").read_text("utf-8"), re.DOTALL)
PAGES = [*sorted((DOCS / "guides").glob("*.md")), DOCS / "sampling-many.md"]
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for line in re.findall(r"^ *(tqdit-[a-z]+ .*)$", page.read_text("utf-8"), re.MULTILINE)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny pipeline of random weights and the engine of its transformer."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("guide")
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    pipeline = DiTPipeline(randomize(network, scale=0.2), vae, DDIMScheduler(clip_sample=False))
    pipeline.save_pretrained(folder / "DiT-XL-2-256")
    model = load_model(str(folder / "DiT-XL-2-256"))
    write(folder / "denoiser.onnx", *export_graph(model, ExportConfig(graph="denoiser")))
    build_engine(folder / "denoiser.onnx", folder / "denoiser.engine")
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")
def test_the_python_of_the_diffusers_guide_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    names = {}
    for number, block in enumerate(PYTHON):
        exec(compile(block, f"block {number}", "exec"), names)
    assert np.shape(names["pictures"]) == (2, 8, 8, 3)
    assert 0 < names["distance"] < 1e-4  # a float32 engine: as in test_diffusers
    assert len(PYTHON) == 2


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}-{n}" for n, (page, _) in enumerate(COMMANDS)])
def test_a_command_of_the_guides_is_one_that_we_take(page, line, monkeypatch):
    """Its arguments parse; running them needs published weights (docs/guides say what was run)."""
    verb, *arguments = shlex.split(line, comments=True)
    taken = []
    module = cli._load(verb.removeprefix("tqdit-"))
    monkeypatch.setattr(module, "run", lambda *arguments: taken.append(arguments))
    assert cli.run(verb.removeprefix("tqdit-"), arguments) == 0
    assert len(taken) == 1
