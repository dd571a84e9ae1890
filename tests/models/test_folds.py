"""Where divisors go is found by observation; the folded network computes what it did, to the last bits of float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tqdit
from support import tiny_model
from tqdit.models.folds import Fold, reshaped
from tqdit.models.load import load_model
from tqdit.models.products import find_products
from tqdit.quantization.fold import fold_divisors

WIDTH, INNER = 8, 12


class Base(nn.Module):
    """x + down(made(x)) with layers gate, up and down; `up` has gate's rows as well if it is fused."""

    def __init__(self, fused=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, 2 * INNER if fused else INNER, bias=fused)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return self.last(self.between(self.first(x)))

    def between(self, x):
        return x + self.down(self.made(x))


class SwiGLU(Base):
    def made(self, x):
        return F.dropout(F.silu(self.gate(x)) * self.up(x), 0.1, self.training)


class Gated(Base):
    """The linear factor stands first, and a constant per channel multiplies it as well."""

    def made(self, x):
        return self.up(x) * torch.arange(1.0, INNER + 1) * F.gelu(self.gate(x))


class Chunked(Base):
    def __init__(self):
        super().__init__(fused=True)

    def made(self, x):
        up, gate = self.up(x).chunk(2, dim=-1)
        return up * F.gelu(gate)


class Sliced(Base):
    def __init__(self):
        super().__init__(fused=True)

    def made(self, x):
        x = self.up(x)
        return F.silu(x[..., :INNER]) * x[..., INNER:]


class Heads(Base):
    """Attention of three heads of four channels, v from `up`."""

    def made(self, x):
        heads = [layer(x).view(len(x), -1, 3, 4).transpose(1, 2) for layer in (self.gate, self.gate, self.up)]
        x = F.scaled_dot_product_attention(*heads)
        return x.permute(0, 2, 1, 3).flatten(2, 3).to(torch.get_default_dtype())


class Qkv(Base):
    """The same, with q, k and v from one layer."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 3 * INNER)

    def made(self, x):
        heads = self.up(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(len(x), -1, INNER)


class Columns(Base):
    """Attention and GELU side by side in the input of one layer."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(2 * INNER, WIDTH)

    def made(self, x):
        return torch.cat([Heads.made(self, x), F.gelu(self.gate(x))], -1)


FOLDS = {
    SwiGLU: ("down", Fold("up", 0, INNER)), Gated: ("down", Fold("up", 0, INNER)),
    Chunked: ("down", Fold("up", 0, INNER)), Sliced: ("down", Fold("up", INNER, 2 * INNER)),
    Heads: ("down", Fold("up", 0, INNER)), Qkv: ("down", Fold("up", 2 * INNER, 3 * INNER)),
    Columns: ("down.columns.0", Fold("up", 0, INNER)),
}  # fmt: skip


def found(network):
    """Layer -> its folds, and the network with explicit products."""
    network = network.eval().requires_grad_(False)
    products = find_products(network, {"x": torch.zeros(2, 5, WIDTH)})
    return {product.name: product.folds for product in products if product.folds}, products


@pytest.mark.parametrize("kind", FOLDS)
def test_rows_that_make_a_channel_each_are_found_and_take_its_divisor(kind):
    network = kind()
    folds, products = found(network)
    layer, expected = FOLDS[kind]
    assert folds == {layer: (expected,)}
    x, network = torch.randn(2, 5, WIDTH, dtype=torch.float64), network.double()
    model = replace(tiny_model(), network=network, products=products)
    torch.set_default_dtype(torch.float64)
    try:
        divisor = torch.rand(INNER) * 5 + 0.2
        folded = fold_divisors(model, {layer: divisor}).network
        torch.testing.assert_close(folded(x), network(x), rtol=1e-12, atol=1e-13)
        inputs = [[], []]
        for each, kept in zip((network, folded), inputs, strict=True):
            each.get_submodule(layer).register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
            each(x)
        torch.testing.assert_close(inputs[1][0], inputs[0][0] / divisor, rtol=1e-12, atol=1e-13)
    finally:
        torch.set_default_dtype(torch.float32)


