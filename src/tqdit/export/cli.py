"""`tqdit-export model.onnx`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdit.card import GRAPHS
from tqdit.console import Console
from tqdit.diffusion import SAMPLERS
from tqdit.extras import need
from tqdit.files import check_writable

SUMMARY = "write a diffusion transformer as one self-describing ONNX file"
EXAMPLES = """\
examples:
  tqdit-export model.onnx                                     the demo model, as a step graph
  tqdit-export dit.onnx --model DiT-XL-2-256x256.pt --vae sd-vae-ft-ema/
  tqdit-export dit.onnx --model DiT-XL-2-256/ --steps 50 --sampler ddim
  tqdit-export denoiser.onnx --graph denoiser                 for a scheduler of your own

A step graph computes one whole sampling step (network, guidance, variance, update), so a sampler in any language is a
loop and nothing else. Steps and sampler are fixed here; docs/onnx-file.md describes inputs, outputs and metadata."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("output", nargs="?", type=Path, default=Path("model.onnx"), help="ONNX file to write (default: %(default)s)")
    add("--model", default="demo", help="'demo', a DiT checkpoint (.pt, .safetensors) or a diffusers directory "
        "(default: %(default)s)")  # fmt: skip
    add("--float", action="store_true", help="export without quantization (all that this version can do)")
    add("--graph", choices=GRAPHS, default="step", help="one sampling step, or the bare network (default: %(default)s)")
    add("--steps", type=int, help="steps of the chain, 1..1000 (default: as the model's origin samples: 250 for "
        "published checkpoints and the demo, 50 for diffusers)")  # fmt: skip
    add("--sampler", choices=SAMPLERS, help="default: as the model's origin samples: ddpm for published checkpoints "
        "and the demo, what the scheduler's configuration says for diffusers")  # fmt: skip
    add("--unguided", action="store_true", help="no guidance_scale input and one row per image instead of two")
    add("--heads", type=int, metavar="N", help="attention heads, for widths outside the published family")
    add("--vae", type=Path, metavar="DIR", help="diffusers AutoencoderKL whose decoder goes beside the model (default: "
        "that of the pipeline directory, if MODEL is one)")  # fmt: skip
    add("--no-vae", action="store_true", help="leave the decoder out even where the pipeline directory has one")
    add("--force", action="store_true", help="overwrite a file that tqdit did not write")


def run(args: argparse.Namespace, console: Console) -> Path:
    for library in ("torch", "onnx", "onnxscript"):
        need(library, "export", "tqdit-export")
    from tqdit.export.graph import ExportConfig, export_graph
    from tqdit.export.vae import load_decoder, trace_decoder
    from tqdit.export.write import check_overwrite, write
    from tqdit.models import load_model

    output: Path = args.output
    check_overwrite(output, args.force)
    check_writable(output)
    config = ExportConfig(args.graph, args.steps, args.sampler, guided=not args.unguided)
    console.say(f"loading {args.model}")
    model = load_model(args.model, args.heads)
    spec = config.sampling(model)
    vae_folder = None if args.no_vae else args.vae or model.vae_folder
    decoder = load_decoder(vae_folder, model) if vae_folder else None
    console.say(f"tracing the {args.graph} graph: {spec.steps} steps of {spec.sampler}, in float32")
    graph, card = export_graph(model, config)
    vae = None
    if decoder is not None:
        console.say(f"tracing the decoder of {vae_folder}")
        vae = trace_decoder(decoder, model)
    console.say(f"writing {output}")
    write(output, graph, card, vae)
    return output
