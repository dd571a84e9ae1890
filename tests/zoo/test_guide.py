"""The Python of docs/guides/any-pipeline.md runs as it stands, on a tiny pipeline of random weights."""

import re
from pathlib import Path

import diffusers
import numpy as np
import pytest

import tqdit
from zoo.pipelines import aura_flow

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "any-pipeline.md"
FLOW, NETWORK_ALONE, WITHOUT_PYTORCH = re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)


def small_pipeline():
    """Without text encoders: every call makes a small picture of the same embeddings, whatever the prompt."""
    pipeline, arguments = aura_flow()
    pipeline.register_modules(
        vae=diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2).eval()
    )
    kind = type(pipeline)

    def call(self, prompt, **more):
        return kind.__call__(self, **arguments, **more)

    pipeline.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.full  # `test_pipelines.py` takes the same steps of every family; torch needs half a minute for the trace
def test_a_pipeline_is_recorded_calibrated_and_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"pipeline": small_pipeline(), "prompts": ["a", "b"]}
    exec(FLOW, names)
    assert isinstance(names["pipeline"].transformer, tqdit.DropIn)
    requests = names["calls"].recording().requests
    names["text"], names["empty_text"] = requests["encoder_hidden_states"], requests["negative.encoder_hidden_states"]
    exec(WITHOUT_PYTORCH, names)
    pictures = names["pipeline"]("a", num_inference_steps=28, output_type="np").images
    assert names["images"].dtype == np.uint8
    assert names["images"].shape == (2, *pictures.shape[1:])


def test_a_network_is_recorded_alone():
    names = {"tqdit": tqdit, "pipeline": small_pipeline(), "prompts": ["a"]}
    exec(NETWORK_ALONE, names)
    assert len(names["calls"].recording()) >= 1
