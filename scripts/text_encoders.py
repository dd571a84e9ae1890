"""Text encoders in an export, float and int8: sizes, memory, and by how much embeddings of recorded prompts differ; and
the memory of a calibration that runs their pipeline with prompts.

    python scripts/text_encoders.py                                the text demo's encoder, which is trained
    python scripts/text_encoders.py clip-l t5-xxl --layers 1       CLIP ViT-L/14 whole, T5-XXL with 1 layer of 24
    python scripts/text_encoders.py t5-xxl --forms int8 prompts    T5-XXL whole

The last two lie in the directory of a pipeline with a tiny transformer: bfloat16 in shards, as save_pretrained writes
them, with random weights as large as those with which transformers begins. Each export is the command that a user
types, in a process of its own; one whose output exists is not run again. Results lie in rows.json in the folder.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from layouts import library, write_shards
from stages import apart, keep, rows_of, run_stage

PROMPTS = ("a bold red A on blue", "a thin green B over red", "a red C")
ENCODERS = ("text", "clip-l", "t5-xxl")
FORMS = {"float": "--text", "int8": "--text-int8", "prompts": "--prompts"}
FEW = ["--steps", "2", "--groups", "1", "--rows-per-group", "2", "--preset", "min-max"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("encoders", nargs="*", default=["text"], metavar="ENCODER", help=f"of {', '.join(ENCODERS)}")
    add("--layers", type=int, default=24, help="of T5-XXL")
    add("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    add("--folder", type=Path, default=Path("build/text-encoders"))
    args = parser.parse_args()
    for name in args.encoders:
        folder = args.folder / (f"{name}-{args.layers}" if name == "t5-xxl" else name)
        calls, source = folder / "calls.safetensors", "text" if name == "text" else str(folder / "pipeline")
        if not calls.exists():
            apart(prepare, folder, name, args.layers)
        for form in args.forms:
            if form == "prompts":
                table = folder / "prompts.safetensors"
                given = ["-o", str(table), "--prompts", str(folder / "prompts.txt"), *FEW]
                row = run_stage(f"{folder.name} {form}", ["calibrate", source, *given], table, again=False)
                if row is not None:
                    keep(args.folder, replace(row, size_bytes=0), error=None)
                continue
            graph = folder / f"{form}.onnx"
            given = ["--model", source, "--float", "--no-vae", "--rows", str(calls), FORMS[form]]
            row = run_stage(f"{folder.name} {form}", ["export", str(graph), *given], graph, again=False)
            if row is not None:
                size = sum(file.stat().st_size for file in folder.glob(f"{form}.text*"))
                keep(args.folder, replace(row, size_bytes=size), error=error_of(graph))
    show(args.folder)


def show(folder: Path) -> None:
    print(f"{'encoder':<18} {'graph MB':>9} {'error':>7} {'seconds':>8} {'CPU s':>7} {'peak GB':>8}")
    for name, row in rows_of(folder).items():
        error = "" if row["error"] is None else f"{row['error']:.2%}"
        print(f"{name:<18} {row['size_bytes'] / 1e6:9.1f} {error:>7} {row['seconds']:8.0f} {row['cpu_seconds']:7.0f} "
              f"{row['peak_bytes'] / 1e9:8.2f}")  # fmt: skip


def error_of(graph: Path) -> float | None:
    from tqdit.onnx_file import read_card

    card = read_card(graph).text
    assert card is not None
    return card.int8_error


def prepare(folder: Path, name: str, layers: int) -> None:
    """The directory of a pipeline and recorded calls of its prompts; the encoder is never whole in memory."""
    import torch

    import tqdit
    from tqdit.models.directories import folder_of, open_pipeline, open_texts
    from tqdit.models.weights import IN_MEMORY, return_freed_memory

    return_freed_memory()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    if name == "text":
        pipeline, weights = open_pipeline("text"), IN_MEMORY
        arguments = json.loads((Path(folder_of("text")) / "model.json").read_text())["call"]
    else:
        pipeline, arguments = write_pipeline(folder / "pipeline", name, layers)
        texts, weights = open_texts(str(folder / "pipeline"))
        pipeline.register_modules(text_encoder=texts.text_encoder)
        (folder / "pipeline" / "model.json").write_text(json.dumps({"call": arguments}))
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(), weights.lent(), tqdit.record(pipeline) as calls:
        for prompt in PROMPTS:
            pipeline(prompt, **arguments | {"output_type": "latent", "num_inference_steps": 2})
    calls.recording().save(folder / "calls.safetensors")


def write_pipeline(folder: Path, name: str, layers: int) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline for which embeddings of this width are made, and arguments of its calls; its directory has the
    large encoder in place of the tiny one.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from zoo import texts  # type: ignore[import-not-found]
    from zoo.pipelines import randomized  # type: ignore[import-not-found]

    if name == "t5-xxl":
        pipeline, arguments = texts.pixart_with_t5()
        settings = {"caption_channels": 4096}
        encoder: Any = T5EncoderModel
        config: Any = T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=layers, num_heads=64,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
    else:
        pipeline, arguments = texts.flux_with_clip()
        settings = {"pooled_projection_dim": 768}
        encoder = CLIPTextModel
        config = CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            max_position_embeddings=77, eos_token_id=1, bos_token_id=3, pad_token_id=0,
        )  # fmt: skip
    kind = getattr(library(), type(pipeline.transformer).__name__)
    transformer = randomized(kind.from_config({**pipeline.transformer.config, **settings}))
    pipeline.register_modules(transformer=transformer)
    pipeline.save_pretrained(folder)
    for file in (folder / "text_encoder").iterdir():
        file.unlink()
    write_encoder(folder / "text_encoder", encoder, config)
    return pipeline, arguments


def write_encoder(folder: Path, kind: Any, config: Any) -> None:
    """Random values, of each weight as large as transformers makes it in a network of one layer."""
    import torch

    layers, config.num_hidden_layers = config.num_hidden_layers, 1
    sizes = {
        layerless(name): (tensor.mean().item(), tensor.std(correction=0).item())
        for name, tensor in kind(config).named_parameters()
    }
    config.num_hidden_layers = layers
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in kind(config).named_parameters()}
    config.save_pretrained(folder)

    def values(name: str, shape: Any) -> Any:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(*sizes[layerless(name)])

    write_shards(folder, "model", shapes, values)


def layerless(name: str) -> str:
    return re.sub(r"\.\d+\.", ".0.", name, count=1)


if __name__ == "__main__":
    main()
