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
            if parameter.ndim > 1 and parameter.numel():
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
    if not value.any():  # zeros stand for what is not there, such as an image
        return value
    generator = torch.Generator().manual_seed(seed)
    if value.ndim == 1 or 0 in value.stride():  # timesteps, maybe of each frame
        return value * (0.1 + 0.9 * torch.rand(len(value), *[1] * (value.ndim - 1), generator=generator))
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
    network = {**WAN, "vace_layers": [0], "vace_in_channels": 6}
    return network, wan()[1] | {"control_hidden_states": draw(6, 2, 8, 8), "control_hidden_states_scale": torch.ones(1)}


def anyflow() -> Case:
    frames = times()[:, None].expand(ROWS, 3)
    return WAN, wan()[1] | {"hidden_states": draw(3, 4, 8, 8), "timestep": frames, "r_timestep": frames / 2}


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


def allegro() -> Case:
    network = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "cross_attention_dim": 32,
               "sample_height": 8, "sample_width": 8, "sample_frames": 2, "caption_channels": 24}  # fmt: skip
    return network, {
        "hidden_states": draw(4, 2, 8, 8), "encoder_hidden_states": draw(6, 24), "timestep": times(),
        "encoder_attention_mask": ones(6),
    }  # fmt: skip


def like_flux(**more: Any) -> Case:
    network, call = flux()
    for name in ("pooled_projection_dim", "guidance_embeds"):
        del network[name]
    for name in ("pooled_projections", "guidance"):
        del call[name]
    return network | more, call


def bria() -> Case:
    network, call = like_flux()
    return network, call | {"timestep": times()}


def bria_fibo() -> Case:
    network, call = bria()
    return network | {"text_encoder_dim": 24, "num_single_layers": 2}, call | {"text_encoder_layers": [draw(6, 24)] * 3}


def ovis_image() -> Case:
    return like_flux(out_channels=16)


COGVIEW = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
           "text_embed_dim": 24, "time_embed_dim": 16, "condition_dim": 8}  # fmt: skip


def cogview3() -> Case:
    network = {**COGVIEW, "pos_embed_max_size": 8, "sample_size": 8}
    return network, {
        "hidden_states": draw(4, 8, 8), "encoder_hidden_states": draw(6, 24), "timestep": times(),
        "original_size": ones(2) * 64.0, "target_size": ones(2) * 64.0, "crop_coords": ones(2) * 0.0,
    }  # fmt: skip


def cogview4() -> Case:
    network, call = cogview3()
    return network | {"rope_axes_dim": (8, 8)}, call


def glm_image() -> Case:
    call = cogview3()[1]
    del call["original_size"]
    return COGVIEW | {"prior_vq_quantizer_codebook_size": 16}, call | {
        "prior_token_id": torch.randint(0, 16, (ROWS, 16)), "prior_token_drop": torch.tensor([False, True]),
    }  # fmt: skip


def prx() -> Case:
    network = {"in_channels": 4, "context_in_dim": 24, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 2,
               "axes_dim": [8, 8]}  # fmt: skip
    return network, {"hidden_states": draw(4, 8, 8), "timestep": times(1.0), "encoder_hidden_states": draw(6, 24),
                     "attention_mask": ones(6).bool()}  # fmt: skip


def latte() -> Case:
    network = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
               "cross_attention_dim": 32, "attention_bias": True, "sample_size": 8, "patch_size": 2,
               "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
               "caption_channels": 24, "video_length": 2}  # fmt: skip
    return network, {
        "hidden_states": draw(4, 2, 8, 8), "timestep": times(), "encoder_hidden_states": draw(6, 24),
    }  # fmt: skip


HUNYUAN = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
           "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 24,
           "rope_axes_dim": (4, 6, 6)}  # fmt: skip


def hunyuan_video() -> Case:
    return HUNYUAN | {"pooled_projection_dim": 16, "patch_size": 2}, {
        "hidden_states": draw(4, 2, 8, 8), "timestep": times(), "encoder_hidden_states": draw(6, 24),
        "encoder_attention_mask": ones(6), "pooled_projections": draw(16), "guidance": times(6000.0),
    }  # fmt: skip