class UsedTwice(Base):
    def made(self, x):
        up = self.up(x)
        return F.silu(self.gate(x)) * up + 0 * up.sum(-1, keepdim=True)


class Itself(Base):
    def made(self, x):
        x = self.up(x)
        return torch.sigmoid(x) * x


class Added(Base):
    def made(self, x):
        return F.silu(self.gate(x)) * (self.up(x) + 1)


class InPlace(Base):
    def made(self, x):
        x = F.silu(self.gate(x)) * self.up(x)
        x.add_(1.0)
        return x


class SetItem(Base):
    def made(self, x):
        x = F.silu(self.gate(x)) * self.up(x)
        x[:, 0] = 1.0
        return x


class OnConstants(Base):
    """`up` makes something of what is no argument, too."""

    def made(self, x):
        return F.silu(self.gate(x)) * self.up(x) * self.up(torch.ones(1, 1, WIDTH))


class CalledTwice(Base):
    def between(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x)) + self.down(self.gate(x))


class Tied(Base):
    """Another layer has the weights of `up`."""

    def __init__(self):
        super().__init__()
        self.gate.weight = self.up.weight

    def made(self, x):
        return F.silu(self.gate(x)) * self.up(x)


class Tokens(Base):
    """Some tokens of the rows go elsewhere."""

    def between(self, x):
        a, b = self.up(x).split([2, 3], dim=1)
        return self.down(torch.sigmoid(a)).sum(1, keepdim=True) + x[:, :3] + self.gate_out(b)

    def __init__(self):
        super().__init__()
        self.gate_out = nn.Linear(INNER, WIDTH)


class Overlap(Sliced):
    def made(self, x):
        x = self.up(x)
        return F.silu(x[..., : INNER + 1])[..., :-1] * x[..., INNER:]


class Mixed(Heads):
    """Heads and channels change places after the attention."""

    def made(self, x):
        return super().made(x).unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2)


class Joint(Heads):
    """Two layers make v, one for each part of the tokens."""

    def made(self, x):
        q, v = self.gate(x), torch.cat([self.up(x[:, :2]), self.gate(x[:, 2:])], 1)
        heads = [each.view(len(x), -1, 3, 4).transpose(1, 2) for each in (q, q, v)]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


NO_PLACE = (
    UsedTwice, Itself, Added, InPlace, SetItem, OnConstants, CalledTwice, Tied, Tokens, Overlap, Mixed, Joint
)  # fmt: skip


@pytest.mark.parametrize("kind", NO_PLACE)
def test_rows_that_something_else_uses_or_changes_are_no_place(kind):
    assert found(kind())[0] == {}


@pytest.mark.parametrize(
    ("old", "strides", "new", "expected"),
    [
        ((2, 5, 12), (0, 0, 1), (2, 5, 3, 4), (0, 0, 4, 1)),
        ((2, 5, 3, 4), (0, 0, 4, 1), (10, 12), (0, 1)),
        ((2, 3, 5, 4), (0, 4, 0, 1), (2, 15, 4), None),  # heads and tokens on one axis
        ((2, 4, 3), (0, 1, 4), (2, 12), None),  # in another order
        ((2, 1, 12), (0, 0, 1), (2, 12, 1), (0, 1, 0)),
        ((2, 12), (0, 2), (2, 3, 4), (0, 8, 2)),
    ],
)
def test_strides_follow_a_reshape(old, strides, new, expected):
    assert reshaped(old, strides, new) == expected
    if expected is not None:  # as NumPy says
        rows = sum((np.arange(n).reshape(-1, *[1] * (len(old) - a - 1)) * s for a, (n, s) in
                    enumerate(zip(old, strides, strict=True))), np.zeros(old, int))  # fmt: skip
        again = sum((np.arange(n).reshape(-1, *[1] * (len(new) - a - 1)) * s for a, (n, s) in
                     enumerate(zip(new, expected, strict=True))), np.zeros(new, int))  # fmt: skip
        np.testing.assert_array_equal(rows.reshape(new), again)


