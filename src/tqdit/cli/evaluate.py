"""`tqdit-evaluate [SAMPLES|ENGINE]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdit.bounds import MOST_BATCH, MOST_RESAMPLES, MOST_SEEDS, check_count
from tqdit.cli.sample import interval
from tqdit.console import Console
from tqdit.engines.bundle import MANIFEST
from tqdit.engines.run.backend import check_threads
from tqdit.errors import UsageError
from tqdit.evaluate.names import METRICS
from tqdit.evaluate.tables import summary
from tqdit.extras import need
from tqdit.files import check_writable, whole_file
from tqdit.sampling.schedule import sampler_names
from tqdit.text import read_prompts

if TYPE_CHECKING:  # which need torch
    from tqdit.evaluate.subjects import EngineOptions, Evaluation
    from tqdit.evaluate.tools import MeasurementOptions

SUMMARY = "say what quantization cost: distances to a reference, same-noise errors, a report"
EXAMPLES = """\
examples:
  tqdit-evaluate                                      model.engine of the demo model, against its float model and data
  tqdit-evaluate int8.engine --against float.engine -n 256 --report report.html
  tqdit-evaluate samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception-weights inception.pth
  tqdit-evaluate samples/ --reference reference/ --inception-weights inception.pth
                                                      folders of shards; the same command continues after a stop
  tqdit-evaluate --calls 8,12,16,25,50 --report report.html
                                                      which sampler and spacing needs the fewest network calls
  tqdit-evaluate text.engine                          the text demo, on captions that it was never trained on
  tqdit-evaluate flux.engine --prompts prompts.txt --against flux-float.engine
  tqdit-evaluate --layers                             which layers cost most, and what would mend them

Numbers are written as JSON, each with its sample count and 95 % interval. Nothing is downloaded: Inception's weights
come from a local file. docs/evaluation.md explains every number and has the recipe for ImageNet."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("subject", nargs="?", type=Path, default=Path("model.engine"), metavar="SAMPLES|ENGINE", help="an .npz, a "
        "folder of images or of shards, or an engine bundle (default: %(default)s)")  # fmt: skip
    add("--reference", type=Path, metavar="REF", help="samples (arr_0) or statistics (mu, sigma, mu_s, sigma_s) as "
        ".npz, or a folder of images or of shards (default for a demo model: fresh drawings of its data "
        "set)")  # fmt: skip
    add("--against", type=Path, metavar="ENGINE", help="float engine to compare with on the same noise (default: one "
        "that is built from the checkpoint, if it is available)")  # fmt: skip
    add("--alone", action="store_true", help="do not compare with a float model")
    add("-n", type=int, metavar="N", help="images (default: 64 from an engine, all of a file or folder; the first "
        "N of a sampling job need not wait for the others)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--float-seeds", type=int, default=1, metavar="K", help="other seeds of the float model, which show its own "
        "noise (default: %(default)s)")  # fmt: skip
    add("--prompts", type=Path, metavar="FILE", help="what to show, one in each line, in turn; of an engine with text "
        "encoders (default for the text demo: captions of combinations that it was never trained on)")  # fmt: skip
    add("--embeddings", type=Path, metavar="FILE", help="as for tqdit-sample, of any model of text")
    add("--guidance-scale", type=float, metavar="S", help="default: the engine's own")
    add("--guidance-interval", type=interval, metavar="LOW,HIGH", help="as for tqdit-sample (default: all)")
    add("--steps", type=int, metavar="N", help="sampling steps (default: what the engine proposes)")
    add("--sampler", choices=sampler_names(), help="default: what the engine proposes")
    add("--calls", type=counts, default=(), metavar="N,N,...", help="also compare samplers and spacings of their steps "
        "at these numbers of network calls, such as 8,12,16,25,50: error, distance and seconds")  # fmt: skip
    add("--batch", type=int, default=16, help="images per engine call at most (default: %(default)s)")
    add("--threads", type=int, help="CPU threads (default: the backend's choice)")
    add("--metrics", nargs="+", choices=METRICS, metavar="METRIC", help=f"of {', '.join(METRICS)} (default: all that "
        "can be had; one that is named and cannot be had is an error)")  # fmt: skip
    add("--inception-weights", type=Path, metavar="FILE", help="torch-fidelity's InceptionV3 weights, a local .pth")
    add("--lpips-weights", type=Path, nargs=2, metavar=("VGG", "LIN"), help="torchvision's VGG16 and LPIPS' linear "
        "weights, local .pth files, for LPIPS between pairs")  # fmt: skip
    add("--bootstrap", type=int, metavar="N", help="resamples of a distance's interval (default: 200 for the judge, 20 "
        "for Inception, whose 2048 features make one slow)")  # fmt: skip
    add("--write-reference", type=Path, metavar="FILE", help="also keep the statistics of the samples as a reference")
    add("--layers", action="store_true", help="also find what each layer adds to the error and what would mend it, and "
        "write diagnosis.json beside the output")  # fmt: skip
    add(
        "--diagnosed", type=int, default=8, metavar="N", help="layers that remedies are tried on (default: %(default)s)"
    )
    add("--scales", type=Path, metavar="FILE", help="scale table of the engine, for its scales over time and --layers "
        "(default: scales.safetensors beside the engine, if it is for this model)")  # fmt: skip
    add("--rows", type=Path, metavar="FILE", help="recorded calls of a diffusers directory, which --layers takes rows "
        "from (default: those that tqdit-calibrate kept beside the table)")  # fmt: skip
    add("--report", type=Path, metavar="HTML", help="also write one self-contained page")
    add("-o", "--output", type=Path, default=Path("evaluation.json"), help="default: %(default)s")