def hunyuan_framepack() -> Case:
    network, call = hunyuan_video()
    return network | {"has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True}, call | {
        "hidden_states": draw(4, 3, 8, 8), "image_embeds": draw(3, 16), "indices_latents": torch.arange(3),
        "latents_clean": draw(4, 1, 8, 8), "indices_latents_clean": torch.zeros(1, dtype=torch.int64),
        "latents_history_2x": draw(4, 4, 8, 8), "indices_latents_history_2x": torch.arange(4),
        "latents_history_4x": draw(4, 4, 8, 8), "indices_latents_history_4x": torch.arange(4),
    }  # fmt: skip


def hunyuan_video15() -> Case:
    network = {name: value for name, value in HUNYUAN.items() if name != "num_single_layers"}
    return network | {"text_embed_2_dim": 16, "image_embed_dim": 12, "target_size": 8, "task_type": "t2v"}, {
        "hidden_states": draw(4, 2, 4, 4), "timestep": times(), "encoder_hidden_states": draw(6, 24),
        "encoder_attention_mask": ones(6), "encoder_hidden_states_2": draw(5, 16), "encoder_attention_mask_2": ones(5),
        "image_embeds": torch.zeros(ROWS, 3, 12),
    }  # fmt: skip


def hunyuan_image() -> Case:
    return HUNYUAN | {"text_embed_2_dim": 16, "rope_axes_dim": (8, 8), "guidance_embeds": False}, {
        "hidden_states": draw(4, 4, 4), "timestep": times(), "encoder_hidden_states": draw(6, 24),
        "encoder_attention_mask": ones(6), "encoder_hidden_states_2": draw(5, 16), "encoder_attention_mask_2": ones(5),
    }  # fmt: skip


def motif_video() -> Case:
    network = {name: value for name, value in HUNYUAN.items() if name != "num_refiner_layers"}
    return network | {"patch_size": 2}, {
        "hidden_states": draw(4, 2, 8, 8), "timestep": times(), "encoder_hidden_states": draw(6, 24),
        "encoder_attention_mask": ones(6),
    }  # fmt: skip


def mochi() -> Case:
    network = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16,
               "in_channels": 4, "text_embed_dim": 24, "time_embed_dim": 8, "max_sequence_length": 6}  # fmt: skip
    return network, {
        "hidden_states": draw(4, 2, 8, 8), "encoder_hidden_states": draw(6, 24), "timestep": times(),
        "encoder_attention_mask": ones(6).bool(),
    }  # fmt: skip


def easy_animate() -> Case:
    network = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
               "patch_size": 2, "sample_width": 8, "sample_height": 8, "num_layers": 2, "mmdit_layers": 1,
               "time_embed_dim": 8, "text_embed_dim": 24}  # fmt: skip
    return network, {
        "hidden_states": draw(4, 2, 8, 8), "timestep": times(), "encoder_hidden_states": draw(6, 24),
    }  # fmt: skip


def stable_audio() -> Case:
    network = {"sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
               "num_key_value_attention_heads": 1, "out_channels": 4, "cross_attention_dim": 8, "time_proj_dim": 8,
               "global_states_input_dim": 12, "cross_attention_input_dim": 10}  # fmt: skip
    angles = torch.arange(9.0)[:, None] * torch.rand(4)
    return network, {
        "hidden_states": draw(4, 8), "timestep": times(1.0), "encoder_hidden_states": draw(6, 10),
        "global_hidden_states": draw(1, 12), "rotary_embedding": (angles.cos(), angles.sin()),
    }  # fmt: skip


def stable_audio3() -> Case:
    network = {"io_channels": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "cond_token_dim": 12,
               "global_cond_dim": 10, "local_add_cond_dim": 6, "timestep_features_dim": 8,
               "num_memory_tokens": 4}  # fmt: skip
    return network, {
        "hidden_states": draw(4, 8), "timestep": times(1.0), "encoder_hidden_states": draw(6, 12),
        "global_hidden_states": draw(10), "local_add_cond": draw(6, 8),
    }  # fmt: skip