# What diffusers' families have: SwiGLU in two forms, V of attention with and without text.
FAMILY_FOLDS = {
    "z-image": {"layers.0.feed_forward.w2": "layers.0.feed_forward.w3",
                "layers.0.attention.to_out.0": "layers.0.attention.to_v"},
    "flux2": {"transformer_blocks.0.ff.linear_out": "transformer_blocks.0.ff.linear_in",
              "single_transformer_blocks.0.attn.to_out.columns.0": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
              "single_transformer_blocks.0.attn.to_out.columns.1": "single_transformer_blocks.0.attn.to_qkv_mlp_proj"},
    "pixart-sigma": {f"transformer_blocks.1.attn{n}.to_out.0": f"transformer_blocks.1.attn{n}.to_v" for n in (1, 2)},
    "sd3": {},  # v of joint attention has two makers and two readers
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")
@pytest.mark.parametrize("name", FAMILY_FOLDS)
def test_families_of_diffusers_have_places_and_compute_the_same(name):
    from zoo.pipelines import FAMILIES

    pipeline, arguments = FAMILIES[name]()
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(), tqdit.record(pipeline.transformer) as calls:
        pipeline(num_inference_steps=2, output_type="latent", return_dict=False, **arguments)
    recording = calls.recording()
    model = load_model(pipeline.transformer, interface=recording.interface)
    folds = {product.name: product.folds for product in model.products if product.folds}
    assert {layer: folds[layer][0].module for layer in FAMILY_FOLDS[name]} == FAMILY_FOLDS[name]
    if not folds:
        return
    rng, values = np.random.default_rng(0), recording.requests | {model.signature.state.name: recording.states[:, 0]}
    inputs = {port: torch.from_numpy(values[port][:2]) for port in model.signature.names}
    inputs = {port: x.double() if x.is_floating_point() else x for port, x in inputs.items()}
    model.network.double()
    widths = {layer: model.network.get_submodule(layer).in_features for layer in folds}
    divisors = {layer: torch.from_numpy(rng.uniform(0.2, 5, width)) for layer, width in widths.items()}
    folded = fold_divisors(model, divisors)
    with torch.no_grad():
        before, after = model.call(inputs), folded.call(inputs)
        assert float((after - before).norm() / before.norm()) < 1e-12
        for layer in folds:  # the weights are changed alone: what the divisors are there to undo
            module = model.network.get_submodule(layer)
            module.weight = nn.Parameter(module.weight * divisors[layer], requires_grad=False)
        assert float((model.call(inputs) - before).norm() / before.norm()) > 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")
def test_an_equalised_family_is_built_and_proved(tmp_path):
    from zoo.pipelines import FAMILIES

    pipeline, arguments = FAMILIES["flux2"]()
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(), tqdit.record(pipeline) as calls:
        pipeline(num_inference_steps=4, output_type="latent", return_dict=False, **arguments)
    with torch.no_grad():  # one channel of the gated product is far larger than the others
        pipeline.transformer.transformer_blocks[0].ff.linear_in.weight[-1] *= 50
    knobs = {"groups": 2, "rows_per_group": 4, "candidates": 20, "rounds": 1, "token_share": 0.5}
    table = tqdit.calibrate(pipeline.transformer, preset="tq-dit", rows=calls, equalize=True, **knobs)
    divisor = table.by_module["transformer_blocks.0.ff.linear_out"]["input"].divisor
    assert divisor is not None
    assert divisor.argmax() == len(divisor) - 1
    tqdit.export(pipeline.transformer, tmp_path / "model.onnx", scales=table)
    manifest = tqdit.build(tmp_path / "model.onnx", backend="openvino")
    assert manifest.audit.fallen_back == ()
    assert manifest.verified is not None
