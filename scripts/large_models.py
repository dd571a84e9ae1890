"""A large Flux of random weights in the published layout: what it takes to trace and to export it.

    python scripts/large_models.py                              4 + 8 blocks of real width, 1024x1024: float and int8
    python scripts/large_models.py --blocks 19 38               all of Flux.1 (12 B); int8 alone with --forms int8
    python scripts/large_models.py --blocks 19 38 --heads 1 --size 64 --text 6 --forms trace      full depth, tiny width

Weights are bfloat16 in shards, as save_pretrained writes them. Each export is the command that a user types, in a
process of its own. The scale table has the ranges of the weights and made-up ranges of inputs: as large and as slow as
one that a calibration finds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from full_size import apart, machine, run_stage, size_of

HEAD = 128  # width of one; Flux.1 has 24
SHARD_BYTES = 2_000_000_000
FORMS = ("float", "int8", "trace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("build/large"))
    add("--blocks", type=int, nargs=2, default=(4, 8), metavar=("DOUBLE", "SINGLE"))
    add("--heads", type=int, default=24, help=f"of width {HEAD}")
    add("--size", type=int, default=1024, help="of the images")
    add("--text", type=int, default=512, help="tokens of the prompt")
    add("--forms", nargs="*", choices=FORMS, default=list(FORMS[:2]), help="trace: only trace, and tell "
        "the CPU seconds of each step; none: make the weights and the scales alone")  # fmt: skip
    add("--again", action="store_true", help="export what exists")
    add("--json", type=Path)
    args = parser.parse_args()
    folder: Path = args.folder
    if not folder.exists():
        apart(prepare, folder, tuple(args.blocks), args.heads, args.size, args.text)
    if not (folder / "scales.safetensors").exists():
        apart(write_scales, folder)
    weights = size_of(folder / "transformer")
    rows = []
    if "trace" in args.forms:
        apart(trace, folder)
    for form in sorted({*args.forms} - {"trace"}):
        output = folder / f"{form}.onnx"
        given = ["--float", "--rows", str(folder / "calls.safetensors")]
        if form == "int8":
            given = ["--scales", str(folder / "scales.safetensors")]
        command = ["export", str(output), "--model", str(folder / "transformer"), *given]
        row = run_stage(f"export {form}", command, output, args.again)
        rows += [] if row is None else [row]
    double, single = args.blocks
    print(f"\nFlux, {double} + {single} blocks, {args.heads} heads: {weights / 1e9:.2f} GB of bfloat16")
    print(f"{'stage':<22} {'seconds':>8} {'CPU s':>8} {'peak GB':>8} {'of the file':>12} {'written GB':>11}")
    for row in rows:
        print(
            f"{row.stage:<22} {row.seconds:8.1f} {row.cpu_seconds:8.1f} {row.peak_bytes / 1e9:8.2f} "
            f"{row.peak_bytes / weights:12.2f} {row.size_bytes / 1e9:11.3f}"
        )
    if args.json:
        facts = {"machine": machine(), "weight_bytes": weights, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


def prepare(folder: Path, blocks: tuple[int, int], heads: int, size: int, text: int) -> None:
    """Recorded calls of one block of one head, and the weights of the whole network."""
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    record(draft / "calls.safetensors", size, text)
    write_weights(draft / "transformer", blocks, heads)
    draft.rename(folder)


def network_of(blocks: tuple[int, int], heads: int) -> Any:
    """Flux.1's transformer, wider or narrower, deeper or shallower. Its inputs do not depend on these."""
    import diffusers

    kind: Any = diffusers.FluxTransformer2DModel  # which ships no types
    return kind(num_layers=blocks[0], num_single_layers=blocks[1], num_attention_heads=heads, guidance_embeds=True)


def record(path: Path, size: int, text: int) -> None:
    import diffusers
    import torch

    import tqdit

    parts: Any = diffusers
    vae = parts.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=16, shift_factor=0.1159,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.3611,
    )  # fmt: skip
    scheduler = parts.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = parts.FluxPipeline(scheduler, vae, None, None, None, None, network_of((1, 1), 1).eval())
    with torch.no_grad(), tqdit.record(pipeline) as calls:
        pipeline(
            prompt_embeds=torch.randn(1, text, 4096), pooled_prompt_embeds=torch.randn(1, 768), height=size, width=size,
            num_inference_steps=2, output_type="latent",
        )  # fmt: skip
    calls.recording().save(path)


def write_weights(folder: Path, blocks: tuple[int, int], heads: int) -> None:
    """Shard by shard: the network is never whole in memory."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file

    with init_empty_weights():
        network = network_of(blocks, heads)
    folder.mkdir()
    network.save_config(folder)
    shards: list[dict[str, Any]] = [{}]
    for name, tensor in network.state_dict().items():
        if sum(each.numel() for each in shards[-1].values()) * 2 > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(shard, file)
        values = {}
        for name, tensor in shard.items():
            largest = 0.1 if tensor.ndim == 1 else (3 / tensor.shape[1]) ** 0.5
            values[name] = torch.empty(tensor.shape, dtype=torch.bfloat16).uniform_(-largest, largest)
        save_file(values, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


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


def trace(folder: Path) -> None:
    """Print the CPU seconds of each step of a trace."""
    from tqdit.exporter.graph import ExportConfig, trace_graph
    from tqdit.exporter.watch import Watch
    from tqdit.models.load import load_model
    from tqdit.models.recording import Recording

    check = Watch.check

    @contextmanager
    def timed(watch: Watch, name: str) -> Iterator[None]:
        started = time.process_time()
        with check(watch, name):
            yield
        print(f"{name:<26} {time.process_time() - started:6.1f} CPU s")

    interface = Recording.load(folder / "calls.safetensors").interface
    model = load_model(folder / "transformer", interface=interface, in_memory=False)
    setattr(Watch, "check", timed)  # noqa: B010  the checker of types takes no other signature
    graph = trace_graph(model, ExportConfig())
    print(f"{len(list(graph.graph))} nodes")


if __name__ == "__main__":
    main()