def krea2() -> Case:
    network = {"in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
               "num_key_value_heads": 1, "intermediate_size": 32, "timestep_embed_dim": 16, "text_hidden_dim": 24,
               "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
               "text_intermediate_size": 32, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
               "axes_dims_rope": (4, 6, 6)}  # fmt: skip
    return network, {
        "hidden_states": draw(16, 16), "encoder_hidden_states": draw(6, 3, 24), "timestep": times(1.0),
        "position_ids": torch.cat([torch.zeros(6, 3), grid(4, 4)]), "encoder_attention_mask": ones(6).bool(),
    }  # fmt: skip


def ideogram4() -> Case:
    network = {"in_channels": 8, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
               "intermediate_size": 32, "adaln_dim": 16, "llm_features_dim": 24,
               "mrope_section": (4, 2, 2)}  # fmt: skip
    kinds = torch.tensor([3] * 6 + [2] * 16)
    return network, {
        "hidden_states": draw(22, 8), "timestep": times(1.0), "encoder_hidden_states": draw(22, 24),
        "position_ids": (ones(22, 3) * torch.arange(22)[:, None]), "segment_ids": ones(22),
        "indicator": ones(22) * kinds,
    }  # fmt: skip


def minimax_music() -> Case:
    network = {"in_channels": 4, "condition_dim": 6, "num_layers": 2, "num_attention_heads": 2,
               "attention_head_dim": 16,
               "ff_inner_dim": 32, "rotary_dim": 8, "fourier_embedding_dim": 16}  # fmt: skip
    return network, {"hidden_states": draw(4, 8), "timestep": times(1.0), "encoder_hidden_states": draw(8, 6)}


def joy_image_edit() -> Case:
    network = {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 24, "num_layers": 2,
               "rope_dim_list": [4, 6, 6]}  # fmt: skip
    return network, {"hidden_states": draw(4, 1, 8, 8), "timestep": times(), "encoder_hidden_states": draw(6, 24)}


def omnigen() -> Case:
    network = {"in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
               "intermediate_size": 32, "num_layers": 2, "pad_token_id": 0, "vocab_size": 50,
               "max_position_embeddings": 64, "original_max_position_embeddings": 64, "pos_embed_max_size": 8,
               "time_step_dim": 16,
               "rope_scaling": {"long_factor": list(range(1, 9)), "short_factor": list(range(1, 9))}}  # fmt: skip
    length = 6 + 1 + 16
    return network, {
        "hidden_states": draw(4, 8, 8), "timestep": times(1.0), "input_ids": torch.randint(1, 50, (ROWS, 6)),
        "input_img_latents": [], "input_image_sizes": {}, "attention_mask": ones(length, length),
        "position_ids": ones(length) * torch.arange(length),
    }  # fmt: skip


def lumina_next() -> Case:
    network = {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_attention_heads": 3,
               "num_kv_heads": 1, "multiple_of": 16, "cross_attention_dim": 32}  # fmt: skip
    return network, {
        "hidden_states": draw(4, 8, 8), "timestep": times(1.0), "encoder_hidden_states": draw(6, 32),
        "encoder_mask": ones(6).bool(), "image_rotary_emb": torch.randn(384, 384, 4), "cross_attention_kwargs": {},
    }  # fmt: skip


def helios() -> Case:
    network = {name: value for name, value in WAN.items() if name != "rope_max_seq_len"}
    return network | {"rope_dim": (4, 4, 4), "has_multi_term_memory_patch": True}, wan()[1] | {
        "indices_hidden_states": ones(2) * torch.arange(2), "latents_history_short": draw(4, 1, 8, 8),
        "indices_latents_history_short": ones(1) * 0, "latents_history_mid": draw(4, 2, 8, 8),
        "indices_latents_history_mid": ones(2) * torch.arange(2), "latents_history_long": draw(4, 4, 8, 8),
        "indices_latents_history_long": ones(4) * torch.arange(4),
    }  # fmt: skip


