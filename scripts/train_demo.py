#!/usr/bin/env python
"""Train the demo model and its judge, from nothing, on images that the project draws itself.

    python scripts/train_demo.py judge            # about 5 minutes on 2 cores
    python scripts/train_demo.py model            # about 1.5 hours on 2 cores; --device cuda: a few minutes
    python scripts/train_demo.py package          # the two results into demo-weights/, in float16

Both trainings save a checkpoint every --save-minutes and resume from it; every batch is drawn from (seed, step), so
an interrupted run sees the same batches as an undisturbed one. Needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tqdit.demo.glyphs import CLASSES, IMAGE_SIZE, colour, draw, draw_masks
from tqdit.demo.judge import Judge
from tqdit.files import sha256
from tqdit.models.dit import DiT, DiTBlock, DiTConfig, FinalLayer, TimestepEmbedder
from tqdit.models.families.published import describe
from tqdit.sampling.chains import Chains, run
from tqdit.sampling.process import Diffusion
from tqdit.sampling.schedule import SamplingSpec

CONFIG = DiTConfig(
    input_size=IMAGE_SIZE, patch_size=2, in_channels=3, out_channels=6, hidden_size=128, depth=6,
    mlp_hidden_size=512, num_classes=len(CLASSES), num_heads=4,
)  # fmt: skip
NULL_CLASS = len(CLASSES)
POOL_SIZE = 131_072
JUDGE_BATCH = 128
PACKAGE_DATA = Path(__file__).resolve().parent.parent / "demo-weights" / "tqdit_demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["judge", "model", "package"])
    parser.add_argument("--folder", type=Path, default=Path("build/demo"), help="checkpoints and log (%(default)s)")
    parser.add_argument("--samples", type=int, default=1_500_000, help="images seen in all (%(default)s)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--ema-decay", type=float, default=0.9995)
    parser.add_argument("--label-dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save-minutes", type=float, default=3)
    parser.add_argument("--look-minutes", type=float, default=10, help="between sampled grids (%(default)s)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    {"judge": train_judge, "model": train_model, "package": package}[args.what](args)


# --- the model -------------------------------------------------------------------------------------------------------


def initialize(model: DiT, seed: int = 0) -> DiT:
    """Random weights for training from scratch: adaLN-Zero, so every block starts as the identity."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.xavier_uniform_(module.weight.data.view(module.weight.shape[0], -1), generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
        elif isinstance(module, TimestepEmbedder):
            for index in (0, 2):
                linear = module.mlp[index]
                assert isinstance(linear, nn.Linear)
                nn.init.normal_(linear.weight, std=0.02, generator=generator)
    for module in model.modules():
        if isinstance(module, DiTBlock | FinalLayer):
            last = module.adaLN_modulation[1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    nn.init.zeros_(model.final_layer.linear.weight)
    nn.init.zeros_(model.final_layer.linear.bias)
    return model


def train_model(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    model = initialize(DiT(CONFIG), args.seed).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "loss": float("nan"), "vb": float("nan")}
    checkpoint = args.folder / "model.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        print(f"resumed at step {state['step']}", flush=True)
    masks, labels = draw_masks(POOL_SIZE, args.seed)
    objective = Objective(device)
    steps = args.samples // args.batch
    started = time.time() - state["seconds"]
    last_save = last_look = time.time()
    while state["step"] < steps:
        step = state["step"]
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_factor(step, steps)
        rng = np.random.default_rng([args.seed, 7, step])
        x0, y = batch_of(masks, labels, rng, args.batch)
        y = np.where(rng.uniform(size=args.batch) < args.label_dropout, NULL_CLASS, y)
        t, noise = draw_timesteps(rng, args.batch), rng.standard_normal(x0.shape, np.float32)
        with torch.autocast(device.type, torch.bfloat16):
            mse, vb = objective(model, *(torch.from_numpy(v).to(device) for v in (x0, t, y, noise)))
        (mse + vb).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, min(args.ema_decay, (1 + step) / (10 + step)))
        for key, value in (("loss", mse), ("vb", vb)):
            old = state[key]
            state[key] = float(value.detach()) if math.isnan(old) else 0.995 * old + 0.005 * float(value.detach())
        state["step"] = step + 1
        state["seconds"] = time.time() - started
        if step % 200 == 0:
            rate = (step + 1) * args.batch / state["seconds"]
            print(
                f"step {step} of {steps}  mse {state['loss']:.4f}  vb {state['vb']:.4f}  "
                f"{state['seconds'] / 60:.1f} min  {rate:.0f} images/s",
                flush=True,
            )
        if time.time() - last_save > 60 * args.save_minutes or state["step"] == steps:
            save(checkpoint, {"model": model.state_dict(), "ema": ema.state_dict(),
                              "optimizer": optimizer.state_dict(), "state": state})  # fmt: skip
            last_save = time.time()
        if time.time() - last_look > 60 * args.look_minutes or state["step"] == steps:
            look(ema, args, state)
            last_look = time.time()


