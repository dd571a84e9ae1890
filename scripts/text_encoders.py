"""Text encoders in an export, float and int8: sizes, and by how much the embeddings of recorded prompts differ.

    python scripts/text_encoders.py                     the text demo's encoder, which is trained
    python scripts/text_encoders.py clip-l t5-xxl       CLIP ViT-L/14 whole, T5-XXL with --layers

Weights of the last two are as transformers initialises them.
Each export runs in a process of its own. A file that exists is not made again; results lie in rows.json in the folder.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from full_size import apart, machine

PROMPTS = ("a bold red A on blue", "a thin green B over red", "a red C")
ENCODERS = ("text", "clip-l", "t5-xxl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("encoders", nargs="*", default=["text"], metavar="ENCODER", help=f"of {', '.join(ENCODERS)}")
    add("--layers", type=int, default=2, help="of T5-XXL's 24")
    add("--folder", type=Path, default=Path("build/text-encoders"))
    args = parser.parse_args()
    for name in args.encoders:
        for form in ("float", "int8"):
            folder = (
                args.folder / f"{name}-{args.layers}-{form}" if name == "t5-xxl" else args.folder / f"{name}-{form}"
            )
            if not folder.exists():
                apart(export, folder, name, args.layers, form == "int8")
    rows = {file.parent.name: json.loads(file.read_text()) for file in sorted(args.folder.glob("*/row.json"))}
    (args.folder / "rows.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print(f"{'encoder':<18} {'parameters':>12} {'graph MB':>9} {'error':>9} {'CPU s':>7} {'peak GB':>8}")
    for name, row in rows.items():
        error = "" if row["error"] is None else f"{row['error']:.2%}"
        print(f"{name:<18} {row['parameters']:12,} {row['bytes'] / 1e6:9.1f} {error:>9} {row['cpu_seconds']:7.0f} "
              f"{row['peak_bytes'] / 1e9:8.2f}")  # fmt: skip


def export(folder: Path, name: str, layers: int, int8: bool) -> None:
    """Record three prompts and write the encoders."""
    import torch

    import tqdit
    from tqdit.exporter.text import trace_text
    from tqdit.models.recorded import recorded_model

    pipeline, arguments = pipeline_of(name, layers)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(), tqdit.record(pipeline) as calls:
        for prompt in PROMPTS:
            pipeline(prompt, output_type="latent", **{"num_inference_steps": 2} | arguments)
    model = recorded_model(pipeline.transformer, calls.recording().interface)
    started = time.process_time()
    folder.mkdir(parents=True)
    card = trace_text(pipeline, model, "x", int8).write(folder, "x")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parameters = sum(p.numel() for key in vars(pipeline) if key.startswith("text_encoder")
                     for p in getattr(pipeline, key).parameters())  # fmt: skip
    size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".json")
    facts = {"parameters": parameters, "bytes": size, "error": card.int8_error, "peak_bytes": peak,
             "cpu_seconds": time.process_time() - started}  # fmt: skip
    (folder / "row.json").write_text(json.dumps(facts))


def pipeline_of(name: str, layers: int) -> tuple[Any, dict[str, Any]]:
    """A pipeline with a tiny transformer for which embeddings of this width are made, and arguments of its calls."""
    if name == "text":
        from tqdit.models.directories import folder_of, open_pipeline

        card = json.loads((Path(folder_of("text")) / "model.json").read_text())
        return open_pipeline("text"), {**card["call"], "num_inference_steps": 2}
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    from zoo import texts  # type: ignore[import-not-found]
    from zoo.pipelines import randomized  # type: ignore[import-not-found]

    if name == "t5-xxl":
        pipeline, arguments = texts.pixart_with_t5()
        config = T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=layers, num_heads=64,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        settings = {**pipeline.transformer.config, "caption_channels": 4096}
        encoder: Any = T5EncoderModel(config)
    else:
        pipeline, arguments = texts.flux_with_clip()
        clip = CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            max_position_embeddings=77, eos_token_id=1, bos_token_id=3, pad_token_id=0,
        )  # fmt: skip
        settings = {**pipeline.transformer.config, "pooled_projection_dim": 768}
        encoder = CLIPTextModel(clip)
    kind: Any = getattr(diffusers, type(pipeline.transformer).__name__)
    pipeline.register_modules(transformer=randomized(kind.from_config(settings)), text_encoder=encoder.eval())
    return pipeline, arguments


if __name__ == "__main__":
    main()
