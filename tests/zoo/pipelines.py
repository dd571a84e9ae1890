"""Tiny pipelines of diffusers with random weights: each family's own classes in their layout, without text encoders.

`FAMILIES[name]()` is a pipeline and what it is called with; prompts come as random embeddings.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
import diffusers
import torch

Family = tuple[Any, dict[str, Any]]


def randomized(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter non-zero: diffusers initialises some with zeros, where a block is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (0.8 / parameter[0].numel() ** 0.5))
            else:
                parameter.copy_(noise * 0.1 + float("norm" in name and name.endswith("weight")))
    return network.eval()


def embeddings(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def guided(
    length: int, width: int, mask: str | None = None, seed: int = 1, dtype: torch.dtype = torch.int64
) -> dict[str, torch.Tensor]:
    """Embeddings of a prompt and of a negative one, maybe with masks of ones."""
    call = {
        "prompt_embeds": embeddings(1, length, width, seed=seed),
        "negative_prompt_embeds": embeddings(1, length, width, seed=seed + 2),
    }
    masks = {} if mask is None else dict.fromkeys((mask, f"negative_{mask}"), torch.ones(1, length, dtype=dtype))
    return call | masks


def vae(shift: float | None = None) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=4, shift_factor=shift,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.13,
    ).eval()  # fmt: skip


def flux() -> Family:
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = diffusers.FluxPipeline(scheduler, vae(0.07), None, None, None, None, randomized(network))
    call = {"prompt_embeds": embeddings(1, 6, 32), "pooled_prompt_embeds": embeddings(1, 32, seed=2)}
    return pipeline, {**call, "height": 64, "width": 64, "guidance_scale": 3.5}


def sd3() -> Family:
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=24, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = diffusers.StableDiffusion3Pipeline(
        randomized(network), scheduler, vae(0.06), None, None, None, None, None, None
    )
    call = {
        "prompt_embeds": embeddings(1, 6, 32),
        "pooled_prompt_embeds": embeddings(1, 24, seed=2),
        "negative_prompt_embeds": embeddings(1, 6, 32, seed=3),
        "negative_pooled_prompt_embeds": embeddings(1, 24, seed=4),
    }
    return pipeline, {**call, "height": 64, "width": 64, "guidance_scale": 5.0}


def pixart_sigma() -> Family:
    network = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=16, num_attention_heads=2, in_channels=4,
        out_channels=8, cross_attention_dim=32, caption_channels=24, use_additional_conditions=False,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    pipeline = diffusers.PixArtSigmaPipeline(None, None, vae(), randomized(network), scheduler)
    mask = torch.ones(1, 6, dtype=torch.int64)
    negative = mask.clone()
    negative[:, 4:] = 0
    call = {
        "prompt_embeds": embeddings(1, 6, 24),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": embeddings(1, 6, 24, seed=3),
        "negative_prompt_attention_mask": negative,
        "negative_prompt": None,
    }
    return pipeline, {**call, "height": 64, "width": 64, "guidance_scale": 4.5, "use_resolution_binning": False}


def sana() -> Family:
    network = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=24,
        mlp_ratio=2.5, sample_size=8, patch_size=1,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    autoencoder = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41,
    )  # fmt: skip
    pipeline = diffusers.SanaPipeline(None, None, autoencoder, randomized(network), scheduler)
    call = {
        "prompt_embeds": embeddings(1, 6, 24),
        "prompt_attention_mask": torch.ones(1, 6, dtype=torch.int64),
        "negative_prompt_embeds": embeddings(1, 6, 24, seed=3),
        "negative_prompt_attention_mask": torch.ones(1, 6, dtype=torch.int64),
        "negative_prompt": None,
    }
    return pipeline, {**call, "height": 32, "width": 32, "guidance_scale": 4.5, "use_resolution_binning": False}


def wan() -> Family:
    network = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=24, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    autoencoder = diffusers.AutoencoderKLWan(  # of fewer parts, so that it is traced in seconds
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1], num_res_blocks=0, temperal_downsample=[True, True],
        scale_factor_spatial=4, scale_factor_temporal=4,
    )  # fmt: skip
    pipeline = diffusers.WanPipeline(None, None, autoencoder, scheduler, randomized(network))
    call = {"prompt_embeds": embeddings(1, 6, 24), "negative_prompt_embeds": embeddings(1, 6, 24, seed=3)}
    return pipeline, {**call, "height": 16, "width": 16, "num_frames": 5, "guidance_scale": 5.0}


def flux2() -> Family:
    network = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = diffusers.Flux2Pipeline(scheduler, None, None, None, randomized(network))
    return pipeline, {"prompt_embeds": embeddings(1, 6, 32), "height": 64, "width": 64, "guidance_scale": 3.5}


def chroma() -> Family:
    network = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = diffusers.ChromaPipeline(scheduler, None, None, None, randomized(network))
    call = guided(6, 32, "prompt_attention_mask", dtype=torch.bool)
    return pipeline, {**call, "height": 64, "width": 64, "guidance_scale": 4.0}


def aura_flow() -> Family:
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=32, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    pipeline = diffusers.AuraFlowPipeline(None, None, None, randomized(network), scheduler)
    return pipeline, {**guided(6, 24, "prompt_attention_mask"), "height": 64, "width": 64, "guidance_scale": 3.5}


def hunyuan_dit() -> Family:
    network = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8, hidden_size=32,
        num_layers=2, cross_attention_dim=24, cross_attention_dim_t5=24, pooled_projection_dim=16, text_len=4,
        text_len_t5=5,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction"
    )
    pipeline = diffusers.HunyuanDiTPipeline(
        None, None, None, randomized(network), scheduler, None, None, requires_safety_checker=False
    )
    second = guided(5, 24, "prompt_attention_mask", seed=5)
    call = guided(4, 24, "prompt_attention_mask") | {f"{name}_2": value for name, value in second.items()}
    return pipeline, {**call, "height": 64, "width": 64, "guidance_scale": 5.0, "use_resolution_binning": False}


def cogvideox() -> Family:
    network = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=24, num_layers=1, sample_width=16, sample_height=16, sample_frames=9, max_text_seq_length=6,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDDIMScheduler(clip_sample=False)
    pipeline = diffusers.CogVideoXPipeline(None, None, None, randomized(network), scheduler)
    return pipeline, {**guided(6, 24), "height": 64, "width": 64, "num_frames": 5, "guidance_scale": 6.0}


def ltx() -> Family:
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=24,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = diffusers.LTXPipeline(scheduler, None, None, None, randomized(network))
    call = guided(6, 24, "prompt_attention_mask")
    return pipeline, {**call, "height": 128, "width": 128, "num_frames": 9, "guidance_scale": 3.0}


def lumina2() -> Family:
    """Its code reads the mask: one caption length for all rows, and the network is traced with one row."""
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 16, 16), cap_feat_dim=32,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    pipeline = diffusers.Lumina2Pipeline(randomized(network), scheduler, None, None, None)
    call = guided(6, 32, "prompt_attention_mask")
    return pipeline, {**call, "height": 64, "width": 64, "guidance_scale": 4.0, "cfg_normalization": False}


def z_image() -> Family:
    """Its network takes lists of rows."""
    network = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[64, 32, 32],
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = diffusers.ZImagePipeline(scheduler, None, None, None, randomized(network))
    call = {"prompt_embeds": [embeddings(6, 24)], "negative_prompt_embeds": [embeddings(6, 24, seed=3)]}
    return pipeline, {**call, "height": 64, "width": 64, "guidance_scale": 4.0}


def qwen_image() -> Family:
    """Its guided prediction is rescaled to the norm of the conditional one: no weighted sum."""
    network = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = diffusers.QwenImagePipeline(scheduler, None, None, None, randomized(network))
    return pipeline, {**guided(6, 24), "height": 64, "width": 64, "true_cfg_scale": 4.0}


FAMILIES: dict[str, Callable[[], Family]] = {
    "aura-flow": aura_flow,
    "chroma": chroma,
    "cogvideox": cogvideox,
    "flux": flux,
    "flux2": flux2,
    "hunyuan-dit": hunyuan_dit,
    "ltx": ltx,
    "lumina2": lumina2,
    "pixart-sigma": pixart_sigma,
    "qwen-image": qwen_image,
    "sana": sana,
    "sd3": sd3,
    "wan": wan,
    "z-image": z_image,
}
NOT_LINEAR = ("qwen-image",)  # their loops cannot be learned: the network is recorded alone
