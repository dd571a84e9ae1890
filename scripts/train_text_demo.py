#!/usr/bin/env python
"""Train the text demo, its text encoder and its judge, from nothing, on captioned images that the project draws itself.

    python scripts/train_text_demo.py judge
    python scripts/train_text_demo.py model
    python scripts/train_text_demo.py package     # a diffusers pipeline and the judge into demo-weights/, in float16

Both trainings save a checkpoint every --save-minutes and resume from it; every batch is drawn from (seed, step), so
an interrupted run sees the same batches as an undisturbed one. Needs the extras `demo` and `diffusers`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from train_demo import (
    JUDGE_BATCH,
    fit_judge,
    learning_rate_factor,
    save,
    save_grid,
    to_float,
    update_ema,
    with_noise,
)

from tqdit.demo import captions
from tqdit.demo.captions import IMAGE_SIZE, MAX_TOKENS, Scene
from tqdit.demo.glyphs import CLASSES
from tqdit.demo.text_judge import TextJudge, recognised, truth
from tqdit.extras import need
from tqdit.files import sha256

diffusers: Any = need("diffusers", "diffusers", "training the text demo")
transformers: Any = need("transformers", "diffusers", "training the text demo")

HEAD_WIDTH = 32
PATCH = 4
# T5's bucket of a distance between tokens (-1, 1, -2, 2) -> the head that looks there
NEIGHBOURS = {1: 0, 17: 1, 2: 2, 18: 2}
NEIGHBOUR_BIAS = 3.0
MUON_RATE = 2e-3  # matched to the size of AdamW's updates
ENCODER_RATE = 0.25  # of the learning rate: attention without T5's usual scale saturates at more
POOL_SIZE = 32_768
SAMPLES, BATCH = 900_000, 64  # of the weights that are shipped
FLOW_SHIFT = 1.0  # of the scheduler that is shipped
PROMPTS = 16  # to calibrate with
PROPOSED = {"sampler": "unipc", "steps": 8}  # docs/runtime.md, "The defaults of the demo models"
CALL = {"max_sequence_length": MAX_TOKENS, "use_resolution_binning": False, "clean_caption": False}
OPEN_WEIGHT = 0.25  # share of captions that do not name the weight
PACKAGE_DATA = Path(__file__).resolve().parent.parent / "demo-weights" / "tqdit_demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["judge", "model", "look", "package"])
    parser.add_argument("--folder", type=Path, default=Path("build/text-demo"), help="checkpoints, log (%(default)s)")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=7, help="of the transformer (%(default)s)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="images seen in all (%(default)s)")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--learning-rate", type=float, default=8e-4, help="of AdamW (%(default)s)")
    parser.add_argument("--ema-decay", type=float, default=0.9995)
    parser.add_argument("--caption-dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=POOL_SIZE, help="drawn shapes, each in any colours (%(default)s)")
    parser.add_argument("--judge-steps", type=int, default=2500)
    parser.add_argument("--compile", action="store_true", help="with torch.compile, which needs a C++ compiler")
    parser.add_argument("--save-minutes", type=float, default=3)
    parser.add_argument("--look-minutes", type=float, default=15, help="between sampled grids (%(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="of looks (%(default)s)")
    parser.add_argument("--steps", type=int, default=28, help="of looks (%(default)s)")
    parser.add_argument("--look-images", type=int, default=160, help="of each kind (%(default)s)")
    parser.add_argument("--output", type=Path, default=PACKAGE_DATA, help="of `package` (%(default)s)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    {"judge": train_judge, "model": train_model, "look": look_once, "package": package}[args.what](args)


# --- the networks ----------------------------------------------------------------------------------------------------


class Networks(nn.Module):
    """Text encoder and transformer, trained as one."""

    def __init__(self, encoder: nn.Module, transformer: nn.Module) -> None:
        super().__init__()
        self.encoder, self.transformer = encoder, transformer

    def forward(self, x: Tensor, t: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """x (N, 3, H, W), t (N,) in 0..1, ids and mask (N, tokens) to the velocity (N, 3, H, W)."""
        text = self.encoder(ids, attention_mask=mask)[0]
        velocity: Tensor = self.transformer(
            x, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=1000 * t, return_dict=False
        )[0]
        return velocity


def make_networks(seed: int, width: int, layers: int) -> Networks:
    """Random weights for training from scratch: the transformer computes zero."""
    torch.manual_seed(seed)
    encoder = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(captions.MARKS + captions.WORDS), d_model=width, d_kv=HEAD_WIDTH, d_ff=2 * width, num_layers=3,
        num_heads=width // HEAD_WIDTH, feed_forward_proj="gated-gelu", dropout_rate=0.0,
    ))  # fmt: skip
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=IMAGE_SIZE, patch_size=PATCH, in_channels=3, out_channels=3, num_layers=layers,
        num_attention_heads=width // HEAD_WIDTH, attention_head_dim=HEAD_WIDTH, cross_attention_dim=width,
        caption_channels=width, use_additional_conditions=False,
    )  # fmt: skip
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    # Which colour is the ink's is said by the words beside it, so heads begin by looking at them.
    distances = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    nn.init.zeros_(distances)
    for bucket, head in NEIGHBOURS.items():
        distances.data[bucket, head % distances.shape[1]] = NEIGHBOUR_BIAS
    patches = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.data.view(width, -1))
    nn.init.zeros_(patches.bias)
    zero = [transformer.adaln_single.linear.weight, transformer.proj_out.weight, transformer.scale_shift_table]
    for block in transformer.transformer_blocks:
        zero.append(block.scale_shift_table)
    for parameter in zero:
        nn.init.zeros_(parameter)
    return Networks(encoder, transformer)


def make_tokenizer() -> Any:
    """Words of the vocabulary in small letters, an `s` after a letter apart; anything else is <unk>."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {token: number for number, token in enumerate(captions.MARKS + captions.WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # An article is dropped, since it would be the letter A. No letter is followed by a word of three letters or more.
    article = normalizers.Replace(Regex(r"\ban?\s+(?=[a-z]{3})"), "")
    made.normalizer = normalizers.Sequence([normalizers.Lowercase(), article])
    letters = CLASSES.lower()
    plural = pre_tokenizers.Split(Regex(rf"(?<=\b[{letters}])s\b"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([plural, pre_tokenizers.Whitespace()])
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_TOKENS
    )


def tokenize(tokenizer: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """ids and mask (N, MAX_TOKENS)."""
    found = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    return found.input_ids, found.attention_mask


# --- batches ---------------------------------------------------------------------------------------------------------


def draw_pool(args: argparse.Namespace, seed: int) -> tuple[np.ndarray, list[Scene]]:
    """Shapes uint8 (N, 24, 24) and their scenes without colours; drawn once and kept in the folder."""
    file = args.folder / f"pool-{seed}-{args.pool}.npy"
    layouts = captions.draw_layouts(args.pool, np.random.default_rng([seed, 0]))
    if not file.exists():
        masks = captions.draw_masks(layouts, np.random.default_rng([seed, 1]))
        draft = file.with_suffix(".tmp")
        with draft.open("wb") as stream:
            np.save(stream, np.round(255 * masks).astype(np.uint8))
        draft.replace(file)
    return np.load(file), layouts


def batch_of(
    pool: tuple[np.ndarray, list[Scene]], rng: np.random.Generator, count: int, held_out: bool = False
) -> tuple[np.ndarray, list[Scene]]:
    """Images float32 (N, 3, 24, 24) in -1..1 and their scenes."""
    masks, layouts = pool
    chosen = rng.integers(0, len(masks), count)
    coverage = masks[chosen].astype(np.float32) / np.float32(255)
    scenes = [captions.colour_scene(layouts[index], rng, held_out) for index in chosen]
    return to_float(captions.colour(coverage, scenes, rng)), scenes


def word(scene: Scene, rng: np.random.Generator, dropout: float = 0.0) -> str:
    """A caption in one of the phrasings; some leave the weight open, and some are empty."""
    if rng.uniform() < dropout:
        return ""
    if rng.uniform() < OPEN_WEIGHT:
        scene = replace(scene, weight="")
    return captions.caption(scene, int(rng.integers(captions.PHRASINGS)))


def draw_times(rng: np.random.Generator, count: int) -> np.ndarray:
    """A quarter uniform, the rest logit-normal: the middle of the chain decides the content."""
    middle = 1 / (1 + np.exp(-rng.normal(0.2, 1.0, count)))
    times: np.ndarray = np.where(rng.uniform(size=count) < 0.25, rng.uniform(size=count), middle).astype(np.float32)
    return times


# --- the model -------------------------------------------------------------------------------------------------------


def train_model(args: argparse.Namespace) -> None:
    networks = make_networks(args.seed, args.width, args.layers)
    ema = copy.deepcopy(networks).requires_grad_(False)
    parameters = [p for p in networks.parameters() if p.requires_grad]
    optimizers = make_optimizers(networks, args.learning_rate)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "loss": float("nan")}
    checkpoint = args.folder / "model.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        networks.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        for optimizer, held in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        state = saved["state"]
        print(f"resumed at step {state['step']}", flush=True)
    size = sum(p.numel() for p in networks.transformer.parameters()) / 1e6
    print(f"transformer {size:.2f} M parameters, text encoder "
          f"{sum(p.numel() for p in networks.encoder.parameters()) / 1e6:.2f} M", flush=True)  # fmt: skip
    # PyTorch's fused attention on a CPU takes twice the time of these products, which compute the same.
    transformer: Any = networks.transformer
    transformer.set_default_attn_processor()
    forward: Any = torch.compile(networks) if args.compile else networks
    pool, tokenizer = draw_pool(args, args.seed), make_tokenizer()
    steps = args.samples // args.batch
    started = time.time() - state["seconds"]
    last_save = last_look = time.time()
    while state["step"] < steps:
        step = state["step"]
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * learning_rate_factor(step, steps)
        loss = loss_of(forward, pool, tokenizer, np.random.default_rng([args.seed, 7, step]), args)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_ema(ema, networks, min(args.ema_decay, (1 + step) / (10 + step)))
        value = float(loss.detach())
        state["loss"] = value if math.isnan(state["loss"]) else 0.995 * state["loss"] + 0.005 * value
        state["step"] = step + 1
        state["seconds"] = time.time() - started
        if step % 200 == 0:
            rate = (step + 1) * args.batch / state["seconds"]
            minutes = state["seconds"] / 60
            print(
                f"step {step} of {steps}  loss {state['loss']:.4f}  {minutes:.1f} min  {rate:.0f} images/s", flush=True
            )
        if time.time() - last_save > 60 * args.save_minutes or state["step"] == steps:
            save(checkpoint, {"model": networks.state_dict(), "ema": ema.state_dict(),
                              "optimizers": [each.state_dict() for each in optimizers], "state": state})  # fmt: skip
            last_save = time.time()
        if time.time() - last_look > 60 * args.look_minutes or state["step"] == steps:
            look(ema, args, state)
            last_look = time.time()


def make_optimizers(networks: Networks, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, which learns from fewer images; AdamW for all else.

    `peak` of a group is its highest learning rate.
    """
    blocks = networks.transformer.get_submodule("transformer_blocks")
    matrices = [p for p in blocks.parameters() if p.ndim == 2 and min(p.shape) > 6]
    text, held = [*networks.encoder.parameters()], {id(p) for p in (*matrices, *networks.encoder.parameters())}
    others = [p for p in networks.parameters() if p.requires_grad and id(p) not in held]
    groups = [{"params": others, "peak": rate}, {"params": text, "peak": ENCODER_RATE * rate}]
    return [
        torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01),
        torch.optim.Muon(
            [{"params": matrices, "peak": MUON_RATE}], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
    ]  # fmt: skip


def loss_of(
    networks: Any, pool: tuple[np.ndarray, list[Scene]], tokenizer: Any,
    rng: np.random.Generator, args: argparse.Namespace,
) -> Tensor:  # fmt: skip
    """Rectified flow: squared error of the velocity noise - x0 at x_t = (1 - t) x0 + t noise."""
    images, scenes = batch_of(pool, rng, args.batch)
    ids, mask = tokenize(tokenizer, [word(scene, rng, args.caption_dropout) for scene in scenes])
    t = torch.from_numpy(draw_times(rng, args.batch))
    x0, noise = torch.from_numpy(images), torch.from_numpy(rng.standard_normal(images.shape, np.float32))
    mixed = torch.lerp(x0, noise, t.view(-1, 1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        velocity: Tensor = networks(mixed, t, ids, mask)
    return (velocity.float() - (noise - x0)).square().mean()


# --- the pipeline ----------------------------------------------------------------------------------------------------


def make_pipeline(networks: Networks) -> Any:
    """diffusers' own pipeline. Pass use_resolution_binning=False; captions need max_sequence_length=16."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
    )
    encoder, transformer = networks.encoder.eval(), networks.transformer.eval()
    pipeline = diffusers.PixArtSigmaPipeline(make_tokenizer(), encoder, identity_vae(), transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def identity_vae() -> Any:
    """A VAE whose codes are the images (to 2e-5): the network works on pixels, but the pipeline decodes.

    Both halves end with a group normalization and SiLU. Beside x and -x the group has channels of 256 and -256, so the
    mean is 0 and the deviation 128, which the norm's weight takes back. silu(x) - silu(-x) = x.
    """
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=1, latent_channels=3, scaling_factor=1.0, sample_size=IMAGE_SIZE,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip
    for parameter in vae.parameters():  # residual blocks add nothing
        parameter.zero_()
    for half in (vae.encoder, vae.decoder):
        half.conv_norm_out.weight.fill_(128)
        half.conv_in.bias[6:] = torch.tensor([256.0, -256.0])
        for channel in range(3):
            half.conv_in.weight[[channel, channel + 3], channel, 1, 1] = torch.tensor([1.0, -1.0])
            half.conv_out.weight[channel, [channel, channel + 3], 1, 1] = torch.tensor([1.0, -1.0])
    vae.encoder.conv_out.bias[3:] = -30  # log of the variance
    return vae.eval()


def sample(networks: Networks, prompts: list[str], args: argparse.Namespace) -> Tensor:
    """Images (N, 3, 24, 24) in -1..1."""
    pipeline = make_pipeline(networks)
    images = pipeline(
        prompts, num_inference_steps=args.steps, guidance_scale=args.guidance, output_type="latent",
        generator=torch.Generator().manual_seed(args.seed), **CALL,
    ).images  # fmt: skip
    clamped: Tensor = images.clamp(-1, 1)
    return clamped


def look(networks: Networks, args: argparse.Namespace, state: dict[str, Any]) -> None:
    """Sample trained and held-out scenes, save their grids and print how many the judge recognises."""
    judge_file, judge = args.folder / "judge.pt", None
    if judge_file.exists():
        judge = TextJudge()
        judge.load_state_dict(torch.load(judge_file, weights_only=True)["model"])
    for kind in ("trained", "held out"):
        rng = np.random.default_rng([args.seed, 13])
        scenes = captions.draw_scenes(args.look_images, rng, held_out=kind == "held out")
        prompts = [captions.caption(scene, int(rng.integers(captions.PHRASINGS))) for scene in scenes]
        images = sample(networks, prompts, args)
        save_grid(args.folder / f"step{state['step']:06d}-{kind.replace(' ', '-')}.png", images)
        found = recognised(images, scenes, judge) if judge else {}
        shares = {name: round(float(right.mean()), 3) for name, right in found.items()}
        print(f"look: step {state['step']}  {kind}, guidance {args.guidance:g}: {shares}", flush=True)
        with (args.folder / "log.jsonl").open("a") as log:
            log.write(json.dumps({**state, "scenes": kind, "guidance": args.guidance, "recognised": shares}) + "\n")


def look_once(args: argparse.Namespace) -> None:
    saved = torch.load(args.folder / "model.pt", weights_only=True)
    networks = make_networks(args.seed, args.width, args.layers)
    networks.load_state_dict(saved["ema"])
    look(networks, args, saved["state"])


# --- the judge -------------------------------------------------------------------------------------------------------


def train_judge(args: argparse.Namespace) -> None:
    judge = TextJudge()
    pool = draw_pool(args, args.seed + 1)

    def loss_of(rng: np.random.Generator, step: int) -> Tensor:
        x0, scenes = batch_of(pool, rng, JUDGE_BATCH, held_out=step % 4 == 0)
        logits = judge(with_noise(x0, rng, 0.2))
        return torch.stack([
            F.cross_entropy(logits[name], torch.from_numpy(wanted), label_smoothing=0.05)
            for name, wanted in truth(scenes).items()
        ]).sum()  # fmt: skip

    fit_judge(judge, loss_of, args.judge_steps, 250, args)
    rng = np.random.default_rng([args.seed + 2])
    scenes = captions.draw_scenes(4_000, rng) + captions.draw_scenes(1_000, rng, held_out=True)
    images = torch.from_numpy(to_float(captions.colour(captions.draw_masks(scenes, rng), scenes, rng)))
    shares = {name: round(float(right.mean()), 4) for name, right in recognised(images, scenes, judge).items()}
    print(f"judge: accuracy on 5,000 new drawings {shares}")


# --- package data ----------------------------------------------------------------------------------------------------


def package(args: argparse.Namespace) -> None:
    """Write the pipeline (folder `text`) and the judge, both float16, into the package tqdit_demo."""
    saved = torch.load(args.folder / "model.pt", weights_only=True)
    judge = torch.load(args.folder / "judge.pt", weights_only=True)["model"]
    networks = make_networks(args.seed, args.width, args.layers)
    networks.load_state_dict(saved["ema"])
    folder = args.output / "text"
    write_pipeline(networks, folder)
    (folder / "training.json").write_text(json.dumps(saved["state"]) + "\n")
    (folder / "model.json").write_text(json.dumps(card(args), indent=1) + "\n")
    save_file({key: value.half().contiguous() for key, value in judge.items()}, folder / "judge.safetensors")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        print(f'"{path.relative_to(args.output)}": "{sha256(path)}",')
    print(
        f"{sum(path.stat().st_size for path in files) / 1e6:.2f} MB; the lines above are for src/tqdit/demo/weights.py"
    )


def card(args: argparse.Namespace) -> dict[str, Any]:
    """How tqdit-calibrate calls the pipeline (`PipelineCard`), and captions that it does so with."""
    rng = np.random.default_rng([args.seed, 17])
    scenes = captions.draw_scenes(PROMPTS, rng)
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, **CALL}
    return {
        "call": call,
        "prompts": [captions.caption(scene, int(rng.integers(captions.PHRASINGS))) for scene in scenes],
        "proposed": PROPOSED,
    }


def write_pipeline(networks: Networks, folder: Path) -> None:
    """The pipeline's directory in float16, new from the start, which `from_pretrained` reads as float32.

    Without the entry `dtype` transformers would keep the text encoder in float16, beside a float32 transformer. The
    tokenizer has the name that its class has in transformers 4, too.
    """
    shutil.rmtree(folder, ignore_errors=True)
    make_pipeline(networks).to(torch.float16).save_pretrained(folder)
    for name, old, new in (
        ("text_encoder/config.json", '"dtype": "float16"', '"dtype": "float32"'),
        ("model_index.json", "TokenizersBackend", "PreTrainedTokenizerFast"),
        ("tokenizer/tokenizer_config.json", "TokenizersBackend", "PreTrainedTokenizerFast"),
    ):
        file = folder / name
        file.write_text(file.read_text().replace(old, new))


if __name__ == "__main__":
    main()