def nucleus_moe() -> Case:
    network = {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
               "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6), "num_experts": 2,
               "moe_intermediate_dim": 16, "capacity_factors": [8.0] * 2, "moe_enabled": False}  # fmt: skip
    return network, {
        "hidden_states": draw(16, 16), "img_shapes": [(1, 4, 4)] * ROWS, "encoder_hidden_states": draw(6, 24),
        "encoder_hidden_states_mask": ones(6).bool(), "timestep": times(1.0),
    }  # fmt: skip


def kandinsky5() -> Case:
    network = {"in_visual_dim": 4, "in_text_dim": 24, "in_text_dim2": 16, "time_dim": 16, "out_visual_dim": 4,
               "model_dim": 32, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 1,
               "axes_dims": (4, 6, 6)}  # fmt: skip
    return network, {
        "hidden_states": draw(3, 8, 8, 4), "encoder_hidden_states": draw(6, 24), "timestep": times(),
        "pooled_projections": draw(16), "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(6),
    }  # fmt: skip


def kandinsky6() -> Case:
    network = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 24, "in_text_dim2": 16, "time_dim": 16,
               "model_dim": 32, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 6, 6),
               "visual_cond": False}  # fmt: skip
    return network, {
        "hidden_states": draw(2, 8, 8, 4), "encoder_hidden_states": draw(6, 24), "pooled_projections": draw(16),
        "timestep": times(),
    }  # fmt: skip


def kandinsky6_sr() -> Case:
    network = {"in_visual_dim": 4, "out_visual_dim": 4, "time_dim": 16, "model_dim": 32, "ff_dim": 48,
               "num_visual_blocks": 1, "axes_dims": (4, 6, 6)}  # fmt: skip
    return network, {"hidden_states": draw(1, 8, 8, 9), "timestep": times()}


def flux3() -> Case:
    network = {"in_channels": 16, "cond_in_channels": 16, "num_layers": 1, "num_single_layers": 1,
               "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "timestep_channels": 32,
               "axes_dims_rope": (4, 4, 4, 4)}  # fmt: skip
    return network, {
        "hidden_states": draw(16, 16), "encoder_hidden_states": draw(6, 32), "timestep": times(1.0),
        "img_ids": grid(4, 4, 4), "txt_ids": grid(1, 6, 4),
    }  # fmt: skip


def ernie_image() -> Case:
    network = {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 48, "in_channels": 8,
               "out_channels": 8, "text_in_dim": 24, "rope_axes_dim": (4, 6, 6)}  # fmt: skip
    return network, {
        "hidden_states": draw(8, 4, 4), "timestep": times(), "text_bth": draw(6, 24), "text_lens": torch.tensor([6, 4]),
    }  # fmt: skip


def bria_fibo2() -> Case:
    network = {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 24,
               "injection_layer_ids": (0, 1), "perceiver_num_layers": 1, "min_num_gist_tokens": 4,
               "max_num_gist_tokens": 8, "gist_step": 2, "gist_min_text_len": 4, "gist_max_text_len": 16,
               "axes_dims": (4, 6, 6), "axes_lens": (64, 32, 32)}  # fmt: skip
    return network, {
        "hidden_states": draw(4, 8, 8), "timestep": times(1.0), "encoder_hidden_states": draw(3, 6, 24),
        "encoder_attention_mask": ones(6).bool(),
    }  # fmt: skip


def ace_step() -> Case:
    network = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
               "num_key_value_heads": 1, "head_dim": 16, "in_channels": 12, "audio_acoustic_hidden_dim": 4,
               "sliding_window": 4, "encoder_hidden_size": 24}  # fmt: skip
    return network, {
        "hidden_states": draw(8, 4), "timestep": times(1.0), "timestep_r": times(0.5),
        "encoder_hidden_states": draw(6, 24), "context_latents": draw(8, 8),
    }  # fmt: skip


