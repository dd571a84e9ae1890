"""Large transformers of random weights in the published layout: what each stage of the flow takes.

    python scripts/large_models.py                              Flux, 4 + 8 blocks of real width, 1024x1024
    python scripts/large_models.py --blocks 19 38 --stages int8                                all of Flux.1 (12 B)
    python scripts/large_models.py --layout pixart-sigma --stages calibrate int8 build sample
    python scripts/large_models.py --blocks 19 38 --heads 1 --size 64 --text 6 --stages trace  full depth, tiny width

Weights are bfloat16 in shards, as save_pretrained writes them. Each stage is the command that a user types, in a
process of its own; one whose output exists is not run again. What each took lies in rows.json in the folder. Without
the stage calibrate, int8 has a scale table with the ranges of the weights and made-up ranges of inputs: as large and as
slow as one that a calibration finds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from full_size import BACKENDS, RUN_HERE, Row, apart, installed, machine, run_stage, size_of

SHARD_BYTES = 2_000_000_000
STAGES = ("trace", "calibrate", "float", "int8", "build", "sample")


@dataclass(frozen=True)
class Layout:
    """A published transformer. pipeline: of a network; call: what the pipeline is called with, of a prompt's tokens."""

    blocks: tuple[int, ...]
    heads: int
    text: int  # tokens of a prompt
    network: Callable[..., Any]  # of blocks and heads; its inputs do not depend on these
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layout", choices=LAYOUTS, default="flux")
    add("--folder", type=Path, help="default: build/LAYOUT")
    add("--blocks", type=int, nargs="+", help="default: all of them; of Flux 4 8, double and single")
    add("--heads", type=int, help="of the width that the layout has; default: all of them")
    add("--size", type=int, default=1024, help="of the images")
    add("--text", type=int, help="tokens of the prompt (default: as many as the pipeline takes)")
    add("--stages", nargs="*", choices=STAGES, default=["float", "int8"], help="trace: only trace, and tell "
        "the CPU seconds of each step; none: make the weights and the scales alone")  # fmt: skip
    add("--backends", nargs="+", choices=list(BACKENDS), help="default: those that are installed")
    add("--preset", default="min-max")
    add("--groups", type=int, default=1)
    add("--rows-per-group", type=int, default=2)
    add("--token-share", type=float, default=0.02)
    add("--again", action="store_true", help="run stages whose output exists")
    args = parser.parse_args()
    layout = LAYOUTS[args.layout]
    folder: Path = args.folder or Path("build") / args.layout
    blocks = tuple(args.blocks or layout.blocks)
    if not folder.exists():
        apart(prepare, folder, args.layout, blocks, args.heads or layout.heads, args.size, args.text or layout.text)
    if "calibrate" not in args.stages and not (folder / "scales.safetensors").exists():
        apart(write_scales, folder)
    if "trace" in args.stages:
        apart(trace, folder)
    for job in jobs(args, folder):
        row = run_stage(*job, args.again)
        if row is not None:
            keep(folder, row)
    show(folder)


def jobs(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, list[str], Path]]:
    """(name, command, output) of each stage."""
    calls, found = folder / "calls.safetensors", folder / "found.safetensors"
    model = ["--model", str(folder / "transformer")]
    if "calibrate" in args.stages:
        settings = ["--preset", args.preset, "--groups", str(args.groups), "--rows-per-group",
                    str(args.rows_per_group), "--token-share", str(args.token_share)]  # fmt: skip
        command = ["calibrate", model[1], "--rows", str(calls), "-o", str(found), *settings]
        yield "calibrate", command, found
    graph = folder / "int8.onnx"
    if "float" in args.stages:
        output = folder / "float.onnx"
        yield "export float", ["export", str(output), *model, "--float", "--rows", str(calls)], output
    if "int8" in args.stages:
        scales = found if found.exists() else folder / "scales.safetensors"
        yield "export int8", ["export", str(graph), *model, "--scales", str(scales)], graph
    for backend in args.backends or [name for name in BACKENDS if installed(name)]:
        engine, samples = folder / f"{backend}.engine", folder / f"{backend}.npz"
        if "build" in args.stages:
            yield f"build {backend}", ["build", str(graph), "--backend", backend, "-o", str(engine)], engine
        if "sample" in args.stages and backend in RUN_HERE:
            given = ["--embeddings", str(calls), "-n", "1", "-o", str(samples)]
            yield f"sample {backend}", ["sample", str(engine), *given], samples


def rows_of(folder: Path) -> dict[str, Any]:
    file = folder / "rows.json"
    known: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
    return known


def keep(folder: Path, row: Row) -> None:
    facts = {"machine": machine(), "rows": {**rows_of(folder), row.stage: asdict(row)}}
    (folder / "rows.json").write_text(json.dumps(facts, indent=1) + "\n")


def show(folder: Path) -> None:
    weights = size_of(folder / "transformer")
    print(f"\n{folder.name}: {weights / 1e9:.2f} GB of bfloat16")
    print(f"{'stage':<22} {'seconds':>8} {'CPU s':>8} {'peak GB':>8} {'of the file':>12} {'written GB':>11}")
    for row in rows_of(folder).values():
        print(
            f"{row['stage']:<22} {row['seconds']:8.1f} {row['cpu_seconds']:8.1f} {row['peak_bytes'] / 1e9:8.2f} "
            f"{row['peak_bytes'] / weights:12.2f} {row['size_bytes'] / 1e9:11.3f}"
        )


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
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
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
