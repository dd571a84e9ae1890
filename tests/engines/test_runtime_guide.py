"""The code in docs/runtime.md runs as it stands."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tqdit.engines import build_engine
from tqdit.export import ExportConfig, export_graph, write
from tqdit.models import load_model
from tqdit.models.dit import randomize

GUIDE = Path(__file__).parents[2] / "docs" / "runtime.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)

EXPECTED = [  # what a block leaves behind, and its shape
    {"images": (4, 8, 8, 3), "again": (1, 8, 8, 3)},
    {"image": (8, 8, 3)},
    {"images": (3, 8, 8, 3)},
    {"previews": (4, 8, 8, 3)},
    {"noise_pred": (2, 8, 8, 8)},
    {"pictures": (2, 8, 8, 3)},
]


@pytest.fixture(scope="module")
def place(bundle, tmp_path_factory):
    """A folder with the engines and the pipeline that the guide names."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("guide")
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    DiTPipeline(randomize(network, scale=0.2), vae, DDIMScheduler(clip_sample=False)).save_pretrained(
        folder / "DiT-XL-2-256"
    )
    (folder / "model.engine").symlink_to(bundle)
    model = load_model(str(folder / "DiT-XL-2-256"))
    write(folder / "denoiser.onnx", *export_graph(model, ExportConfig(graph="denoiser")))
    build_engine(folder / "denoiser.onnx", folder / "denoiser.engine")
    return folder


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers.*")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_the_guide_runs(place, number, monkeypatch):
    monkeypatch.chdir(place)
    names = {}
    exec(compile(BLOCKS[number], f"{GUIDE.name}, block {number}", "exec"), names)
    shapes = {name: np.shape(value) for name, value in names.items()}
    assert shapes.items() >= EXPECTED[number].items()
    if "again" in names:
        np.testing.assert_array_equal(names["again"], names["images"][2:3])


def test_the_guide_has_its_blocks():
    assert len(BLOCKS) == len(EXPECTED)