class Objective:
    """DiT's training loss: squared error of the noise, and the variational bound for the variance alone."""

    def __init__(self, device: torch.device) -> None:
        abar = Diffusion().alphas_cumprod
        prev = np.append(1.0, abar[:-1])
        beta = 1 - abar / prev
        posterior = beta * (1 - prev) / (1 - abar)
        posterior[0] = posterior[1]  # which is zero; improved DDPM takes its neighbour

        def table(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).float().to(device)

        self.abar = table(abar)
        self.log_beta = table(np.log(beta))
        self.log_posterior = table(np.log(posterior))
        self.mean_x0 = table(beta * np.sqrt(prev) / (1 - abar))
        self.mean_xt = table((1 - prev) * np.sqrt(1 - beta) / (1 - abar))

    def __call__(self, model: nn.Module, x0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.abar[t].view(-1, 1, 1, 1)
        xt = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        eps, fraction = model(xt, t, y).float().chunk(2, dim=1)
        mse = (eps - noise).square().mean()
        return mse, self.bound(x0, xt, t, eps.detach(), fraction).mean()

    def bound(self, x0: Tensor, xt: Tensor, t: Tensor, eps: Tensor, fraction: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p) in bits, elementwise; at t = 0 the negative log density of x_0."""

        def at(table: Tensor) -> Tensor:
            return table[t].view(-1, 1, 1, 1)

        abar = at(self.abar)
        predicted = (xt - (1 - abar).sqrt() * eps) / abar.sqrt()
        mean = at(self.mean_x0) * predicted + at(self.mean_xt) * xt
        true_mean = at(self.mean_x0) * x0 + at(self.mean_xt) * xt
        log_min, log_max = at(self.log_posterior), at(self.log_beta)
        log_variance = (fraction + 1) / 2 * log_max + (1 - fraction) / 2 * log_min
        squares = (true_mean - mean).square() * torch.exp(-log_variance)
        kl = 0.5 * (-1 + log_variance - log_min + torch.exp(log_min - log_variance) + squares)
        nll = 0.5 * (math.log(2 * math.pi) + log_variance + (x0 - mean).square() * torch.exp(-log_variance))
        return torch.where(t.view(-1, 1, 1, 1) == 0, nll, kl) / math.log(2)


def draw_timesteps(rng: np.random.Generator, count: int) -> np.ndarray:
    """A quarter uniform, the rest logit-normal around 400: the middle of the chain decides the content."""
    middle = 1 / (1 + np.exp(-rng.normal(-0.4, 1.0, count)))
    uniform = rng.uniform(size=count)
    positions = np.where(rng.uniform(size=count) < 0.25, uniform, middle)
    timesteps: np.ndarray = np.minimum(1000 * positions, 999).astype(np.int64)
    return timesteps


def batch_of(
    masks: np.ndarray, labels: np.ndarray, rng: np.random.Generator, count: int
) -> tuple[np.ndarray, np.ndarray]:
    chosen = rng.integers(0, len(masks), count)
    return to_float(colour(masks[chosen], rng)), labels[chosen]


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in -1..1."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / 127.5 - 1


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over 500 steps, constant, and a cosine to zero over the last 30 %."""
    remaining = min(1.0, (steps - step) / (0.3 * steps))
    return min(1.0, (step + 1) / 500) * 0.5 * (1 - math.cos(math.pi * remaining))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def look(ema: DiT, args: argparse.Namespace, state: dict[str, Any]) -> None:
    """Sample 160 guided images in 50 DDIM steps, save the grid and print how many the judge recognises."""
    images, labels = sample(ema, 160, args.seed)
    save_grid(args.folder / f"step{state['step']:06d}.png", images)
    judge_file = args.folder / "judge.pt"
    accuracy = float("nan")
    if judge_file.exists():
        judge = Judge()
        judge.load_state_dict(torch.load(judge_file, weights_only=True)["model"])
        accuracy = float((judge(images)[0].argmax(1) == labels).float().mean())
    print(f"look: step {state['step']}  recognised {accuracy:.3f}", flush=True)
    with (args.folder / "log.jsonl").open("a") as log:
        log.write(json.dumps({**state, "recognised": accuracy, "machine": platform.processor()}) + "\n")


def sample(network: DiT, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, H, W) in -1..1 of classes in turn, (count,)."""
    model = describe(network, "training")
    schedule = SamplingSpec(model.sampling.process, "ddim", 50).schedule
    labels = np.arange(count) % NULL_CLASS
    chains = Chains(model.signature, model.guidance, count)
    for image in range(count):
        chains.add(schedule, {"class_labels": labels[image]}, 2.0, seed, image)
    return torch.from_numpy(run(chains, model).copy()).clamp(-1, 1), torch.from_numpy(labels)


def save_grid(path: Path, images: Tensor, columns: int = 16) -> None:
    from PIL import Image

    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows, size = len(pixels) // columns, pixels.shape[1]
    grid = pixels.reshape(rows, columns, size, size, 3).transpose(0, 2, 1, 3, 4)
    image = Image.fromarray(grid.reshape(rows * size, columns * size, 3))
    image.resize((image.width * 4, image.height * 4), Image.Resampling.NEAREST).save(path)


# --- the judge -------------------------------------------------------------------------------------------------------


def train_judge(args: argparse.Namespace) -> None:
    judge = Judge()
    masks, labels = draw_masks(POOL_SIZE, args.seed + 1)

    def loss_of(rng: np.random.Generator, _: int) -> Tensor:
        x0, y = batch_of(masks, labels, rng, JUDGE_BATCH)
        logits, _ = judge(with_noise(x0, rng, 0.3))
        return F.cross_entropy(logits, torch.from_numpy(y), label_smoothing=0.05)

    fit_judge(judge, loss_of, 6000, 500, args)
    images, truth = draw(10_000, args.seed + 2)
    with torch.no_grad():
        guesses = torch.cat([judge(torch.from_numpy(to_float(part)))[0].argmax(1) for part in np.split(images, 10)])
    print(f"judge: accuracy on 10,000 fresh drawings {float((guesses.numpy() == truth).mean()):.4f}")


def fit_judge(
    judge: nn.Module, loss_of: Callable[[np.random.Generator, int], Tensor], steps: int, every: int,
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """Train judge on `loss_of(generator of the step, step)`; a checkpoint after every `every` steps, and resumed."""
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    checkpoint = args.folder / "judge.pt"
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        judge.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_of(np.random.default_rng([args.seed, 11, step]), step)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % every == every - 1 or step == steps - 1:
            save(checkpoint, {"model": judge.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
            print(f"judge: step {step + 1} of {steps}  loss {float(loss.detach()):.3f}", flush=True)


def with_noise(x0: np.ndarray, rng: np.random.Generator, most: float) -> Tensor:
    """Images with normal noise of a random strength each, at most `most`."""
    strength = rng.uniform(0, most, (len(x0), 1, 1, 1)).astype(np.float32)
    return torch.from_numpy(x0 + strength * rng.standard_normal(x0.shape, np.float32))


# --- package data ----------------------------------------------------------------------------------------------------


def package(args: argparse.Namespace) -> None:
    """Write both results as float16 safetensors into the package tqdit_demo."""
    saved = torch.load(args.folder / "model.pt", weights_only=True)
    judge = torch.load(args.folder / "judge.pt", weights_only=True)
    metadata = {"training": json.dumps(saved["state"])}
    for name, tensors, meta in (("model", saved["ema"], metadata), ("judge", judge["model"], {})):
        half = {key: value.half().contiguous() for key, value in tensors.items() if value.is_floating_point()}
        path = PACKAGE_DATA / f"{name}.safetensors"
        save_file(half, path, meta)
        print(f'"{path.name}": "{sha256(path)}"  # {path.stat().st_size / 1e6:.2f} MB; for src/tqdit/demo/weights.py')


def save(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    temporary.replace(path)


if __name__ == "__main__":
    main()
