"""Where a checkpoint comes from decides things that its tensors do not say. This is the one place that lists them.

|                       | published (facebookresearch/DiT)      | diffusers (DiTTransformer2DModel)          |
|-----------------------|---------------------------------------|--------------------------------------------|
| timestep frequencies  | 10000 ** -(i / 128)                   | 10000 ** -(i / 127) (downscale_freq_shift) |
| eps of the MLP's norm | 1e-6                                  | 1e-5 (norm_eps of its config)              |
| embedders             | one timestep and one label embedder   | a copy of both in every block              |
| guidance moves        | the first 3 noise channels            | every noise channel                        |
| sampler               | DDPM, 250 steps, learned variance     | DDIM, 50 steps, variance unused            |
| timesteps of T steps  | round(linspace(0, 999, T))            | multiples of 1000 // T ("leading")         |
| latents               | VAE scale 0.18215                     | scaling_factor of its VAE's config         |

The frequencies alone move the 256-dim timestep embedding by up to 100 % (relative L2 at t = 999): a checkpoint must be
run with those that it was trained with, so each origin keeps its own. Guiding three of four channels is a known slip of
the published code, kept since the published numbers contain it.

Sources: facebookresearch/DiT models.py, diffusion/respace.py, sample.py; diffusers
models/transformers/dit_transformer_2d.py, models/embeddings.py, pipelines/dit/pipeline_dit.py,
schedulers/scheduling_ddim.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from tqdit.diffusion import SamplingSpec


@dataclass(frozen=True)
class Origin:
    """What a checkpoint of one origin needs beyond its tensors in order to sample as it would at home."""

    name: str
    frequency_shift: int
    mlp_norm_eps: float
    sampling: SamplingSpec
    guidance_scale: float  # classifier-free guidance that samples are drawn with by default
    latent_scale: float | None  # latents = scale * VAE code; None: the model works on images


PUBLISHED = Origin(
    name="published",
    frequency_shift=0,
    mlp_norm_eps=1e-6,
    sampling=SamplingSpec(steps=250, sampler="ddpm", spacing="linspace", guided_channels=3),
    guidance_scale=1.5,
    latent_scale=0.18215,
)
DIFFUSERS = Origin(
    name="diffusers",
    frequency_shift=1,
    mlp_norm_eps=1e-5,
    sampling=SamplingSpec(steps=50, sampler="ddim", spacing="leading", guided_channels=None),
    guidance_scale=4.0,
    latent_scale=0.18215,
)
DEMO = Origin(
    name="demo",
    frequency_shift=0,
    mlp_norm_eps=1e-6,
    sampling=SamplingSpec(steps=250, sampler="ddpm", spacing="linspace", guided_channels=None),
    guidance_scale=1.5,
    latent_scale=None,
)
