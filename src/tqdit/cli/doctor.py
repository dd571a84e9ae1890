"""`tqdit-doctor`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec

from tqdit.console import Console
from tqdit.engines.doctor import Check, Report, examine
from tqdit.errors import BackendError, UsageError
from tqdit.extras import install, need_part
from tqdit.files import check_writable, whole_file

SUMMARY = "say what this machine can build and run, and prove it"
EXAMPLES = """\
examples:
  tqdit-doctor                                      what is installed, what runs, what is missing
  tqdit-doctor --prove model.onnx --report doctor.json
                                                    also run every kernel and engine that can run here, for an issue

Exit code 1 if no engine can run here, or if a step of the proof failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", type=Path, metavar="MODEL.onnx", help="with --prove: a file that tqdit-export wrote, to "
        "build on every backend that runs here and to compare with ONNX Runtime")  # fmt: skip
    add("--prove", action="store_true", help="on a GPU, run each plugin in each tactic against its reference; needs "
        "the extra triton")  # fmt: skip
    add("--report", type=Path, metavar="FILE", help="also write everything as JSON, without paths of this machine")
    add("--device", type=int, metavar="N", help="index of the GPU (default: the current one)")


def run(args: argparse.Namespace, console: Console) -> Path | None:
    if args.model is not None and not args.prove:
        raise UsageError(f"{args.model}: a model is for --prove. Pass --prove as well, or leave it out.")
    if args.model is not None and not args.model.is_file():
        raise UsageError(f"{args.model}: no such file. Run tqdit-export first.")
    if args.report is not None:
        check_writable(args.report)
    report = examine()
    for line in lines(report):
        print(line)
    if args.prove:
        checks = []
        for check in _prove(args.model, report, args.device):
            print(f"{check.outcome:<8} {check.what}{': ' if check.detail else ''}{check.detail}", flush=True)
            checks.append(check)
        report = replace(report, proof=tuple(checks))
    if args.report is not None:
        with whole_file(args.report) as temporary:
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    if report.failed:
        raise BackendError(
            f"{len(report.failed)} of {len(report.proof)} steps of the proof failed; they are named above."
        )
    if not report.runs_something:
        raise BackendError(f"no engine can run here. Run: {install('onnxruntime')}")
    return args.report  # type: ignore[no-any-return]


def lines(report: Report) -> Iterator[str]:
    """The report for people."""
    yield f"tqdit {report.tqdit}, Python {report.python}, {report.system}, {report.cpus} CPUs"
    yield f"CPU      {' '.join(report.cpu_features) or 'no features known that speed up integers'}"
    driver = report.driver
    found = f"CUDA {driver.cuda}, reads PTX {driver.ptx}"
    yield f"driver   {f'none ({driver.missing})' if driver.missing else found}"
    for gpu in report.gpus:
        yield (
            f"GPU {gpu.index}    {gpu.name}, compute capability {gpu.capability}, "
            f"{gpu.multiprocessors} multiprocessors, {gpu.memory_bytes / 1e9:.0f} GB"
        )
    yield f"packages {', '.join(f'{name} {version}' for name, version in report.packages.items())}"
    for name, state in report.backends.items():
        can = " and ".join(verb for verb, able in (("builds", state.builds), ("runs", state.runs)) if able) or "neither"
        yield f"{name:<13} {can} ({state.why}){f'. Run: {state.install}' if state.install else ''}"
    for line in report.advice:
        yield f"advice   {line}"


def _prove(model: Path | None, report: Report, device: int | None) -> Iterator[Check]:
    need_part("tqdit.engines.build", "a proof")
    from tqdit.engines.build.proof import offers_cuda, prove_engine, prove_kernels

    yield from prove_kernels(device)
    if model is None:
        yield Check("engines", "not run", "pass a file of tqdit-export")
        return
    for name, state in report.backends.items():
        if state.builds and state.runs:
            yield from prove_engine(model, name, device)
    if report.gpus and offers_cuda():
        yield from prove_engine(model, "onnxruntime", device, "cuda")
