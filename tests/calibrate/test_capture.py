# ruff: noqa: ARG005 (hooks have a fixed signature)
"""Stage by stage equals the whole network, and the weights of HO are what they claim to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from tqdit.diffusion import step_coefficients

from support import tiny_model
from tqdit.calibrate import capture as capture_module
from tqdit.calibrate.capture import Samples, choose_heads, choose_tokens
from tqdit.calibrate.config import QuantizationConfig
from tqdit.calibrate.fisher import COTANGENTS, FISHERS, plain, step_weighted
from tqdit.calibrate.flow import Calibration
from tqdit.calibrate.rows import CalibrationRows
from tqdit.console import Console
from tqdit.models.loaded import LoadedModel
from tqdit.sampling.noise import normal

CONFIG = QuantizationConfig(
    steps=20, groups=2, rows_per_group=6, chains=2, guidance_scale=1.5, token_share=1.0, fisher="plain",
    patch="all", conditioning="all",
)  # fmt: skip


def capture(model: LoadedModel, config: QuantizationConfig, work: Path, rows: CalibrationRows | None = None) -> tuple[
    CalibrationRows, dict[str, Samples]
]:  # fmt: skip
    """The samples of every layer, without a search."""
    run = Calibration(model, config, work, Console(quiet=True), None)
    rows = rows or run.rows()
    run.forward(rows)
    samples = {}
    for stage in reversed(range(len(run.stages))):
        plans = tuple(plan for plan in run.plans if run.stages.of(plan.name) == stage)
        recorder = run._capture(model.network, stage, rows, plans)
        samples |= {plan.name: recorder.samples(plan.name) for plan in plans}
    return rows, samples


def whole_network_gradients(model: LoadedModel, rows: CalibrationRows, cotangent: Tensor) -> dict[str, Tensor]:
    """The gradient at every layer's output, by one backward pass through the whole network."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            outputs[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.network.named_modules()
               if name and not list(module.children())]  # fmt: skip
    with torch.enable_grad():
        result = model.network(rows.x, rows.timestep, rows.label)
        gradients = torch.autograd.grad(result, list(outputs.values()), cotangent, allow_unused=True)
    for handle in handles:
        handle.remove()
    return {name: g for name, g in zip(outputs, gradients, strict=True) if g is not None}


@pytest.mark.parametrize("fisher", ["plain", "step", "loss"])
def test_stages_pass_on_the_gradient_of_the_whole_network(tmp_path: Path, fisher: str) -> None:
    model, config = tiny_model(), replace(CONFIG, fisher=fisher)
    rows, samples = capture(model, config, tmp_path)
    output = model.network(rows.x, rows.timestep, rows.label)
    spec = replace(model.sampling, steps=20)
    cotangent = FISHERS[fisher](rows, torch.arange(len(rows)), output, spec, config.seed)
    expected = whole_network_gradients(model, rows, cotangent)
    assert len(samples) == 19
    for name, found in samples.items():
        g = expected[name]
        if name == "x_embedder.proj":
            g = g.flatten(2).transpose(1, 2)
        if name.endswith("scores"):
            g = g / 8**0.5  # the samples leave 1 / sqrt(d) out of the product
        tiny = 1e-6 * float(g.abs().max() ** 2)
        torch.testing.assert_close(found.g2.float().reshape(g.shape), g.square(), rtol=5e-3, atol=tiny)


def test_samples_multiply_to_the_layers_output(tmp_path: Path) -> None:
    model = tiny_model()
    rows, samples = capture(model, CONFIG, tmp_path)
    outputs: dict[str, Tensor] = {}
    for name in samples:
        model.network.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: outputs.update({name: o}))
    model.network(rows.x, rows.timestep, rows.label)
    for name, found in samples.items():
        module, z = model.network.get_submodule(name), outputs[name]
        if found.right is not None:
            product = found.left @ found.right * (8**-0.5 if name.endswith("scores") else 1)
        else:
            product = found.left @ module.weight.flatten(1).t() + module.bias
            z = z.flatten(2).transpose(1, 2) if z.ndim == 4 else z
        torch.testing.assert_close(product.reshape(z.shape), z, rtol=1e-4, atol=1e-5)
        low, high = found.ranges["left"]
        assert torch.equal(low.amin(), found.left.amin())
        assert torch.equal(high.amax(), found.left.amax())


def test_only_some_tokens_are_kept_but_ranges_are_those_of_all(tmp_path: Path) -> None:
    model = tiny_model()
    _, everything = capture(model, CONFIG, tmp_path / "a")
    _, some = capture(model, replace(CONFIG, token_share=0.25), tmp_path / "b")
    tokens = choose_tokens(12, 16, 0.25, seed=0)
    for name in ("blocks.0.mlp.fc1", "blocks.0.attn.scores"):
        full, part = everything[name], some[name]
        assert part.left.shape[-2] == 4
        for row in range(12):
            torch.testing.assert_close(part.left[row], full.left[row][..., tokens[row], :])
            torch.testing.assert_close(part.g2[row], full.g2[row][..., tokens[row], :])
        assert torch.equal(part.ranges["left"][0], full.ranges["left"][0])
    assert some["blocks.0.attn.scores"].right.shape == everything["blocks.0.attn.scores"].right.shape