def consisid() -> Case:
    network, call = cogvideox()
    return network | {
        "is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 16, "cross_attn_num_heads": 1,
        "LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_depth": 5, "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 1,
        "LFE_num_querie": 1, "LFE_output_dim": 21, "LFE_ff_mult": 1, "LFE_num_scale": 1,
    }, call | {"id_cond": draw(2), "id_vit_hidden": [draw(2, 2)]}  # fmt: skip


def cosmos() -> Case:
    network = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
               "mlp_ratio": 2.0, "text_embed_dim": 24, "adaln_lora_dim": 4, "max_size": (2, 8, 8),
               "concat_padding_mask": False}  # fmt: skip
    return network, {
        "hidden_states": draw(4, 2, 8, 8), "timestep": times(1.0), "encoder_hidden_states": draw(6, 24), "fps": 24,
    }  # fmt: skip


def prior() -> Case:
    network = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": 24,
               "num_embeddings": 6}  # fmt: skip
    return network, {
        "hidden_states": draw(24), "timestep": times(), "proj_embedding": draw(24),
        "encoder_hidden_states": draw(6, 24),
    }  # fmt: skip


def transformer_2d() -> Case:
    network = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
               "cross_attention_dim": 32, "attention_bias": True, "sample_size": 8, "patch_size": 2,
               "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
               "norm_elementwise_affine": False, "caption_channels": 24,
               "use_additional_conditions": False}  # fmt: skip
    return network, pixart()[1]


def ltx2() -> Case:
    network = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
               "cross_attention_dim": 32, "audio_in_channels": 4, "audio_out_channels": 4,
               "audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
               "num_layers": 1, "caption_channels": 24, "rope_double_precision": False}  # fmt: skip
    return network, {
        "hidden_states": draw(2 * 4 * 4, 4), "audio_hidden_states": draw(6, 4), "encoder_hidden_states": draw(6, 24),
        "audio_encoder_hidden_states": draw(6, 24), "timestep": times(), "encoder_attention_mask": ones(6),
        "audio_encoder_attention_mask": ones(6), "num_frames": 2, "height": 4, "width": 4, "fps": 25.0,
        "audio_num_frames": 6,
    }  # fmt: skip


def qwen_image21() -> Case:
    network = {"in_channels": 16, "out_channels": 16, "num_layers": 2, "attention_head_dim": 16,
               "num_attention_heads": 2, "context_in_dim": 24, "axes_dims_rope": (4, 6, 6)}  # fmt: skip
    slots = torch.cat([torch.zeros(ROWS, 6), torch.ones(ROWS, 4)], 1).bool()
    return network, {
        "hidden_states": draw(16, 16), "encoder_hidden_states": draw(6, 24), "timestep": times(1.0),
        "img_shapes": [[(1, 4, 4)]] * ROWS, "img_mask": slots,
    }  # fmt: skip


def hidream() -> Case:
    network = {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
               "attention_head_dim": 8, "num_attention_heads": 4, "caption_channels": [24, 20], "text_emb_dim": 16,
               "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8), "llama_layers": (0, 1),
               "force_inference_output": True}  # fmt: skip
    return network, {
        "hidden_states": draw(4, 8, 8), "timesteps": times(), "encoder_hidden_states_t5": draw(6, 24),
        "encoder_hidden_states_llama3": torch.randn(2, ROWS, 5, 20), "pooled_embeds": draw(16),
    }  # fmt: skip


def longcat_audio() -> Case:
    network = {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 24, "latent_dim": 8}
    return network, {
        "hidden_states": draw(8, 8), "encoder_hidden_states": draw(6, 24), "encoder_attention_mask": ones(6).bool(),
        "timestep": times(1.0), "attention_mask": ones(8).bool(), "latent_cond": draw(8, 8),
    }  # fmt: skip


def joy_image_edit_plus() -> Case:
    network, call = joy_image_edit()
    return network, call | {
        "hidden_states": draw(16, 4, 1, 2, 2), "encoder_hidden_states_mask": ones(6).float(),
        "shape_list": [[(1, 4, 4)]] * ROWS,
    }  # fmt: skip