def run(args: argparse.Namespace, console: Console) -> Path:
    for library in ("torch", "safetensors", "torchmetrics", *(("jinja2", "matplotlib") if args.report else ())):
        need(library, "evaluate", "tqdit-evaluate")
    _check(args)
    output: Path = args.output
    for path in (output, args.report, args.write_reference):
        if path is not None:
            check_writable(path)
    evaluation = _evaluate(args, console)
    if args.layers:
        diagnosis = output.with_name("diagnosis.json")
        _write_json(diagnosis, evaluation.facts["diagnosis"])
        console.say(f"diagnosis: {diagnosis}")
    if args.report is not None:
        from tqdit.evaluate.report import write_report

        write_report(args.report, evaluation.facts, evaluation.pictures)
        console.say(f"report: {args.report}")
    _write_json(output, evaluation.facts)
    if not console.quiet:
        print(summary(evaluation.facts))
    return output


def _evaluate(args: argparse.Namespace, console: Console) -> Evaluation:
    from tqdit.evaluate.subjects import evaluate_engine, evaluate_images

    if (args.subject / MANIFEST).is_file() or not args.subject.exists():
        return evaluate_engine(args.subject, _engine_options(args), _measurement(args), console)
    of_engines = ("against", "layers", "scales", "steps", "sampler", "guidance_interval", "calls", "prompts",
                  "embeddings", "rows")  # fmt: skip
    for flag in of_engines:
        if getattr(args, flag):
            named = flag.replace("_", "-")
            raise UsageError(f"--{named} needs an engine; {args.subject} holds images. Pass the engine that made them.")
    return evaluate_images(args.subject, args.n, _measurement(args), console)


def counts(text: str) -> tuple[int, ...]:
    """N,N,... of the command line, ascending."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of integers like 8,12,25") from None


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _measurement(args: argparse.Namespace) -> MeasurementOptions:
    from tqdit.evaluate.tools import MeasurementOptions

    metrics = None if not args.metrics else tuple(args.metrics)
    return MeasurementOptions(
        args.reference, args.inception_weights, metrics, args.bootstrap, args.seed, args.write_reference
    )


def _engine_options(args: argparse.Namespace) -> EngineOptions:
    from tqdit.evaluate.subjects import EngineOptions

    return EngineOptions(
        against=args.against, alone=args.alone, count=64 if args.n is None else args.n, seed=args.seed,
        float_seeds=args.float_seeds, guidance_scale=args.guidance_scale,
        guidance_interval=args.guidance_interval, steps=args.steps, sampler=args.sampler,
        calls=args.calls, batch=args.batch, threads=args.threads, scales=args.scales,
        lpips_weights=None if args.lpips_weights is None else tuple(args.lpips_weights),
        layer_errors=args.report is not None, diagnosed=args.diagnosed if args.layers else None,
        prompts=() if args.prompts is None else tuple(read_prompts(args.prompts)), embeddings=args.embeddings,
        rows=args.rows,
    )  # fmt: skip


def _check(args: argparse.Namespace) -> None:
    bounds = {
        "-n": (args.n, 1, None), "--batch": (args.batch, 1, MOST_BATCH), "--seed": (args.seed, 0, 2**64 - 1),
        "--float-seeds": (args.float_seeds, 0, MOST_SEEDS), "--bootstrap": (args.bootstrap, 2, MOST_RESAMPLES),
        "--diagnosed": (args.diagnosed, 0, None),
    }  # fmt: skip
    for flag, (value, least, most) in bounds.items():
        if value is not None:
            check_count(flag, value, least, most)
    check_threads(args.threads)
    if args.prompts is not None and args.embeddings is not None:
        raise UsageError("--prompts and --embeddings each say what the images show. Pass one of them.")
    if args.alone and args.against is not None:
        raise UsageError("--alone and --against ENGINE exclude each other. Pass one of them.")
