"""Small models that take the whole flow in seconds."""

from __future__ import annotations

import functools
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from PIL import Image

from tqdit.card import GraphCard
from tqdit.diffusion import Float64, SamplingSpec, ddim_step, ddpm_step, guide
from tqdit.export import ExportConfig
from tqdit.export.graph import export_graph, finish_graph, trace_graph
from tqdit.models import LoadedModel
from tqdit.models.dit import DiT, DiTConfig, randomize
from tqdit.models.loaded import fingerprint
from tqdit.models.origins import DIFFUSERS, PUBLISHED, Origin
from tqdit.quantization.table import ScaleTable
from tqdit.sampling.noise import INITIAL, normal_rows

ORIGINS = {"published": PUBLISHED, "diffusers": DIFFUSERS}
TINY = DiTConfig(
    input_size=8, patch_size=2, in_channels=4, out_channels=8, hidden_size=16, depth=2, mlp_hidden_size=64,
    num_classes=5, num_heads=2,
)  # fmt: skip


def tiny_model(origin: str = "published", steps: int = 20, pixels: bool = False, seed: int = 0) -> LoadedModel:
    """Two blocks of width 16 with random non-zero weights, with every peculiarity of its origin."""
    facts: Origin = ORIGINS[origin]
    channels = 3 if pixels else 4
    config = replace(
        TINY,
        in_channels=channels,
        out_channels=2 * channels,
        frequency_shift=facts.frequency_shift,
        mlp_norm_eps=facts.mlp_norm_eps,
        embedders_per_block=origin == "diffusers",
    )
    network = randomize(DiT(config), seed, scale=0.2).eval().requires_grad_(False)
    return LoadedModel(
        network=network,
        in_channels=channels,
        out_channels=2 * channels,
        height=8,
        width=8,
        num_classes=5,
        origin=origin,
        source="tiny",
        fingerprint=fingerprint(network, config),
        sampling=replace(facts.sampling, steps=steps),
        guidance_scale=facts.guidance_scale,
        latent_scale=None if pixels else facts.latent_scale,
    )


DEFAULT = ExportConfig()


@functools.cache
def traced(config: ExportConfig, origin: str, steps: int, pixels: bool, seed: int) -> tuple[LoadedModel, ir.Model]:
    """A tiny model and its float trace; cached, since torch needs seconds to trace even this."""
    model = tiny_model(origin, steps, pixels, seed)
    return model, trace_graph(model, config)


def exported(
    config: ExportConfig = DEFAULT,
    origin: str = "published",
    steps: int = 20,
    pixels: bool = False,
    seed: int = 0,
    table: ScaleTable | None = None,
) -> tuple[ir.Model, GraphCard]:
    """A tiny model's graph and card, float or quantized."""
    model, trace = traced(replace(config, attention="simulated"), origin, steps, pixels, seed)
    if table is not None and any(site.divisor is not None for site in table.sites):
        return export_graph(model, config, table)
    return finish_graph(trace.clone(), model, config, table)


def reference_step(
    model: LoadedModel, spec: SamplingSpec, x: Float64, step: np.ndarray, labels: np.ndarray, scale: np.ndarray | None,
    noise: np.ndarray,
) -> Float64:  # fmt: skip
    """One step as the papers write it: the PyTorch network in float32, everything else in float64 NumPy."""

    def network(y: np.ndarray) -> Float64:
        with torch.no_grad():
            timestep = torch.from_numpy(spec.schedule.timesteps[step])
            return model.network(torch.from_numpy(x).float(), timestep, torch.from_numpy(y)).double().numpy()

    output = network(labels)
    if scale is not None:
        channels = model.in_channels if spec.guided_channels is None else spec.guided_channels
        output = guide(output, network(np.full_like(labels, model.num_classes)), scale, channels)
    if spec.sampler == "ddim":
        return ddim_step(spec.schedule, x, output, step)
    return ddpm_step(spec.schedule, x, output, step, noise)


def reference_chain(
    model: LoadedModel, spec: SamplingSpec, labels: np.ndarray, scale: float | None, seed: int
) -> Float64:
    """A whole chain of reference steps from the project's own noise."""
    shape, images = (model.in_channels, model.height, model.width), np.arange(len(labels))
    x = normal_rows(seed, images, INITIAL, shape).astype(np.float64)
    scales = None if scale is None else np.full(len(labels), scale)
    for step in reversed(range(spec.steps)):
        noise = normal_rows(seed, images, step, shape)
        x = reference_step(model, spec, x, np.full(len(labels), step), labels, scales, noise)
    return x


def read_picture(path: Path | str) -> np.ndarray:
    """A PNG as uint8 (H, W, 3), with its file closed again."""
    with Image.open(path) as image:
        return np.asarray(image)


def assert_agrees(out: np.ndarray, expected: np.ndarray) -> None:
    """Images agree to 1e-5 of the largest value, but for at most one in twelve, which may be 3 % off (relative L2).

    Quantized graphs agree bit for bit or nearly so, except where the last bit of a float operation decides a rounding
    tie: then one code of that image is the neighbouring one.
    """
    off = np.abs(out - expected).reshape(len(out), -1).max(axis=1) > 1e-5 * np.abs(expected).max()
    assert off.sum() <= max(1, len(out) // 12)
    for row in np.flatnonzero(off):
        assert np.linalg.norm(out[row] - expected[row]) <= 0.03 * np.linalg.norm(expected[row])


def listen_to_ctrl_c() -> None:
    """For `preexec_fn`: a shell's background job, as this test run may be one, has its children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