def dreamlite() -> Case:
    network = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 32, "num_layers": 1,
               "cross_attention_dim": 24}  # fmt: skip
    return network, {"hidden_states": draw(32, 4, 4), "encoder_hidden_states": draw(6, 24), "timestep": times()}


def dual() -> Case:
    network, call = dreamlite()
    return network, call | {"encoder_hidden_states": draw(334, 24)}


def temporal() -> Case:
    network = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 32, "num_layers": 1}
    return network, {"hidden_states": draw(32, 4, 4), "timestep": times(), "num_frames": 2}


def t5_film() -> Case:
    network = {"input_dims": 4, "targets_length": 8, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8,
               "d_ff": 32}  # fmt: skip
    return network, {
        "encodings_and_masks": [(draw(6, 16), ones(6)), (draw(4, 16), ones(4)), (draw(2, 16), ones(2))],
        "decoder_input_tokens": draw(8, 4), "decoder_noise_time": times(1.0),
    }  # fmt: skip


def sana_wm_refiner() -> Case:
    network, call = ltx2()
    angles = torch.arange(32.0)[:, None] * torch.rand(32)
    return network, {
        "hidden_states": call["hidden_states"], "encoder_hidden_states": call["encoder_hidden_states"],
        "timestep": times(), "video_rotary_emb": (angles.cos(), angles.sin()), "encoder_attention_mask": ones(6),
    }  # fmt: skip


def sana_wm() -> Case:
    network = {"in_channels": 4, "num_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "linear_head_dim": 16,
               "chunk_plucker_post_attn_blocks": 0, "use_chunk_plucker_post_attn": False, "caption_channels": 24,
               "mixed_precision": "no"}  # fmt: skip
    return network, {
        "hidden_states": draw(4, 4, 4, 4), "timestep": times()[:, None, None].expand(ROWS, 1, 4),
        "encoder_hidden_states": draw(1, 6, 24),
        "encoder_attention_mask": ones(6),
    }  # fmt: skip


def wan_animate() -> Case:
    network = {**WAN, "in_channels": 12, "latent_channels": 4, "image_dim": 16, "added_kv_proj_dim": 24,
               "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16,
               "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16,
               "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2}  # fmt: skip
    return network, {
        "hidden_states": draw(12, 3, 8, 8), "timestep": times(), "encoder_hidden_states": draw(6, 24),
        "encoder_hidden_states_image": draw(4, 16), "pose_hidden_states": draw(4, 2, 8, 8),
        "face_pixel_values": draw(3, 8, 16, 16),
    }  # fmt: skip


def minimax_h3() -> Case:
    network = {"num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 32, "num_layers": 1,
               "num_refiner_layers": 1, "ffn_dim": 48, "in_channels": 4, "audio_in_channels": 4, "text_dim": 24,
               "freq_dim": 16, "time_embed_hidden_dim": 32, "time_embed_dim": 16, "rope_freq_dim": 2}  # fmt: skip
    index = torch.arange(22)
    return network, {
        "hidden_states": draw(12, 16), "audio_hidden_states": draw(4, 4), "encoder_hidden_states": draw(6, 24),
        "timestep": times(), "timestep_indices": torch.zeros(22, dtype=torch.int64), "token_tags": (index > 5) * 1,
        "position_ids": index[:, None].expand(22, 3).float(), "video_indices": index[6:18], "audio_indices": index[18:],
        "text_indices": index[:6],
    }  # fmt: skip


def rvq_depth_decoder() -> Case:
    network = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
               "audio_vocab_size": 16, "num_codebooks": 4}  # fmt: skip
    return network, {"inputs_embeds": draw(4, 32)}


