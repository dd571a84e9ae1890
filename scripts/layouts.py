"""Published transformers of random weights, written as their authors publish them (full_size.py)."""

from __future__ import annotations

import importlib
import json
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SHARD_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Layout:
    """A published transformer of bfloat16 shards. network: of blocks and heads; its inputs do not depend on these;
    pipeline: of a network; call: what the pipeline is called with, of a prompt's tokens.
    """

    blocks: tuple[int, ...]
    heads: int
    text: int  # tokens of a prompt
    network: Callable[..., Any]
    pipeline: Callable[[Any], Any]
    call: Callable[[int], dict[str, Any]]


def flux_network(blocks: tuple[int, int], heads: int) -> Any:
    """Flux.1."""
    return library().FluxTransformer2DModel(
        num_layers=blocks[0], num_single_layers=blocks[1], num_attention_heads=heads, guidance_embeds=True
    )


def flux_pipeline(network: Any) -> Any:
    scheduler = library().FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return library().FluxPipeline(scheduler, autoencoder(16), None, None, None, None, network)


def flux_call(text: int) -> dict[str, Any]:
    return {"prompt_embeds": normal(1, text, 4096), "pooled_prompt_embeds": normal(1, 768)}


def pixart_network(blocks: tuple[int], heads: int) -> Any:
    """PixArt-Sigma-XL-2-1024-MS."""
    return library().PixArtTransformer2DModel(
        num_layers=blocks[0], num_attention_heads=heads, attention_head_dim=72, cross_attention_dim=72 * heads,
        in_channels=4, out_channels=8, sample_size=128, patch_size=2, caption_channels=4096, interpolation_scale=2,
        num_embeds_ada_norm=1000, use_additional_conditions=False,
    )  # fmt: skip


def pixart_pipeline(network: Any) -> Any:
    scheduler = library().DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    return library().PixArtSigmaPipeline(None, None, autoencoder(4), network, scheduler)


def pixart_call(text: int) -> dict[str, Any]:
    mask = normal(1, text).long() * 0 + 1
    return {
        "prompt_embeds": normal(1, text, 4096), "prompt_attention_mask": mask, "negative_prompt": None,
        "negative_prompt_embeds": normal(1, text, 4096), "negative_prompt_attention_mask": mask,
        "use_resolution_binning": False,
    }  # fmt: skip


def sd3_network(blocks: tuple[int], heads: int) -> Any:
    """Stable Diffusion 3.5 medium; the first half of the blocks and one more have a second attention."""
    return library().SD3Transformer2DModel(
        num_layers=blocks[0], num_attention_heads=heads, attention_head_dim=64, caption_projection_dim=64 * heads,
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, joint_attention_dim=4096,
        pooled_projection_dim=2048, pos_embed_max_size=384, qk_norm="rms_norm",
        dual_attention_layers=tuple(range(blocks[0] // 2 + 1)),
    )  # fmt: skip


def sd3_pipeline(network: Any) -> Any:
    scheduler = library().FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = autoencoder(16)
    return library().StableDiffusion3Pipeline(network, scheduler, vae, None, None, None, None, None, None)


def sd3_call(text: int) -> dict[str, Any]:
    return {
        "prompt_embeds": normal(1, text, 4096), "pooled_prompt_embeds": normal(1, 2048),
        "negative_prompt_embeds": normal(1, text, 4096), "negative_pooled_prompt_embeds": normal(1, 2048),
    }  # fmt: skip


LAYOUTS = {
    "flux": Layout((4, 8), 24, 512, flux_network, flux_pipeline, flux_call),
    "pixart-sigma": Layout((28,), 16, 300, pixart_network, pixart_pipeline, pixart_call),
    "sd3.5-medium": Layout((24,), 24, 333, sd3_network, sd3_pipeline, sd3_call),
}


def prepare_dit(folder: Path, depth: int, size: int) -> None:
    """DiT-XL/2 as its authors publish it, in float32, and a narrow AutoencoderKL with the shapes of Stable Diffusion's.

    Weights are not zero: a fresh DiT has zeros in adaLN, where every block is the identity.
    """
    import torch

    from tqdit.models.dit import DiT, DiTConfig, randomize

    config = DiTConfig(
        input_size=size // 8, patch_size=2, in_channels=4, out_channels=8, hidden_size=1152, depth=depth,
        mlp_hidden_size=4608, num_classes=1000, num_heads=16,
    )  # fmt: skip
    draft = draft_of(folder)
    torch.save(randomize(DiT(config)).state_dict(), draft / "dit.pt")
    library().AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    ).save_pretrained(draft / "vae")  # fmt: skip
    draft.rename(folder)


def draft_of(folder: Path) -> Path:
    """An empty folder beside it, which takes its name once it is whole."""
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def library() -> Any:
    import diffusers

    return diffusers  # which ships no types


def normal(*shape: int) -> Any:
    import torch

    return torch.randn(shape)


def autoencoder(channels: int) -> Any:
    """A narrow one of random weights."""
    return library().AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.3611,
        shift_factor=0.1159,
    )  # fmt: skip


def prepare(folder: Path, name: str, blocks: tuple[int, ...], heads: int, size: int, text: int) -> None:
    """Recorded calls of a network with few blocks of one head, and the weights of the whole network."""
    draft = draft_of(folder)
    record(draft / "calls.safetensors", LAYOUTS[name], size, text)
    write_weights(draft / "transformer", LAYOUTS[name], blocks, heads)
    draft.rename(folder)


def record(path: Path, layout: Layout, size: int, text: int) -> None:
    import torch

    import tqdit

    pipeline = layout.pipeline(layout.network((1,) * len(layout.blocks), 1).eval())
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(), tqdit.record(pipeline) as calls:
        pipeline(**layout.call(text), height=size, width=size, num_inference_steps=2, output_type="latent")
    calls.recording().save(path)


def write_weights(folder: Path, layout: Layout, blocks: tuple[int, ...], heads: int) -> None:
    """Shard by shard: the network is never whole in memory."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        network = layout.network(blocks, heads)
    folder.mkdir()
    network.save_config(folder)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    write_shards(folder, "diffusion_pytorch_model", shapes, uniform)


def write_shards(folder: Path, stem: str, shapes: dict[str, Any], values: Callable[..., Any]) -> None:
    """Safetensors files of bfloat16 and their index; values: of a name and a shape."""
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    for name in shapes:
        if sum(shapes[each].numel() for each in shards[-1]) * 2 > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(shard, file)
        save_file({name: values(name, shapes[name]) for name in shard}, folder / file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def uniform(_: str, shape: Any) -> Any:
    import torch

    largest = 0.1 if len(shape) == 1 else (3 / shape[1:].numel()) ** 0.5
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-largest, largest)


def write_scales(folder: Path) -> None:
    import numpy as np

    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from tqdit.models.load import load_model
    from tqdit.models.recording import Recording
    from tqdit.quantization.table import write_scale_table

    tables: Any = importlib.import_module("tables")
    interface = Recording.load(folder / "calls.safetensors").interface
    model = load_model(folder / "transformer", interface=interface, in_memory=False)
    ranges = {product.name: (np.array([-3, 3], np.float32),) * 2 for product in model.products}
    table = replace(tables.make_table(model, tables.Kind(groups=10), operands=ranges), interface=interface)
    write_scale_table(folder / "scales.safetensors", table)
    print(f"scales: peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB", file=sys.stderr)
