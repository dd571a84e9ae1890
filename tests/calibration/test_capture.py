"""What one forward and one backward pass record is what autograd gives, and the weights of HO are what they claim."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import Convolutions, Folded, Tokens, described
from support import few, tiny_model
from tqdit.calibration import capture as capture_module
from tqdit.calibration.capture import Picker, Samples, choose
from tqdit.calibration.config import QuantizationConfig
from tqdit.calibration.fisher import COTANGENTS, FISHERS, guided, plain, step_weighted
from tqdit.calibration.flow import Calibration
from tqdit.calibration.layers import OperandPlan, plan
from tqdit.calibration.operands import Activation
from tqdit.calibration.rows import CalibrationRows, sampling_of
from tqdit.console import Console
from tqdit.errors import OutputError
from tqdit.models.loaded import LoadedModel
from tqdit.models.products import find_products
from tqdit.ports import Port, Signature
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.noise import normal
from tqdit.sampling.process import Diffusion
from tqdit.sampling.schedule import SamplingSpec

pytestmark = pytest.mark.slow

CONFIG = QuantizationConfig(
    steps=20, groups=2, rows_per_group=6, chains=2, guidance_scale=1.5, token_share=1.0, fisher="plain",
    patch="all", conditioning="all",
)  # fmt: skip


def capture(
    model: LoadedModel, config: QuantizationConfig, work: Path, rows: CalibrationRows | None = None
) -> tuple[CalibrationRows, dict[str, Samples]]:
    """The samples of every product, without a search."""
    run = Calibration(model, config, work, Console(quiet=True))
    rows = rows or run.rows()
    captured = run.capture(model, rows, run.plans)
    return rows, {plan.name: captured.samples(plan.name) for plan in run.plans}


class Handwritten(nn.Module):
    """Tokens through an embedding, an attention and a gated sum; `shared` is called twice, `unused` without effect."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(3, 8), nn.Linear(1, 8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.shared, self.unused, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.embed(x.transpose(1, 2)) + self.time(t[:, None] / 1000)[:, None]
        q, k, v = (linear(h).unflatten(-1, (2, 4)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        self.unused(attended)
        result: Tensor = self.out(self.shared(F.silu(self.shared(attended)))).transpose(1, 2)
        return result


def handwritten() -> LoadedModel:
    torch.manual_seed(1)
    network = Handwritten().eval().requires_grad_(False)
    signature = Signature(
        (Port("x", "state", "float32", (None, 3, 6)), Port("t", "time", "float32", (None,))), (None, 3, 6), "Hand"
    )
    example = {name: torch.from_numpy(array) for name, array in signature.zeros(2).items()}
    return replace(
        tiny_model(), network=network, signature=signature, guidance=None, products=find_products(network, example),
        sampling=SamplingSpec(Diffusion(), "ddpm", 20),
    )  # fmt: skip


def by_hand(network: Handwritten, x: Tensor, t: Tensor, cotangent: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """product -> (left operand, gradient at its output), in float64 with matrices written out."""
    w = {name: tensor.double() for name, tensor in network.named_parameters()}

    def linear(name: str, x: Tensor) -> Tensor:
        z = x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))
        return keep(name, x, z)

    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, left: Tensor, z: Tensor) -> Tensor:
        z.requires_grad_()
        seen[name if name not in seen else f"{name} again"] = left, z
        return z

    h = linear("embed", x.double().transpose(1, 2)) + linear("time", t.double()[:, None] / 1000)[:, None]
    q, k, v = (linear(name, h).reshape(len(x), 6, 2, 4).permute(0, 2, 1, 3) for name in "qkv")
    scores = keep("sdpa.scores", q, q @ k.mT / 2)  # sqrt(4)
    probabilities = scores.exp() / scores.exp().sum(-1, keepdim=True)
    attended = keep("sdpa.value_product", probabilities, probabilities @ v)
    first = linear("shared", attended.permute(0, 2, 1, 3).reshape(len(x), 6, 8))
    out = linear("out", linear("shared", first / (1 + (-first).exp()))).transpose(1, 2)
    gradients = torch.autograd.grad(out, [z for _, z in seen.values()], cotangent.double())
    return {name: (left, g) for (name, (left, _)), g in zip(seen.items(), gradients, strict=True)}