CASES: dict[str, Callable[[], Case]] = {
    "AceStepTransformer1DModel": ace_step,
    "AllegroTransformer3DModel": allegro,
    "AnyFlowTransformer3DModel": anyflow,
    "AuraFlowTransformer2DModel": auraflow,
    "BriaFibo2Transformer2DModel": bria_fibo2,
    "BriaFiboTransformer2DModel": bria_fibo,
    "BriaTransformer2DModel": bria,
    "ChromaTransformer2DModel": chroma,
    "ChronoEditTransformer3DModel": wan,
    "CogVideoXTransformer3DModel": cogvideox,
    "CogView3PlusTransformer2DModel": cogview3,
    "CogView4Transformer2DModel": cogview4,
    "ConsisIDTransformer3DModel": consisid,
    "CosmosTransformer3DModel": cosmos,
    "DiTTransformer2DModel": dit,
    "DreamLiteTransformer2DModel": dreamlite,
    "DualTransformer2DModel": dual,
    "EasyAnimateTransformer3DModel": easy_animate,
    "ErnieImageTransformer2DModel": ernie_image,
    "Flux2Transformer2DModel": flux2,
    "Flux3Transformer2DModel": flux3,
    "FluxTransformer2DModel": flux,
    "GlmImageTransformer2DModel": glm_image,
    "HeliosTransformer3DModel": helios,
    "HiDreamImageTransformer2DModel": hidream,
    "HunyuanDiT2DModel": hunyuan_dit,
    "HunyuanImageTransformer2DModel": hunyuan_image,
    "HunyuanVideo15Transformer3DModel": hunyuan_video15,
    "HunyuanVideoFramepackTransformer3DModel": hunyuan_framepack,
    "HunyuanVideoTransformer3DModel": hunyuan_video,
    "Ideogram4Transformer2DModel": ideogram4,
    "JoyImageEditPlusTransformer3DModel": joy_image_edit_plus,
    "JoyImageEditTransformer3DModel": joy_image_edit,
    "Kandinsky5Transformer3DModel": kandinsky5,
    "Kandinsky6SRTransformer3DModel": kandinsky6_sr,
    "Kandinsky6Transformer3DModel": kandinsky6,
    "Krea2Transformer2DModel": krea2,
    "LTX2VideoTransformer3DModel": ltx2,
    "LTXVideoTransformer3DModel": ltx,
    "LatteTransformer3DModel": latte,
    "LongCatAudioDiTTransformer": longcat_audio,
    "LongCatImageTransformer2DModel": like_flux,
    "Lumina2Transformer2DModel": lumina2,
    "LuminaNextDiT2DModel": lumina_next,
    "MiniMaxH3Transformer3DModel": minimax_h3,
    "MiniMaxMusic3RVQDepthDecoder": rvq_depth_decoder,
    "MiniMaxMusic3Transformer1DModel": minimax_music,
    "MochiTransformer3DModel": mochi,
    "MotifVideoTransformer3DModel": motif_video,
    "NucleusMoEImageTransformer2DModel": nucleus_moe,
    "OmniGenTransformer2DModel": omnigen,
    "OvisImageTransformer2DModel": ovis_image,
    "PRXTransformer2DModel": prx,
    "PixArtTransformer2DModel": pixart,
    "PriorTransformer": prior,
    "QwenImage21Transformer2DModel": qwen_image21,
    "QwenImageTransformer2DModel": qwen_image,
    "SD3Transformer2DModel": sd3,
    "SanaTransformer2DModel": sana,
    "SanaVideoTransformer3DModel": sana_video,
    "SanaWMLTX2RefinerTransformer3DModel": sana_wm_refiner,
    "SanaWMTransformer3DModel": sana_wm,
    "SkyReelsV2Transformer3DModel": skyreels,
    "StableAudio3DiTModel": stable_audio3,
    "StableAudioDiTModel": stable_audio,
    "T5FilmDecoder": t5_film,
    "Transformer2DModel": transformer_2d,
    "TransformerTemporalModel": temporal,
    "WanAnimateTransformer3DModel": wan_animate,
    "WanTransformer3DModel": wan,
    "WanVACETransformer3DModel": wan_vace,
    "ZImageTransformer2DModel": z_image,
}
