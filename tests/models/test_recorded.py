"""Directories of pipelines, and of other transformers of diffusers, before their calls are recorded."""

import diffusers
import pytest
import torch

import support
from tqdit.errors import CheckpointError
from tqdit.models import directories
from tqdit.models.directories import open_for_prompts, open_pipeline
from tqdit.models.weights import IN_MEMORY
from zoo.pipelines import vae

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")


@pytest.fixture
def saved(tmp_path):
    """A pipeline in half precision, and the directory where it was saved as a variant."""
    pipeline = diffusers.DiTPipeline(support.diffusers_dit().half(), vae().half(), diffusers.DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "pipeline", variant="fp16")
    return pipeline, tmp_path / "pipeline"


def test_a_pipeline_saved_as_a_variant_opens_in_float32(saved):
    pipeline, folder = saved
    assert (folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    found, expected = open_pipeline(str(folder)).transformer.state_dict(), pipeline.transformer.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in expected.items())


def test_a_pipeline_with_a_link_out_of_its_directory_is_refused(saved, tmp_path):
    _, folder = saved
    weights = folder / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    weights.symlink_to(weights.rename(tmp_path / "secret"))
    with pytest.raises(CheckpointError, match=r"vae/diffusion_pytorch_model\.fp16\.safetensors: a link to '.*secret'"):
        open_pipeline(str(folder))


def test_a_large_pipeline_of_another_network_is_left_to_the_recorder_to_refuse(tmp_path, monkeypatch):
    """Which names its parts."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"12345678")
    monkeypatch.setattr(directories, "MOST_LOADED", 4)
    monkeypatch.setattr(directories, "open_pipeline", lambda folder: f"the pipeline of {folder}")
    assert open_for_prompts(str(tmp_path)) == (f"the pipeline of {tmp_path}", IN_MEMORY)