def test_one_pass_records_what_autograd_gives_on_a_network_written_by_hand(tmp_path: Path) -> None:
    model = handwritten()
    config = replace(CONFIG, guidance_scale=None)
    inputs = {"x": torch.randn(5, 3, 6), "t": torch.tensor([0.0, 210.0, 480.0, 700.0, 999.0])}
    none = torch.zeros(5, dtype=torch.int64)
    rows = CalibrationRows(inputs, none, none, torch.zeros(5, 3, 6), torch.zeros(0, dtype=torch.float64))
    _, samples = capture(model, config, tmp_path, rows)
    cotangent = plain(rows, torch.arange(5), torch.zeros(5, 3, 6), model, config)
    network = model.network
    assert isinstance(network, Handwritten)
    expected = by_hand(network, rows.inputs["x"], rows.inputs["t"], cotangent)
    assert set(samples) == {name for name in expected if name != "shared again"}  # and `unused` is not there
    for name, found in samples.items():
        left, g = expected[name]
        if name == "shared":  # the tokens of both calls
            left, g = (torch.cat(pair, 1) for pair in zip(expected[name], expected["shared again"], strict=True))
        if name == "time":
            left, g = left[:, None], g[:, None]
        if name == "sdpa.scores":
            g = g / 2  # the samples leave 1 / sqrt(d) out of the product
        torch.testing.assert_close(found.left.double(), left, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.g2.double(), g.square(), rtol=8e-3, atol=1e-6 * float(g.abs().max()) ** 2)
        low, high = found.ranges["left"]
        torch.testing.assert_close(low.double(), left.flatten(1).amin(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(high.double(), left.flatten(1).amax(1), rtol=1e-4, atol=1e-5)


def test_samples_of_a_convolution_are_its_patches(tmp_path: Path) -> None:
    model = described(Convolutions(), (4, 2, 4, 7))
    none = torch.zeros(5, dtype=torch.int64)
    inputs = {"x": torch.randn(5, 4, 2, 4, 7), "sigma": torch.rand(5)}
    rows = CalibrationRows(inputs, none, none, torch.zeros(5, 4, 2, 4, 7), torch.zeros(0, dtype=torch.float64))
    config = replace(CONFIG, steps=10, guidance_scale=None)
    outputs: dict[str, Tensor] = {}
    for name in ("patches", "expand", "pairs"):
        hook = partial(outputs.__setitem__, name)
        model.network.get_submodule(name).register_forward_hook(lambda _m, _i, output, hook=hook: hook(output.detach()))
    _, samples = capture(model, config, tmp_path, rows)
    for name, output in outputs.items():
        module, found = model.network.get_submodule(name), samples[name]
        product = found.left @ module.weight.flatten(1).t()
        product = product if module.bias is None else product + module.bias
        torch.testing.assert_close(product, output.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
        assert found.g2.shape == product.shape


class Padded(nn.Module):
    """Attention to words, of which a mask leaves some out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        text = self.embed(words)
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in (self.q(x), self.k(text), self.v(text)))
        return F.scaled_dot_product_attention(q, k, v, mask[:, None, None]).transpose(1, 2).flatten(2)


def test_tokens_without_a_gradient_are_left_out_of_ranges(tmp_path: Path) -> None:
    words, mask = Port("words", "request", "float32", (None, 4, 8)), Port("mask", "request", "bool", (None, 4))
    model = described(Tokens(Padded()), (4, 6), words, mask)
    inputs = {"x": torch.randn(5, 4, 6), "sigma": torch.rand(5), "words": torch.randn(5, 4, 8)}
    inputs["mask"] = torch.ones(5, 4, dtype=torch.bool)
    inputs["mask"][1:, 2:] = False
    none = torch.zeros(5, dtype=torch.int64)
    loud = inputs["words"].masked_fill(~inputs["mask"][:, :, None], 1e3)
    found = []
    for number, padding in enumerate((inputs["words"] * inputs["mask"][:, :, None], loud)):
        rows = CalibrationRows({**inputs, "words": padding}, none, none, torch.zeros(5, 4, 6), torch.zeros(0).double())
        config = replace(CONFIG, steps=10, guidance_scale=None)
        _, samples = capture(model, config, tmp_path / str(number), rows)
        found.append(samples)
    quiet, loud_samples = found
    for name in ("body.embed", "body.k", "body.v", "body.sdpa.scores", "body.sdpa.value_product"):
        for role, (low, high) in quiet[name].ranges.items():
            assert float(high.max()) < 20
            torch.testing.assert_close(loud_samples[name].ranges[role], (low, high))
    torch.testing.assert_close(loud_samples["body.k"].channels, quiet["body.k"].channels)


def test_products_on_folded_rows_are_recorded_by_rows(tmp_path: Path) -> None:
    model = described(Tokens(Folded()), (4, 6), Port("text", "request", "float32", (None, 5, 8)))
    inputs = {"x": torch.randn(4, 4, 6), "sigma": torch.rand(4), "text": torch.randn(4, 5, 8)}
    none = torch.zeros(4, dtype=torch.int64)
    rows = CalibrationRows(inputs, none, none, torch.zeros(4, 4, 6), torch.zeros(0, dtype=torch.float64))
    config = replace(CONFIG, steps=10, groups=2, guidance_scale=None, time_groups="all")
    plans = {each.name: each.operands for each in plan(model, config)}
    _, samples = capture(model, config, tmp_path, rows)
    assert samples["body.words"].left.shape == (4, 5, 8)
    assert samples["body.qkv"].left.shape == (4, 6, 16)  # two frames of three tokens
    assert samples["body.sdpa.scores"].left.shape == (4, 4, 3, 8)  # two frames with two heads
    assert samples["body.sdpa.scores"].g2.shape == (4, 4, 3, 3)
    folded = {product.name for product in model.products if product.folded}
    for name, operands in plans.items():
        scales = {role: operand.scales for role, operand in operands.items() if role != "weight"}
        assert set(scales.values()) == {1 if name in folded else 2}, name


def gradients_of(model: LoadedModel, inputs: dict[str, Tensor], cotangent: Tensor) -> dict[str, list[Tensor]]:
    """The gradients at every call of every leaf module, by hooks of the test's own."""
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            outputs.append((name, output))

        return hook

    leaves = [(name, module) for name, module in model.network.named_modules() if name and not list(module.children())]
    handles = [module.register_forward_hook(keep(name)) for name, module in leaves]
    with torch.enable_grad():
        result = model.call(inputs)
        gradients = torch.autograd.grad(result, [z for _, z in outputs], cotangent, allow_unused=True)
    for handle in handles:
        handle.remove()
    found: dict[str, list[Tensor]] = {}
    for (name, z), g in zip(outputs, gradients, strict=True):
        found.setdefault(name, []).append(torch.zeros_like(z) if g is None else g)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("origin", few(["published", "diffusers"], "published"))
@pytest.mark.parametrize("fisher", ["plain", "step", "guided", "loss"])
def test_samples_hold_the_gradients_of_the_whole_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fisher: str, origin: str
) -> None:
    monkeypatch.setattr(capture_module, "MOST_ROWS", 5)  # three batches
    model, config = tiny_model(origin), replace(CONFIG, fisher=fisher)
    rows, samples = capture(model, config, tmp_path)
    output = model.call(rows.inputs)
    cotangent = FISHERS[fisher](rows, torch.arange(len(rows)), output, model, config)
    expected = gradients_of(model, rows.inputs, cotangent)
    assert set(samples) == {product.name for product in model.products}
    for name, found in samples.items():
        calls = expected[name]
        if isinstance(model.network.get_submodule(name), nn.Conv2d):
            calls = [g.flatten(2).transpose(1, 2) for g in calls]
        g = torch.cat([g.reshape(len(rows), *found.g2.shape[1:-2], -1, g.shape[-1]) for g in calls], dim=-2)
        if name.endswith("scores"):
            g = g / 8**0.5  # the samples leave 1 / sqrt(d) out of the product
        assert found.g2.shape == g.shape
        tiny = 1e-6 * float(g.abs().max() ** 2)
        torch.testing.assert_close(found.g2.float(), g.square(), rtol=5e-3, atol=tiny)


@pytest.mark.parametrize("origin", ["published", "diffusers"])
def test_samples_multiply_to_the_products_output(tmp_path: Path, origin: str) -> None:
    model = tiny_model(origin)
    rows, samples = capture(model, CONFIG, tmp_path)
    outputs: dict[str, list[Tensor]] = {name: [] for name in samples}
    for name in samples:
        model.network.get_submodule(name).register_forward_hook(lambda _m, _i, o, name=name: outputs[name].append(o))
    model.call(rows.inputs)
    for name, found in samples.items():
        module = model.network.get_submodule(name)
        if found.right is not None:
            product = found.left @ found.right * (8**-0.5 if name.endswith("scores") else 1)
        else:
            product = found.left @ module.weight.flatten(1).t() + module.bias
        calls = [z.flatten(2).transpose(1, 2) if isinstance(module, nn.Conv2d) else z for z in outputs[name]]
        z = torch.cat([z.reshape(*product.shape[:-2], -1, product.shape[-1]) for z in calls], dim=-2)
        torch.testing.assert_close(product, z, rtol=1e-4, atol=1e-5)
        low, high = found.ranges["left"]
        assert torch.equal(low.amin(), found.left.amin())
        assert torch.equal(high.amax(), found.left.amax())


def test_a_layer_that_is_called_twice_has_the_tokens_of_both_calls(tmp_path: Path) -> None:
    """diffusers' DiT calls the first block's embedders again before its last layer."""
    rows, samples = capture(tiny_model("diffusers"), CONFIG, tmp_path)
    embedder = "transformer_blocks.{}.norm1.emb.timestep_embedder.linear_1"
    assert samples[embedder.format(0)].left.shape == (len(rows), 2, 256)
    assert samples[embedder.format(0)].g2.shape[1] == 2
    assert samples[embedder.format(1)].left.shape == (len(rows), 1, 256)
    assert samples[embedder.format(0)].ranges["left"][0].shape == (len(rows),)


def test_only_some_tokens_are_kept_but_ranges_are_those_of_all(tmp_path: Path) -> None:
    model = tiny_model()
    _, everything = capture(model, CONFIG, tmp_path / "a")
    _, some = capture(model, replace(CONFIG, token_share=0.25), tmp_path / "b")
    tokens = choose(12, 16, 4, seed=0)
    for name in ("blocks.0.mlp.fc1", "blocks.0.attn.scores"):
        full, part = everything[name], some[name]
        assert part.left.shape[-2] == 4
        for row in range(12):
            torch.testing.assert_close(part.left[row], full.left[row][..., tokens[row], :])
            torch.testing.assert_close(part.g2[row], full.g2[row][..., tokens[row], :])
        assert torch.equal(part.ranges["left"][0], full.ranges["left"][0])
    channels = everything["blocks.0.mlp.fc1"].channels
    assert channels is not None
    assert torch.equal(channels[1], everything["blocks.0.mlp.fc1"].left.amax(1))
    partial = some["blocks.0.mlp.fc1"].channels
    assert partial is not None
    assert torch.equal(channels[0], partial[0])
    right = some["blocks.0.attn.scores"].right, everything["blocks.0.attn.scores"].right
    assert right[0] is not None
    assert right[1] is not None
    assert torch.equal(*right)


def exact_diagonal(model: LoadedModel, inputs: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """diag(J^T J) of the prediction with respect to each layer's output, one row of J at a time."""
    total: dict[str, Tensor] = {}
    for element in range(4 * 8 * 8):
        cotangent = torch.zeros(1, 8, 8, 8).flatten()
        cotangent[element] = 1
        gradients = gradients_of(model, inputs, cotangent.reshape(1, 8, 8, 8))
        for name in names:
            total[name] = total.get(name, 0) + gradients[name][0].square()
    return total


def test_ho_weights_converge_to_the_diagonal_of_the_gauss_newton_matrix(tmp_path: Path) -> None:
    model = tiny_model()
    count = 400
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    one = {"x": x, "timestep": torch.tensor([500]), "class_labels": torch.tensor([2])}
    rows = CalibrationRows(
        {name: tensor.repeat_interleave(count, 0) for name, tensor in one.items()},
        torch.full((count,), 10), torch.zeros(count, dtype=torch.int64), torch.zeros(count, 4, 8, 8),
        boundaries=torch.zeros(0, dtype=torch.float64),
    )  # fmt: skip
    names = ["blocks.0.mlp.fc1", "blocks.0.attn.qkv", "blocks.1.attn.proj", "final_layer.linear"]
    _, samples = capture(model, CONFIG, tmp_path, rows)
    for name, diagonal in exact_diagonal(model, one, names).items():
        mean, exact = samples[name].g2.float().mean(0).flatten(), diagonal.flatten()
        assert abs(float(mean.sum() / exact.sum()) - 1) < 0.05
        seen = exact > 1e-3 * exact.max()
        # the mean of 400 squares of normal numbers is 7 % off, 5.6 % on average
        assert float((mean[seen] / exact[seen] - 1).abs().mean()) < 0.1, name


def test_cotangents_are_normal_on_the_prediction_and_belong_to_their_row() -> None:
    model = tiny_model()
    rows, config = _rows(model), QuantizationConfig(steps=20, seed=3)
    output = torch.zeros(6, 8, 8, 8)
    v = plain(rows, torch.arange(6), output, model, config)
    assert (v[:, 4:] == 0).all()
    np.testing.assert_array_equal(v[4, :4].numpy(), normal(3, COTANGENTS + 4, 0, (4, 8, 8)))
    assert torch.equal(plain(rows, torch.tensor([4]), output[:1], model, config)[0], v[4])
    scaled, schedule = step_weighted(rows, torch.arange(6), output, model, config), sampling_of(model, config).schedule
    for row in range(6):
        factor = abs(float(schedule.output_weights[rows.step[row], 0]))
        torch.testing.assert_close(scaled[row], v[row] * factor)


@pytest.mark.parametrize(("scale", "channels"), [(5.0, None), (1.5, 3), (1.0, None)])
def test_a_row_counts_as_much_as_its_prediction_moves_the_next_state(scale: float, channels: int | None) -> None:
    """Against NumPy: step and guidance of a pair, with an error of one of its rows."""
    guidance = Guidance(2.0, channels)
    model, index = replace(tiny_model(), guidance=guidance), torch.arange(6)
    rows, config = _rows(model), QuantizationConfig(steps=20, guidance_scale=scale)
    output = torch.zeros(6, 8, 8, 8)
    v = plain(rows, index, output, model, config).numpy()
    schedule = sampling_of(model, config).schedule
    expected = np.zeros_like(v)
    for row in range(6):
        pair, moved = np.zeros((2, 8, 8, 8), np.float32), np.zeros((1, 4, 8, 8), np.float32)
        pair[row % 2] = v[row]
        guidance.combine(pair, np.array([scale], np.float32), moved)
        expected[row, :4] = moved[0] * schedule.error_weights[int(rows.step[row])] * (-1) ** (row % 2 and scale > 1)
    for part in (index, index[3:5]):  # whatever the batch
        found = guided(rows, part, output[: len(part)], model, config)
        np.testing.assert_allclose(found.numpy(), expected[part], rtol=1e-5, atol=1e-6)
    unguided = replace(model, guidance=None), replace(config, guidance_scale=None)
    assert torch.equal(guided(rows, index, output, *unguided), step_weighted(rows, index, output, *unguided))


def test_the_error_against_the_float_output_would_give_no_weights_at_all() -> None:
    """Why it is not among the choices: where the rest of the network is float, its gradient is zero."""
    model = tiny_model()
    rows = _rows(model)
    output = model.call(rows.inputs)
    gradients = gradients_of(model, rows.inputs, 2 * (output - output))
    assert all((g == 0).all() for calls in gradients.values() for g in calls)
    config = QuantizationConfig(steps=20).for_model(model)
    assert set(FISHERS) == {"guided", "step", "plain", "loss"}
    for fisher in FISHERS.values():
        assert fisher(rows, torch.arange(6), output, model, config)[:, :4].abs().mean() > 1e-3


def _rows(model: LoadedModel) -> CalibrationRows:
    step = torch.arange(0, 18, 3)
    timestep = torch.from_numpy(model.sampling.choose(20).schedule.timesteps)[step].long()
    x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    inputs = {"x": x, "timestep": timestep, "class_labels": torch.arange(6) % 5}
    return CalibrationRows(
        inputs, step, torch.zeros(6, dtype=torch.int64), x.flip(0), torch.zeros(0, dtype=torch.float64)
    )


def test_only_some_heads_are_kept_the_same_ones_of_every_operand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    _, everything = capture(model, CONFIG, tmp_path / "a")
    monkeypatch.setattr(capture_module, "MOST_HEADS", 1)
    _, some = capture(model, CONFIG, tmp_path / "b")
    heads = choose(12, 2, 1, seed=1)[:, 0]
    assert set(heads.tolist()) == {0, 1}
    for name in ("blocks.0.attn.scores", "blocks.1.attn.value_product"):
        full, part = everything[name], some[name]
        assert part.right is not None
        assert full.right is not None
        for row, head in enumerate(heads):
            for a, b in ((part.left, full.left), (part.right, full.right), (part.g2, full.g2)):
                assert torch.equal(a[row, 0], b[row, head])
        for role in ("left", "right"):
            assert torch.equal(part.ranges[role][1], full.ranges[role][1])


def test_many_rows_of_long_sequences_keep_fewer_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HEAD_ELEMENTS bounds what K and V of all rows take."""
    monkeypatch.setattr(capture_module, "HEAD_ELEMENTS", 12 * 16 * 8)  # rows, tokens, size of a head
    monkeypatch.setattr(capture_module, "LEAST_PAIRS", 1)
    _, samples = capture(tiny_model(), CONFIG, tmp_path)
    right = samples["blocks.0.attn.scores"].right
    assert right is not None
    assert right.shape == (12, 1, 8, 16)


@pytest.mark.parametrize("most_rows", few([1, 5, 64], 5))
def test_sequences_too_long_for_a_head_of_every_row_keep_some_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_rows: int
) -> None:
    monkeypatch.setattr(capture_module, "MOST_ROWS", most_rows)  # batches without a kept row among them
    model = tiny_model()
    rows, everything = capture(model, CONFIG, tmp_path / "a")
    monkeypatch.setattr(capture_module, "HEAD_ELEMENTS", 1)
    monkeypatch.setattr(capture_module, "LEAST_PAIRS", 4)
    _, some = capture(model, CONFIG, tmp_path / "b", rows)
    heads = choose(12, 2, 1, seed=1)[:, 0]
    for name in ("blocks.0.attn.scores", "blocks.1.attn.value_product"):
        full, part = everything[name], some[name]
        assert part.rows is not None
        assert part.right is not None
        assert full.right is not None
        assert len(part.left) == len(part.right) == len(part.g2) == 4
        assert (part.rows // 3).tolist() == [0, 1, 2, 3]  # spread over the groups
        for place, row in enumerate(part.rows):
            for a, b in ((part.left, full.left), (part.right, full.right), (part.g2, full.g2)):
                assert torch.equal(a[place, 0], b[row, heads[row]])
        for role in ("left", "right"):  # the ranges are those of all rows
            assert torch.equal(part.ranges[role][1], full.ranges[role][1])
    assert some["blocks.0.mlp.fc1"].rows is None


def test_rows_that_are_left_out_count_in_ranges_and_not_in_errors() -> None:
    """A group without a kept row has its range-based scale; entries of other groups get the errors of their rows."""
    x, group, kept = torch.randn(2, 1, 3, 4), torch.tensor([0, 0, 1, 2]), torch.tensor([1, 3])
    high = torch.tensor([1.0, 2.0, 5.0, 3.0])
    plan = OperandPlan("symmetric", 8, 3)
    operand = Activation(x, plan, torch.ones(1), group, -high, high, kept)
    assert operand.extremes[1].tolist() == [2.0, 5.0, 3.0]
    error = torch.tensor([10.0, 1.0])[:, None, None, None].expand(2, 1, 3, 2)
    assert operand.entries(error).tolist() == [60.0, 0.0, 6.0]
    assert operand.spread(torch.tensor([7.0, 8.0, 9.0])).flatten().tolist() == [7.0, 9.0]


def test_what_is_kept_of_a_product_is_bounded_in_elements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module, "TOKEN_ELEMENTS", 5000)
    monkeypatch.setattr(capture_module, "HEAD_ELEMENTS", 1000)
    monkeypatch.setattr(capture_module, "LEAST_PAIRS", 4)
    _, samples = capture(tiny_model(), CONFIG, tmp_path)
    for found in samples.values():
        one = len(found.left) * (found.left.shape[-1] + found.g2.shape[-1])  # a token of each kept row
        assert found.left.numel() + found.g2.numel() <= max(5000, one)
        if found.right is not None:
            assert found.right.numel() <= 1000  # 7 rows of 12, 128 elements each
            assert found.right.shape[:2] == (7, 1)
    assert samples["blocks.0.mlp.fc1"].left.shape == (12, 5, 16)


def test_at_the_size_of_flux_a_product_takes_less_than_half_a_gigabyte() -> None:
    """Shapes alone: 320 rows of 4,608 tokens, widths 3,072 and 12,288, heads of 128."""
    picker, one = Picker(320, 0.1, 0), range(320)
    linear = picker.cut(one, [torch.empty(320, 4608, 3072, device="meta")], 12288)
    assert linear.tokens.shape == (320, 27)
    q = torch.empty(320, 24, 4608, 128, device="meta")
    for operands, outputs in (([q, q], 4608), ([torch.empty(320, 24, 4608, 4608, device="meta"), q], 128)):
        cut = picker.cut(one, operands, outputs)
        assert cut.rows is not None
        assert cut.heads is not None
        assert (len(cut.rows), cut.heads.shape, cut.tokens.shape) == (64, (64, 1), (64, 442))
    small = Picker(320, 0.1, 0).cut(one, [torch.empty(320, 256, 1152, device="meta")], 4608)
    assert small.tokens.shape == (320, 26)  # DiT-XL/2 keeps its tenth


def test_samples_that_the_disk_does_not_hold_are_refused_after_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_module, "MOST_ROWS", 3)
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"needs 0\.0 GB"):
        capture(tiny_model(), CONFIG, tmp_path)
    assert not list(tmp_path.glob("search-*/samples-*"))


def test_a_batch_is_as_large_as_what_autograd_keeps_of_it_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    inputs = _rows(model).inputs
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.network.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        return kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.call({name: t[:1].clone().requires_grad_(name == "x") for name, t in inputs.items()})
    one = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)
    assert one > 10_000
    monkeypatch.setattr(capture_module, "GRAPH_BYTES", 5 * one)
    assert capture_module.choose_batching(model, inputs) == capture_module.Batching(5, recompute=False)
    monkeypatch.setattr(capture_module, "GRAPH_BYTES", 2 * one)
    large = capture_module.choose_batching(model, inputs)
    assert large.recompute
    assert 2 <= large.rows < 8
    monkeypatch.setattr(capture_module, "GRAPH_BYTES", 1)
    assert capture_module.choose_batching(model, inputs) == capture_module.Batching(1, recompute=True)
    monkeypatch.setattr(capture_module, "GRAPH_BYTES", 10**12)
    assert capture_module.choose_batching(model, inputs).rows == capture_module.MOST_ROWS


@pytest.mark.parametrize("origin", ["published", "diffusers"])
def test_blocks_that_are_computed_again_give_the_same_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: str
) -> None:
    model = tiny_model(origin)
    _, kept = capture(model, CONFIG, tmp_path / "kept")
    monkeypatch.setattr(
        capture_module, "choose_batching", lambda *_: capture_module.Batching(capture_module.MOST_ROWS, recompute=True)
    )
    _, again = capture(model, CONFIG, tmp_path / "again")
    assert kept.keys() == again.keys()
    for name, samples in kept.items():
        torch.testing.assert_close(again[name].left, samples.left, rtol=0, atol=0)
        torch.testing.assert_close(again[name].g2, samples.g2, rtol=0, atol=0)
    assert not any("forward" in vars(module) for module in model.network.modules())
