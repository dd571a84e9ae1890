"""`tqdit-export model.onnx`."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdit.bounds import check_number
from tqdit.calibration.config import presets_without_rows
from tqdit.card import ATTENTION_FORMS, DEFAULT_ATTENTION, GRAPHS, SHIPPED
from tqdit.console import Console
from tqdit.errors import UsageError
from tqdit.extras import need
from tqdit.files import check_writable
from tqdit.sampling.schedule import sampler_names

if TYPE_CHECKING:
    from tqdit.quantization.table import ScaleTable

SUMMARY = "write a diffusion transformer as one self-describing ONNX file"
EXAMPLES = """\
examples:
  tqdit-export model.onnx                                     ./scales.safetensors' model with its scales, else the
                                                              demo model in float
  tqdit-export dit.onnx --model DiT-XL-2-256x256.pt --vae sd-vae-ft-ema/
  tqdit-export dit.onnx --model DiT-XL-2-256/ --preset dynamic         int8 without a calibration
  tqdit-export dit.onnx --model DiT-XL-2-256/ --steps 50 --sampler ddim
  tqdit-export step.onnx --graph step                         for a sampler in another language

The file holds one call of the network. Steps, sampler and guidance are chosen when sampling; the file proposes what
--steps and --sampler say. A step graph computes one whole sampling step (network, guidance, update), so a sampler is a
loop and nothing else, and steps and sampler are fixed. docs/onnx-file.md describes inputs, outputs and metadata."""

DEFAULT_SCALES = Path("scales.safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("output", nargs="?", type=Path, default=Path("model.onnx"), help="ONNX file to write (default: %(default)s)")
    add("--model", help="'demo', 'text', a DiT checkpoint (.pt, .safetensors) or a diffusers directory (default: "
        "the model that the scale table names, else demo)")  # fmt: skip
    scales = parser.add_mutually_exclusive_group()
    scales.add_argument("--scales", type=Path, help="scale table that tqdit-calibrate wrote (default: "
                        f"./{DEFAULT_SCALES}, if there)")  # fmt: skip
    scales.add_argument("--float", action="store_true", help="export without quantization")
    scales.add_argument("--preset", choices=presets_without_rows(), help="quantize without a calibration: scales of "
                        "activations are found while the engine runs, those of weights before")  # fmt: skip
    add("--rows", type=Path, metavar="FILE", help="recorded calls, which tell how a pipeline's network is called: for "
        "an export without scales")  # fmt: skip
    add("--attention", choices=ATTENTION_FORMS, default=DEFAULT_ATTENTION, help="how the products of attention are "
        "quantized: rounded in float, the same as one op (for TensorRT's plugins), as integer products, or not at all "
        "(default: %(default)s)")  # fmt: skip
    add("--graph", choices=GRAPHS, default=GRAPHS[0], help="the network alone, or a whole sampling step (default: "
        "%(default)s)")  # fmt: skip
    add("--steps", type=int, help="steps of the chain that the file proposes, 1..1000 (default: those that the scales "
        "were found for, else as the model's origin samples: 250 for published checkpoints, 50 for diffusers; a model "
        "card may propose fewer, as that of the demo does)")  # fmt: skip
    add("--sampler", choices=sampler_names(), help="sampler that the file proposes (default: the one that the scales "
        "were found for, else as the model's origin samples: ddpm for published checkpoints, what the scheduler's "
        "configuration says for diffusers; a model card may propose another)")  # fmt: skip
    add("--forecast", action="store_true", help="return also what the blocks add, with which an engine forecasts calls "
        "instead of computing them: tqdit-sample --full-calls")  # fmt: skip
    add("--unguided", action="store_true", help="sample without guidance: one row per image instead of two")
    add("--opset", type=int, default=20, help="of the ONNX file, 20..23 (default: %(default)s)")
    add("--heads", type=int, metavar="N", help="attention heads, for widths outside the published family")
    add("--vae", type=Path, metavar="DIR", help="diffusers VAE whose decoder goes beside the model (default: "
        "that of the pipeline directory, if MODEL is one)")  # fmt: skip
    add("--no-vae", action="store_true", help="leave the decoder out even if the pipeline directory has one")
    add("--trace-minutes", type=float, default=120.0, metavar="M", help="give up the trace of a class that this version"
        " was not tested with after so long (default: %(default)g)")  # fmt: skip
    add("--text", action="store_true", help="the text encoders of the pipeline directory MODEL go beside the model, "
        "for tqdit-sample --prompt; refused unless they reproduce the embeddings of recorded prompts")  # fmt: skip
    add("--text-int8", action="store_true", help="the same with int8 weights, a quarter of the size; refused unless "
        "the embeddings of recorded prompts differ by less than 5 %%")  # fmt: skip
    add("--force", action="store_true", help="replace the file of another version of tqdit; those of other programs "
        "never are")  # fmt: skip


def run(args: argparse.Namespace, console: Console) -> Path:
    for library in ("torch", "onnx", "onnx_ir", "onnxscript"):
        need(library, "export", "tqdit-export")
    from tqdit.calibration.without_rows import preset_without_rows, table_without_rows
    from tqdit.exporter.graph import ExportConfig, export_graph, interface_of
    from tqdit.exporter.onnx_writer import check_overwrite, write
    from tqdit.exporter.text import trace_text
    from tqdit.exporter.vae import check_decoder, find_decoder, load_decoder, trace_decoder
    from tqdit.exporter.watch import PLACE, end_with_parent, export_in_child
    from tqdit.models.directories import check_pipeline, open_texts
    from tqdit.models.load import load_model, needs_calls
    from tqdit.models.recorded import PROVEN
    from tqdit.models.recording import as_recording
    from tqdit.models.weights import return_freed_memory

    if PLACE in os.environ:
        end_with_parent()
    output: Path = args.output
    if output.suffix != ".onnx":
        raise UsageError(f"{output}: tqdit-export writes an ONNX file. Give it a name that ends in .onnx.")
    check_writable(output)
    check_overwrite(output, args.force)
    config = ExportConfig(
        args.graph, args.steps, args.sampler, not args.unguided, args.attention, args.opset, args.forecast
    )
    if args.vae is not None:
        check_decoder(args.vae)
    table = _scale_table(args, console)
    source = args.model or ("demo" if table is None else table.model)
    with_text = args.text or args.text_int8
    if with_text:
        if not needs_calls(source) and (source in SHIPPED or Path(source).exists()):
            raise UsageError(f"{source}: this model shows classes and has no text encoders. Leave out --text.")
        check_pipeline(source)
    interface = interface_of(table, args.rows)
    family = None if interface is None else interface.signature.family
    if family is not None and family not in PROVEN and PLACE not in os.environ:
        minutes = check_number("--trace-minutes", args.trace_minutes, 1 / 60, 60 * 24 * 30)
        console.say(f"{family}: not among the classes that this version was tested with; exporting in a child process")
        code = export_in_child(args.argv, family, minutes)
        if code:
            raise SystemExit(code)  # the child has said why
        return output
    if table is not None:
        console.say(f"scales from {args.scales or DEFAULT_SCALES}")
    return_freed_memory()
    console.say(f"loading {source}")
    model = load_model(source, args.heads, interface=interface, in_memory=False)
    if args.preset is not None:
        console.say(f"scales of the weights, preset {args.preset}")
        recording = None if args.rows is None else as_recording(args.rows)
        table = table_without_rows(model, preset_without_rows(args.preset), recording)
    vae_folder = None if args.no_vae else find_decoder(model, args.vae)
    decoder = None if vae_folder is None else load_decoder(vae_folder, model)
    if decoder is not None:
        model = replace(model, latents=decoder.latents)
    console.say(f"tracing the {args.graph} graph; {config.sampling(model, table)}")
    texts = None
    if with_text:
        console.say(f"tracing the text encoders of {source}")
        pipeline, weights = open_texts(source)
        texts = trace_text(pipeline, model, output.stem, args.text_int8, weights)
    graph, card = export_graph(model, config, table)
    if card.quantization is not None:
        console.say(f"quantized {card.quantization.summary}")
    vae = None
    if decoder is not None:
        console.say(f"tracing the decoder of {vae_folder}")
        vae = trace_decoder(decoder, model)
    console.say(f"writing {output}")
    card = write(output, graph, card, vae, texts)
    if card.text is not None:
        console.say(f"text encoders {card.text.summary}")
    return output


def _scale_table(args: argparse.Namespace, console: Console) -> ScaleTable | None:
    """The scale table to export with; None for a float export, which is said, or one with a preset."""
    if args.float or args.preset is not None:
        return None
    path: Path | None = args.scales or (DEFAULT_SCALES if DEFAULT_SCALES.is_file() else None)
    if path is None:
        console.say(f"no ./{DEFAULT_SCALES}: exporting in float32. Run tqdit-calibrate first for an int8 file.")
        return None
    from tqdit.quantization.table import read_scale_table

    table = read_scale_table(path)
    if args.model is None and table.model not in SHIPPED and not Path(table.model).exists():
        raise UsageError(f"{path}: calibrated for '{table.model}', which is not there. Pass --model.")
    return table