def exact_diagonal(model: LoadedModel, rows: CalibrationRows, names: list[str]) -> dict[str, Tensor]:
    """diag(J^T J) of the predicted noise with respect to each layer's output, one row of J at a time."""
    one = replace(rows, **{name: tensor[:1] for name, tensor in rows.tensors().items()})
    total: dict[str, Tensor] = {}
    for element in range(4 * 8 * 8):
        cotangent = torch.zeros(1, 8, 8, 8).flatten()
        cotangent[element] = 1
        gradients = whole_network_gradients(model, one, cotangent.reshape(1, 8, 8, 8))
        for name in names:
            total[name] = total.get(name, 0) + gradients[name].square()
    return total


@pytest.mark.slow
def test_ho_weights_converge_to_the_diagonal_of_the_gauss_newton_matrix(tmp_path: Path) -> None:
    model = tiny_model()
    count = 400
    one = {"x": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), "noise": torch.zeros(1, 4, 8, 8),
           "timestep": torch.tensor([500]), "step": torch.tensor([10]), "label": torch.tensor([2]),
           "group": torch.tensor([0])}  # fmt: skip
    rows = CalibrationRows(
        **{name: tensor.repeat_interleave(count, 0) for name, tensor in one.items()},
        boundaries=torch.zeros(0, dtype=torch.int64),
    )
    names = ["blocks.0.mlp.fc1", "blocks.0.attn.qkv", "blocks.1.attn.proj", "final_layer.linear"]
    _, samples = capture(model, CONFIG, tmp_path, rows)
    for name, diagonal in exact_diagonal(model, rows, names).items():
        mean, exact = samples[name].g2.float().mean(0).flatten(), diagonal.flatten()
        assert abs(float(mean.sum() / exact.sum()) - 1) < 0.05
        seen = exact > 1e-3 * exact.max()
        # the mean of 400 squares of normal numbers is 7 % off, 5.6 % on average
        assert float((mean[seen] / exact[seen] - 1).abs().mean()) < 0.1, name


def test_cotangents_are_normal_on_the_noise_channels_and_belong_to_their_row() -> None:
    model = tiny_model()
    rows, spec = _rows(model), replace(model.sampling, steps=20)
    output = torch.zeros(6, 8, 8, 8)
    v = plain(rows, torch.arange(6), output, spec, seed=3)
    assert (v[:, 4:] == 0).all()
    np.testing.assert_array_equal(v[4, :4].numpy(), normal(3, COTANGENTS + 4, 0, (4, 8, 8)))
    assert torch.equal(plain(rows, torch.tensor([4]), output[:1], spec, 3)[0], v[4])
    from_eps = np.abs(step_coefficients(spec.schedule, spec.sampler).from_eps)
    scaled = step_weighted(rows, torch.arange(6), output, spec, 3)
    for row in range(6):
        torch.testing.assert_close(scaled[row], v[row] * float(from_eps[rows.step[row]]))


def test_the_error_against_the_float_output_would_give_no_weights_at_all() -> None:
    """Why it is not among the choices: where the rest of the network is float, its gradient is zero."""
    model = tiny_model()
    rows = _rows(model)
    output = model.network(rows.x, rows.timestep, rows.label)
    gradients = whole_network_gradients(model, rows, 2 * (output - output))
    assert all((g == 0).all() for g in gradients.values())
    spec = replace(model.sampling, steps=20)
    assert set(FISHERS) == {"step", "plain", "loss"}
    for fisher in FISHERS.values():
        assert fisher(rows, torch.arange(6), output, spec, 0)[:, :4].abs().mean() > 1e-3


def _rows(model: LoadedModel) -> CalibrationRows:
    step = torch.arange(0, 18, 3)
    timestep = torch.from_numpy(replace(model.sampling, steps=20).schedule.timesteps)[step]
    x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    none = torch.zeros(0, dtype=torch.int64)
    return CalibrationRows(x, timestep, step, torch.arange(6), torch.zeros(6, dtype=torch.int64), x.flip(0), none)


def test_only_some_heads_are_kept_the_same_ones_of_every_operand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    _, everything = capture(model, CONFIG, tmp_path / "a")
    monkeypatch.setattr(capture_module, "MOST_HEADS", 1)
    _, some = capture(model, CONFIG, tmp_path / "b")
    heads = choose_heads(12, 2, seed=0)[:, 0]
    assert set(heads.tolist()) == {0, 1}
    for name in ("blocks.0.attn.scores", "blocks.1.attn.value_product"):
        full, part = everything[name], some[name]
        for row, head in enumerate(heads):
            for a, b in ((part.left, full.left), (part.right, full.right), (part.g2, full.g2)):
                assert torch.equal(a[row, 0], b[row, head])
        for role in ("left", "right"):
            assert torch.equal(part.ranges[role][1], full.ranges[role][1])
