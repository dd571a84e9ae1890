"""Every transformer class of diffusers as a tiny network with random weights, and one call of it with two rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from diffusers.models import transformers
from torch import Tensor, nn

ROWS = 2
Case = tuple[dict[str, Any], dict[str, Any]]  # arguments of the constructor, and of the call


def classes() -> list[str]:
    """The names of all transformer classes of this diffusers."""
    return [name for name, kind in sorted(vars(transformers).items()) if isinstance(kind, type)]


def make(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network and the arguments of a call. Raises KeyError for a class without a configuration."""
    torch.manual_seed(0)
    configuration, arguments = CASES[name]()
    network: nn.Module = getattr(transformers, name)(**configuration)
    return randomized(network).eval(), arguments


def randomized(network: nn.Module) -> nn.Module:
    """Every parameter non-zero: some are zeros at first, where a block is the identity."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape)
            if parameter.ndim > 1:
                parameter.copy_(noise * (0.8 / parameter[0].numel() ** 0.5))
            else:
                parameter.copy_(noise * 0.1 + float("norm" in name and name.endswith("weight")))
    return network


def vary(value: Any, seed: int) -> Any:
    """The arguments of another call: real numbers with rows are drawn again, timesteps are scaled."""
    if isinstance(value, dict):
        return {name: vary(each, seed + index) for index, (name, each) in enumerate(value.items())}
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [vary(each[None].expand(ROWS, *each.shape), seed + index)[0] for index, each in enumerate(value)]
    if not isinstance(value, Tensor) or not value.is_floating_point() or len(value.reshape(-1)) < ROWS:
        return value
    generator = torch.Generator().manual_seed(seed)
    if value.ndim == 1:
        return value * (0.1 + 0.9 * torch.rand(len(value), generator=generator))
    return torch.randn(value.shape, generator=generator) if len(value) == ROWS else value


def draw(*shape: int) -> Tensor:
    """With two rows."""
    return torch.randn(ROWS, *shape)


def times(most: float = 999.0) -> Tensor:
    return torch.tensor([most, 0.4 * most])


def ones(*shape: int) -> Tensor:
    """A mask."""
    return torch.ones(ROWS, *shape, dtype=torch.int64)


def grid(height: int, width: int, axes: int = 3) -> Tensor:
    """Position ids of an image (height width, axes), the last two of which count."""
    ids = torch.zeros(height, width, axes)
    ids[..., -2] += torch.arange(height)[:, None]
    ids[..., -1] += torch.arange(width)[None]
    return ids.reshape(-1, axes)


def dit() -> Case:
    network = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
               "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 1000}  # fmt: skip
    return network, {
        "hidden_states": draw(4, 8, 8),
        "timestep": torch.tensor([999, 400]),
        "class_labels": torch.tensor([1, 1000]),
    }


def pixart() -> Case:
    network = {"sample_size": 8, "num_layers": 2, "patch_size": 2, "attention_head_dim": 16, "num_attention_heads": 2,
               "in_channels": 4, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 24,
               "use_additional_conditions": False}  # fmt: skip
    return network, {
        "hidden_states": draw(4, 8, 8), "encoder_hidden_states": draw(6, 24), "timestep": times(),
        "encoder_attention_mask": ones(6), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def sd3() -> Case:
    network = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16,
               "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 32,
               "pooled_projection_dim": 24, "out_channels": 4, "pos_embed_max_size": 16, "qk_norm": "rms_norm",
               "dual_attention_layers": (0,)}  # fmt: skip
    return network, {
        "hidden_states": draw(4, 8, 8), "encoder_hidden_states": draw(6, 32), "pooled_projections": draw(24),
        "timestep": times(),
    }  # fmt: skip


def flux() -> Case:
    network = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
               "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
               "axes_dims_rope": (4, 4, 8), "guidance_embeds": True}  # fmt: skip
    return network, {
        "hidden_states": draw(16, 16), "encoder_hidden_states": draw(6, 32), "pooled_projections": draw(32),
        "timestep": times(1.0), "img_ids": grid(4, 4), "txt_ids": torch.zeros(6, 3), "guidance": times(3.5),
    }  # fmt: skip


def flux2() -> Case:
    network = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
               "num_attention_heads": 2, "joint_attention_dim": 32, "timestep_guidance_channels": 32,
               "axes_dims_rope": (4, 4, 4, 4)}  # fmt: skip
    return network, {
        "hidden_states": draw(16, 16), "encoder_hidden_states": draw(6, 32), "timestep": times(1.0),
        "img_ids": grid(4, 4, 4), "txt_ids": grid(1, 6, 4), "guidance": times(3.5),
    }  # fmt: skip


def sana() -> Case:
    network = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
               "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
               "caption_channels": 24, "sample_size": 8}  # fmt: skip
    return network, {
        "hidden_states": draw(4, 8, 8), "encoder_hidden_states": draw(6, 24), "timestep": times(),
        "encoder_attention_mask": ones(6),
    }  # fmt: skip


def sana_video() -> Case:
    network, call = sana()
    return network | {"sample_size": 8, "patch_size": (1, 2, 2), "num_layers": 1}, call | {
        "hidden_states": draw(4, 2, 8, 8)
    }


WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 24,
       "freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32}  # fmt: skip


def wan() -> Case:
    return WAN, {"hidden_states": draw(4, 2, 8, 8), "timestep": times(), "encoder_hidden_states": draw(6, 24)}


def wan_vace() -> Case:
    network = {**WAN, "vace_layers": [0, 1], "vace_in_channels": 6}
    return network, wan()[1] | {"control_hidden_states": draw(6, 2, 8, 8), "control_hidden_states_scale": torch.ones(2)}


def anyflow() -> Case:
    return WAN, wan()[1] | {"hidden_states": draw(2, 4, 8, 8), "r_timestep": times(500.0)}


def skyreels() -> Case:
    return WAN, wan()[1]


def ltx() -> Case:
    network = {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
               "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 24}  # fmt: skip
    return network, {
        "hidden_states": draw(2 * 4 * 4, 8), "encoder_hidden_states": draw(6, 24), "timestep": times(),
        "encoder_attention_mask": ones(6), "num_frames": 2, "height": 4, "width": 4,
    }  # fmt: skip


def auraflow() -> Case:
    network = {"sample_size": 8, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
               "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
               "caption_projection_dim": 32, "out_channels": 4, "pos_embed_max_size": 16}  # fmt: skip
    return network, {"hidden_states": draw(4, 8, 8), "encoder_hidden_states": draw(6, 24), "timestep": times(1.0)}


def hunyuan_dit() -> Case:
    network = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "patch_size": 2, "sample_size": 8,
               "hidden_size": 32, "num_layers": 4, "cross_attention_dim": 24, "cross_attention_dim_t5": 24,
               "pooled_projection_dim": 16, "text_len": 4, "text_len_t5": 4}  # fmt: skip
    angles = torch.arange(16.0)[:, None] * torch.rand(16)
    return network, {
        "hidden_states": draw(4, 8, 8), "timestep": times(), "encoder_hidden_states": draw(4, 24),
        "text_embedding_mask": ones(4), "encoder_hidden_states_t5": draw(4, 24), "text_embedding_mask_t5": ones(4),
        "image_meta_size": ones(6) * 64, "style": ones() * 0, "image_rotary_emb": (angles.cos(), angles.sin()),
    }  # fmt: skip


def cogvideox() -> Case:
    network = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
               "time_embed_dim": 16, "text_embed_dim": 24, "num_layers": 2, "sample_width": 8, "sample_height": 8,
               "sample_frames": 9, "max_text_seq_length": 6}  # fmt: skip
    return network, {"hidden_states": draw(3, 4, 8, 8), "encoder_hidden_states": draw(6, 24), "timestep": times()}


def qwen_image() -> Case:
    network = {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
               "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6)}  # fmt: skip
    return network, {
        "hidden_states": draw(16, 16), "encoder_hidden_states": draw(6, 24), "encoder_hidden_states_mask": ones(6),
        "timestep": times(1.0), "img_shapes": [[(1, 4, 4)]] * ROWS,
    }  # fmt: skip


def z_image() -> Case:
    network = {"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
               "cap_feat_dim": 24, "axes_dims": [4, 6, 6], "axes_lens": [64, 32, 32]}  # fmt: skip
    return network, {"x": list(draw(4, 1, 8, 8)), "t": times(1.0), "cap_feats": list(draw(6, 24))}


def chroma() -> Case:
    network = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
               "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8),
               "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}  # fmt: skip
    return network, {
        "hidden_states": draw(16, 16), "encoder_hidden_states": draw(6, 32), "timestep": times(1.0),
        "img_ids": grid(4, 4), "txt_ids": torch.zeros(6, 3), "attention_mask": ones(22).bool(),
    }  # fmt: skip


def lumina2() -> Case:
    network = {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1,
               "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2),
               "axes_lens": (128, 128, 128), "cap_feat_dim": 32}  # fmt: skip
    return network, {
        "hidden_states": draw(4, 8, 8), "timestep": times(1.0), "encoder_hidden_states": draw(6, 32),
        "encoder_attention_mask": ones(6).bool(),
    }  # fmt: skip


CASES: dict[str, Callable[[], Case]] = {
    "AnyFlowTransformer3DModel": anyflow,
    "AuraFlowTransformer2DModel": auraflow,
    "ChromaTransformer2DModel": chroma,
    "ChronoEditTransformer3DModel": wan,
    "CogVideoXTransformer3DModel": cogvideox,
    "DiTTransformer2DModel": dit,
    "Flux2Transformer2DModel": flux2,
    "FluxTransformer2DModel": flux,
    "HunyuanDiT2DModel": hunyuan_dit,
    "LTXVideoTransformer3DModel": ltx,
    "Lumina2Transformer2DModel": lumina2,
    "PixArtTransformer2DModel": pixart,
    "QwenImageTransformer2DModel": qwen_image,
    "SD3Transformer2DModel": sd3,
    "SanaTransformer2DModel": sana,
    "SanaVideoTransformer3DModel": sana_video,
    "SkyReelsV2Transformer3DModel": skyreels,
    "WanTransformer3DModel": wan,
    "WanVACETransformer3DModel": wan_vace,
    "ZImageTransformer2DModel": z_image,
}
