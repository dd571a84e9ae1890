"""Files, engine bundles and a pipeline of tiny models."""

from pathlib import Path

import pytest

import support
from tables import Kind, make_table
from tqdit.engines import backends

TOYS = Path(__file__).parents[1] / "toys" / "backends"


@pytest.fixture
def quantized(tmp_path):
    """A W8A8 file of a pixel model, ten groups of timesteps, free to be changed."""
    from tqdit.exporter.onnx_writer import write

    path = tmp_path / "model.onnx"
    write(path, *support.exported(pixels=True, table=make_table(support.tiny_model(pixels=True), Kind(groups=10))))
    return path


@pytest.fixture
def plain_backend(monkeypatch):
    """The backend `plain` of tests/toys/backends."""
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(TOYS)])


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory):
    """A diffusers pipeline of random weights, DiT-XL-2-256, and the engine of its transformer, which has forecasts."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    from tqdit.engines.build.engine import build_engine
    from tqdit.exporter.graph import ExportConfig, export_graph
    from tqdit.exporter.onnx_writer import write
    from tqdit.models.dit import randomize
    from tqdit.models.load import load_model

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
    write(folder / "dit.onnx", *export_graph(model, ExportConfig(forecast=True)))
    build_engine(folder / "dit.onnx", folder / "dit.engine")
    return folder
