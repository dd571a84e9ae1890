"""Speed and error of int8 engines of text-to-image transformers beside what a user would pick instead, in one run.

    python benchmarks/families.py                             PixArt-Sigma, SD3.5-medium, Flux and Sana at 512x512
    python benchmarks/families.py --only flux --size 1024     one of them, larger
    python benchmarks/families.py --json docs/results/families.json

Each network has the width, the heads and the text of the published one and few blocks with random weights, which are as
slow as trained ones; Flux has one double and two single blocks. Errors of random weights say that an engine is right,
not what it makes of a picture. A call has two rows where the pipeline guides, and one of Flux. Every engine runs once
per round, in turn. The table has medians over the rounds with their quartiles in milliseconds, the speed against ONNX
Runtime's float32, and the relative squared error of a call's prediction against PyTorch float32.

OpenVINO with int8 weights is what optimum-intel gives (nncf.compress_weights); the row needs pip install nncf.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import tqdit
from engines import int8_weights, machine, openvino_default, ours
from tqdit.models.load import load_model
from tqdit.models.loaded import LoadedModel

Inputs = Mapping[str, NDArray[Any]]
Network = Callable[[Inputs], NDArray[np.float32]]
CALLS = 4  # recorded for the scales; one more is measured
KNOBS: dict[str, Any] = {"groups": 2, "rounds": 1, "candidates": 10, "token_share": 0.05}
LABELS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
BASE = "ONNX Runtime float32"


@dataclass(frozen=True)
class Shape:
    """How large a network is: of the published one, or tiny for the tests."""

    blocks: int
    heads: int  # times the published size of a head, or 16
    head: int
    text: tuple[int, int]  # tokens and channels
    side: int  # of the latents


@dataclass(frozen=True)
class Row:
    """One engine of one network."""

    family: str
    name: str
    milliseconds: tuple[float, ...]  # of a call, every round
    error: float | None  # None for the reference

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)


Example = tuple[nn.Module, Callable[[torch.Generator], dict[str, Any]]]  # a network, and what makes a call of it


def normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw)


def times(draw: torch.Generator, rows: int, scale: float) -> Tensor:
    """One timestep for all rows."""
    return (torch.rand(1, generator=draw) * scale).expand(rows)


def pixart(shape: Shape) -> Example:
    import diffusers

    tokens, channels = shape.text
    network = diffusers.PixArtTransformer2DModel(
        sample_size=shape.side, num_layers=shape.blocks, patch_size=2, attention_head_dim=shape.head,
        num_attention_heads=shape.heads, in_channels=4, out_channels=8, cross_attention_dim=shape.heads * shape.head,
        caption_channels=channels, use_additional_conditions=False, num_embeds_ada_norm=1000,
    )  # fmt: skip
    mask = torch.ones(2, tokens, dtype=torch.int64)
    return network, lambda draw: {
        "hidden_states": normal(draw, 2, 4, shape.side, shape.side), "timestep": times(draw, 2, 999),
        "encoder_hidden_states": normal(draw, 2, tokens, channels), "encoder_attention_mask": mask,
    }  # fmt: skip


def sd3(shape: Shape) -> Example:
    import diffusers

    tokens, channels = shape.text
    width = shape.heads * shape.head
    network = diffusers.SD3Transformer2DModel(
        sample_size=shape.side, patch_size=2, in_channels=16, num_layers=shape.blocks, attention_head_dim=shape.head,
        num_attention_heads=shape.heads, joint_attention_dim=channels, caption_projection_dim=width,
        pooled_projection_dim=channels // 2, out_channels=16, pos_embed_max_size=max(192, shape.side),
        dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return network, lambda draw: {
        "hidden_states": normal(draw, 2, 16, shape.side, shape.side), "timestep": times(draw, 2, 1000),
        "encoder_hidden_states": normal(draw, 2, tokens, channels),
        "pooled_projections": normal(draw, 2, channels // 2),
    }  # fmt: skip


def flux(shape: Shape) -> Example:
    import diffusers

    (tokens, channels), axis = shape.text, 2 * (shape.head * 7 // 32)
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=shape.blocks // 2, num_single_layers=shape.blocks,
        attention_head_dim=shape.head, num_attention_heads=shape.heads, joint_attention_dim=channels,
        pooled_projection_dim=768, axes_dims_rope=(shape.head - 2 * axis, axis, axis), guidance_embeds=True,
    )  # fmt: skip
    side = shape.side // 2
    places = torch.stack([torch.zeros(side * side), torch.arange(side).repeat_interleave(side),
                          torch.arange(side).repeat(side)], 1)  # fmt: skip
    return network, lambda draw: {
        "hidden_states": normal(draw, 1, side * side, 64), "timestep": times(draw, 1, 1.0),
        "encoder_hidden_states": normal(draw, 1, tokens, channels), "pooled_projections": normal(draw, 1, 768),
        "guidance": torch.full((1,), 3.5), "img_ids": places, "txt_ids": torch.zeros(tokens, 3),
    }  # fmt: skip


def sana(shape: Shape) -> Example:
    import diffusers

    tokens, channels = shape.text
    side = max(1, shape.side // 4)  # its decoder enlarges 32 times, those of the others 8 times
    width = shape.heads * shape.head
    cross = max(1, shape.heads * 2 // 7)
    network = diffusers.SanaTransformer2DModel(
        in_channels=32, out_channels=32, num_layers=shape.blocks, num_attention_heads=shape.heads,
        attention_head_dim=shape.head, num_cross_attention_heads=cross, cross_attention_head_dim=width // cross,
        cross_attention_dim=width, caption_channels=channels, mlp_ratio=2.5, sample_size=side, patch_size=1,
    )  # fmt: skip
    mask = torch.ones(2, tokens, dtype=torch.int64)
    return network, lambda draw: {
        "hidden_states": normal(draw, 2, 32, side, side), "timestep": times(draw, 2, 1000),
        "encoder_hidden_states": normal(draw, 2, tokens, channels), "encoder_attention_mask": mask,
    }  # fmt: skip


# What makes the network, and its published size without the side: blocks, heads, their size, text.
FAMILIES: dict[str, tuple[Callable[[Shape], Example], tuple[int, int, int, tuple[int, int]]]] = {
    "pixart-sigma": (pixart, (2, 16, 72, (300, 4096))),
    "sd3.5-medium": (sd3, (2, 24, 64, (333, 4096))),
    "flux": (flux, (2, 24, 128, (512, 4096))),
    "sana": (sana, (2, 70, 32, (300, 2304))),
}
TINY: dict[str, tuple[int, int, int, tuple[int, int]]] = {
    "pixart-sigma": (1, 2, 16, (6, 24)), "sd3.5-medium": (2, 2, 16, (6, 24)), "flux": (2, 2, 16, (6, 24)),
    "sana": (1, 7, 16, (6, 24)),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    add("--size", type=int, default=512, help="side of the picture in pixels (default: %(default)s)")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=11)
    add("--preset", default="fast", help="of our engines (default: %(default)s)")
    add("--attention", default="simulated", help="form of attention in our engines (default: %(default)s)")
    add(
        "--rows-per-group", type=int, default=2, help="rows of 2 groups that scales are found on (default: %(default)s)"
    )
    add("--tiny", action="store_true", help="networks of no size, to see that all of it works")
    add("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for family in args.only:
        with tempfile.TemporaryDirectory() as temporary:
            found = bench(family, args, Path(temporary))
        show(found, rows == [], args)
        rows += found
        gc.collect()  # gigabytes, before the next network
    if args.json:
        facts = {"settings": vars(args), "machine": machine(), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(facts, indent=1, default=str) + "\n")


def bench(family: str, args: argparse.Namespace, folder: Path) -> list[Row]:
    """All engines of one network, each once per round."""
    make, published = FAMILIES[family]
    network, example = make(Shape(*(TINY[family] if args.tiny else published), args.size // 8))
    randomize(network)
    with torch.no_grad(), tqdit.record(network) as calls:
        for seed in range(CALLS):
            network(**example(torch.Generator().manual_seed(seed)))
    recording = calls.recording()
    network.save_pretrained(folder / "network")  # from where it is calibrated in slices
    del network
    model = load_model(folder / "network", interface=recording.interface)
    given = example(torch.Generator().manual_seed(CALLS))
    inputs = {name: given[name].numpy().astype(port.dtype) for name, port in zip(
        model.signature.names, model.signature.ports, strict=True)}  # fmt: skip
    engines = {}
    for name, prepare in contenders(model, calls, args, folder):
        print(f"{family}: preparing {name}", file=sys.stderr, flush=True)
        engines[name] = prepare()
        gc.collect()
    expected = model(inputs).astype(np.float64)
    outputs = {name: run(inputs).astype(np.float64) for name, run in engines.items()}  # warms up
    timed: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(args.rounds):
        for name, run in engines.items():
            started = time.perf_counter()
            run(inputs)
            timed[name].append(1000 * (time.perf_counter() - started))
    energy = np.square(expected).sum()
    errors = {name: float(np.square(found - expected).sum() / energy) for name, found in outputs.items()}
    return [Row(family, name, tuple(timed[name]), errors[name]) for name in engines]


def randomize(network: nn.Module) -> None:
    """Every parameter non-zero: diffusers initialises some with zeros, where a block is the identity."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(generator=draw)
            if parameter.ndim > 1:
                parameter.mul_(0.8 / parameter[0].numel() ** 0.5)
            else:
                parameter.mul_(0.1).add_(float("norm" in name and name.endswith("weight")))
    network.eval().requires_grad_(False)


