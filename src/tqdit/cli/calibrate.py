"""`tqdit-calibrate [MODEL] -o scales.safetensors`."""

from __future__ import annotations

import argparse
import inspect
import logging
import time
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdit.bounds import MOST_SIDE, check_count
from tqdit.calibration.advice import read_advice
from tqdit.calibration.config import PRESETS, TQ_DIT, QuantizationConfig, choices_of, default_preset, flag
from tqdit.console import Console
from tqdit.engines.backends import backend_names
from tqdit.errors import OutputError, TqditError, UsageError, first_line
from tqdit.extras import need
from tqdit.files import LOCK, check_writable, lock_folder
from tqdit.text import read_prompts

if TYPE_CHECKING:
    from tqdit.models.model_card import PipelineCard
    from tqdit.models.recording import Recording

SUMMARY = "find the scales that turn a float diffusion transformer into integers"
EXAMPLES = """\
examples:
  tqdit-calibrate                                             the demo model, W8A8, to scales.safetensors
  tqdit-calibrate DiT-XL-2-256x256.pt -o xl.safetensors
  tqdit-calibrate --weight-bits 6 --activation-bits 6 --preset tq-dit
  tqdit-calibrate --calls 12                                  also where the steps of chains of 12 calls lie best
  tqdit-calibrate --calls 12 --forecast                       and whether forecasts between these calls help
  tqdit-calibrate --preset paper --print                      every setting of a preset
  tqdit-calibrate text                                        the text demo, W8A8
  tqdit-calibrate FLUX/ --prompts prompts.txt --steps 28      a pipeline of text: one prompt per line
  tqdit-calibrate FLUX/ --rows calls.safetensors              calls that were recorded before

A preset is a set of all knobs; a flag changes one of them. The work folder beside the output (its name with .work)
keeps what was done: after a kill the same command continues and ends with the same bytes. Then only the calibration
rows stay there, for further searches; you may delete the folder. docs/calibration.md explains methods and presets."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", default="demo", metavar="MODEL", help="'demo', 'text', a DiT checkpoint (.pt, "
        ".safetensors) or a diffusers directory (default: %(default)s)")  # fmt: skip
    add("-o", "--output", type=Path, default=Path("scales.safetensors"), help="scale table to write (default: "
        "%(default)s)")  # fmt: skip
    add("--preset", choices=list(PRESETS), help="every knob at once: dynamic, no search, scales at run time; gptq, "
        "scales per token and GPTQ; best, the least error, slow; tq-dit, the paper's method as we read it; paper, to "
        "the letter; fast, static scales and two regions only if they pay; static, all static scales that pay; "
        "q-diffusion, ptqd, ptq4dit, q-dit, adatsq, vidit-q and svdquant, after these papers; and the rows of the "
        "ablation (default: dynamic at 8 bits, gptq at fewer, fast for TensorRT)")  # fmt: skip
    add("--backend", choices=backend_names(), help="engine that the table is for; it decides the preset if none is "
        "given, and nothing else: a table is for every engine (default: one on a CPU)")  # fmt: skip
    add("--data", type=Path, metavar="FILE", help="an .npz of your own images or latents, with labels (or an array for "
        "each request port), noised with known noise, instead of the model's own chains")  # fmt: skip
    add("--prompts", type=Path, metavar="FILE", help="run the pipeline of the diffusers directory MODEL with each line "
        "of a text file, and take rows from its chains (any transformer class)")  # fmt: skip
    for side in ("--height", "--width"):
        add(side, type=int, metavar="N", help="of the images of --prompts, in pixels (default: the pipeline's own)")
    add("--frames", type=int, metavar="N", help="of the videos of --prompts (default: the pipeline's own)")
    add("--rows", type=Path, metavar="FILE", help="recorded calls (tqdit.record), a .safetensors file, in place of the "
        "model's own chains")  # fmt: skip
    add("--from-diagnosis", type=Path, metavar="FILE", help="in place of --preset: the settings and the advice of a "
        "diagnosis.json that tqdit-evaluate --layers wrote")  # fmt: skip
    add("--heads", type=int, metavar="N", help="attention heads, for widths outside the published family")
    add("--work", type=Path, metavar="DIR", help="folder for intermediate results (default: OUTPUT.work)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute (default: a GPU that "
        "PyTorch can use, else the CPU)")  # fmt: skip
    add("--print", action="store_true", dest="print_config", help="print every setting and stop")
    knobs = parser.add_argument_group("knobs, each one setting of the preset (defaults: those of tq-dit)")
    for knob in fields(TQ_DIT):
        text, default = knob.metadata["help"], getattr(TQ_DIT, knob.name)
        options: dict[str, Any] = {"dest": knob.name, "default": None}
        if default not in (None, ""):
            text += f" (default: {default})"
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, str) and choices_of(knob):
            options["choices"] = choices_of(knob)
            if knob.metadata["alone"]:
                options |= {"nargs": "?", "const": knob.metadata["alone"]}
        elif isinstance(default, str):
            options["metavar"] = "TEXT"
        else:
            options["type"] = float if isinstance(default, float) or knob.name == "guidance_scale" else int
            options["metavar"] = "X" if options["type"] is float else "N"
        knobs.add_argument(flag(knob), help=text, **options)


def run(args: argparse.Namespace, console: Console) -> Path | None:
    for library in ("torch", "safetensors"):
        need(library, "calibrate", "tqdit-calibrate")
    from tqdit.calibration.cost import peak_memory_bytes
    from tqdit.calibration.data import check_data, read_data
    from tqdit.calibration.device import choose_device, peak_device_bytes
    from tqdit.calibration.drift import check_group_count
    from tqdit.calibration.flow import calibrate
    from tqdit.models.load import load_model
    from tqdit.models.weights import return_freed_memory
    from tqdit.quantization.table import is_scale_table, write_scale_table

    changes = {f.name: getattr(args, f.name) for f in fields(TQ_DIT) if getattr(args, f.name) is not None}
    diagnosed = None if args.from_diagnosis is None else read_advice(args.from_diagnosis)
    bits = args.weight_bits or TQ_DIT.weight_bits, args.activation_bits or TQ_DIT.activation_bits
    preset = args.preset or default_preset(*bits, args.backend)
    config = replace(PRESETS[preset] if diagnosed is None else diagnosed.config, **changes)
    if args.print_config:
        print(config)
        return None
    output: Path = args.output
    check_writable(output)
    if output.exists() and not (output.is_file() and is_scale_table(output)):
        raise OutputError(f"{output}: exists and is not a scale table. Choose another name, or remove it.")
    if sum(each is not None for each in (args.prompts, args.rows, args.data)) > 1:
        raise UsageError("--prompts, --rows and --data each say where rows come from. Pass one of them.")
    asked = _pipeline_card(args)
    for name in ("height", "width", "frames"):
        if (size := getattr(args, name)) is not None:
            check_count(f"--{name}", size, 1, MOST_SIDE)
            if not asked.prompts:
                raise UsageError(f"--{name} is of the images of --prompts. Leave it out.")
    if asked.prompts and config.steps is not None and config.groups > config.steps:
        raise UsageError(f"--groups is {config.groups}, --steps {config.steps}. Pass at most as many groups as steps.")
    work = args.work or output.with_name(f"{output.name}.work")
    check_writable(work / LOCK)
    if args.data is not None:
        check_data(args.data)
    if asked.prompts and config.steps is not None:
        check_group_count(config.groups, config.steps)
    started = time.monotonic()
    if args.preset is None and diagnosed is None:
        console.say(f"preset {preset}, the default at W{config.weight_bits}A{config.activation_bits}")
    console.say(f"loading {args.model}")
    device = choose_device(args.device)
    return_freed_memory()
    with lock_folder(work) if asked.prompts else nullcontext():  # the pipeline is most of the work
        recording = _recording(args, asked, config, work, console)
    if asked.prompts:  # the pipeline had it: its loop's, which is learned, or an input of its network
        config = replace(config, guidance_scale=None)
    interface = None if recording is None else recording.interface
    in_memory = device.type != "cpu"
    model = load_model(args.model, args.heads, interface=interface, in_memory=in_memory).to(device)
    if diagnosed is not None:
        diagnosed.check_model(model.fingerprint, args.model)
    data = read_data(args.data, model) if args.data else recording
    with lock_folder(work):  # two runs would remove each other's results
        result = calibrate(model, config, work, console, data)
        write_scale_table(output, result.table)
        result.folder.delete()
    spent = result.meter.forward_equivalents
    phases = ", ".join(f"{phase} {count:,.0f}" for phase, count in spent.items())
    seconds = time.monotonic() - started
    console.say(
        f"{len(result.table.sites)} tensors of {len(result.table.by_module)} layers in {seconds:.0f} s, "
        f"peak memory {_memory(peak_memory_bytes(), peak_device_bytes(device))}, "
        f"{sum(spent.values()):,.0f} forward-equivalents of one row" + (f" ({phases})" if phases else "")
    )
    return output


def _pipeline_card(args: argparse.Namespace) -> PipelineCard:
    """The prompts that a pipeline is to run with, none for any other model, and the arguments of its calls."""
    from tqdit.models.directories import folder_of
    from tqdit.models.load import needs_calls
    from tqdit.models.model_card import PipelineCard, read_pipeline_card

    prompts = None if args.prompts is None else tuple(read_prompts(args.prompts))
    if args.rows is not None or args.data is not None:
        return PipelineCard()
    known = needs_calls(args.model)
    card = read_pipeline_card(Path(folder_of(args.model))) if known else PipelineCard()
    flags = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, "height": args.height,
             "width": args.width, "num_frames": args.frames}  # fmt: skip
    told = {name: value for name, value in flags.items() if value is not None}
    return PipelineCard(call=card.call | told, prompts=card.prompts if prompts is None else prompts)


def _recording(
    args: argparse.Namespace, asked: PipelineCard, config: QuantizationConfig, work: Path, console: Console
) -> Recording | None:
    """The calls of --rows, or those of a pipeline that runs here with prompts and are kept in the work folder."""
    import torch

    from tqdit.calibration.placing import check_placing
    from tqdit.calibration.rows import boundaries_of
    from tqdit.calibration.work import digest, versions
    from tqdit.models.directories import folder_of, open_for_prompts
    from tqdit.models.recorder import Recorder
    from tqdit.models.recording import FORMAT_VERSION, Recording

    if args.rows is not None:
        return Recording.load(args.rows)
    if not asked.prompts:
        return None
    prompts, chosen, folder = asked.prompts, asked.call, Path(folder_of(args.model))
    files = sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in folder.rglob("*.*"))
    kept = work / f"calls-{digest([FORMAT_VERSION, files, prompts, config.seed, chosen, versions()])}.safetensors"
    if kept.is_file():
        console.say(f"recorded calls: kept from an earlier run in {kept}")
        return Recording.load(kept)
    pipeline, weights = open_for_prompts(args.model)
    pipeline.set_progress_bar_config(disable=True)
    if console.quiet:
        for library in ("diffusers", "transformers"):
            logging.getLogger(library).setLevel(logging.ERROR)
    if unknown := {"prompt", *chosen} - inspect.signature(pipeline.__call__).parameters.keys():
        raise UsageError(f"{type(pipeline).__name__} takes no {', '.join(sorted(unknown))}. Leave it out.")
    with Recorder(pipeline) as recorder, console.bar(len(prompts), "recording the pipeline", "prompts") as bar:
        for number, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(config.seed + number)
            output = "latent" if number else "np"  # one is decoded, which tells what the VAE takes
            try:
                with weights.lent():
                    pipeline(prompt, generator=generator, output_type=output, **chosen)
            except (TqditError, MemoryError):
                raise
            except Exception as error:  # a pipeline's own code may raise any
                call = f"{prompt[:60]!r} with {chosen}"
                raise UsageError(
                    f"{args.model}: {type(pipeline).__name__} refuses {call}: {first_line(error)}"
                ) from error
            if not number:  # what cannot be learned, grouped or placed is refused before the other prompts
                found = recorder.recording().interface
                boundaries_of(found.sampling, config.groups)
                check_placing(found.sampling, found.signature, config)
            bar.update()
    recording = recorder.recording()
    work.mkdir(parents=True, exist_ok=True)
    console.say(f"recorded calls: {recording.save(kept)}")
    return recording


def _memory(peak: int | None, on_device: int) -> str:
    here = "not known" if peak is None else f"{peak / 1e9:.2f} GB"
    return here + (f" and {on_device / 1e9:.2f} GB on the GPU" if on_device else "")