def contenders(
    model: LoadedModel, calls: Any, args: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, Callable[[], Network]]]:
    """(name, what prepares it) of every row."""
    table = tqdit.calibrate(model, preset=args.preset, rows=calls, work=folder / "work",
                            rows_per_group=args.rows_per_group, **KNOBS)  # fmt: skip
    scaled = tqdit.export(model, folder / "int8.onnx", scales=table, attention=args.attention)
    flat = tqdit.export(model, folder / "float.onnx")
    gc.collect()  # before engines hold memory, too
    yield BASE, lambda: ours(flat, "onnxruntime", args.threads)
    yield "OpenVINO default", lambda: openvino_default(flat, args.threads)
    if find_spec("nncf"):
        yield "OpenVINO int8 weights", lambda: int8_weights(flat, args.threads)
    for backend, label in LABELS.items():
        yield f"ours {args.preset}, {label}", lambda backend=backend: ours(scaled, backend, args.threads)  # type: ignore[misc]


def show(rows: list[Row], first: bool, args: argparse.Namespace) -> None:
    base = next(row.median for row in rows if row.name == BASE)
    if first:
        print(f"\nOne call at {args.size}x{args.size}, {args.threads} threads, {args.rounds} rounds; {machine()}\n")
        print("| network | engine | ms per call (quartiles) | against ONNX Runtime float32 | error |")
        print("|---|---|---|---|---|")
    for row in rows:
        low, _, high = statistics.quantiles(row.milliseconds, n=4)
        print(f"| {row.family} | {row.name} | {row.median:.0f} ({low:.0f} to {high:.0f}) | {base / row.median:.2f}x | "
              f"{row.error:.1e} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
