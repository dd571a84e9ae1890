"""What scripts that run commands at full size share: each command in a process of its own, and what it took."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BACKENDS = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt-rtx": "tensorrt_rtx"}
RUN_HERE = ("onnxruntime", "openvino")  # the others' engines need a GPU


@dataclass(frozen=True)
class Row:
    """One stage."""

    stage: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    size_bytes: int  # of what it wrote


def run_stage(name: str, arguments: Sequence[str], output: Path, again: bool) -> Row | None:
    """Run one command; None where its output was there."""
    if output.exists() and not again:
        print(f"{name}: {output} is there already (--again runs it anew)", file=sys.stderr)
        return None
    print(f"\n$ tqdit-{' '.join(arguments)}", file=sys.stderr)
    started = time.perf_counter()
    process = os.posix_spawn(sys.executable, [sys.executable, "-m", "tqdit.cli", *arguments], os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        sys.exit(f"{name} failed with status {os.waitstatus_to_exitcode(status)}.")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Row(name, time.perf_counter() - started, usage.ru_utime + usage.ru_stime, peak, size_of(output))


def size_of(output: Path) -> int:
    """Bytes of a file with its external data, or of all files in a folder."""
    beside = output.parent.glob(f"{output.stem}-*{output.suffix}.data")
    files = output.rglob("*") if output.is_dir() else (output, *beside)
    return sum(file.stat().st_size for file in files if file.is_file())


def apart(work: Callable[..., None], *arguments: object) -> None:
    """Run in a process of its own: the peak that a stage reports begins with the peak of the process that starts it."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{work.__name__} failed with status {process.exitcode}.")


def rows_of(folder: Path) -> dict[str, Any]:
    """What the stages took that ran already."""
    file = folder / "rows.json"
    known: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
    return known


def keep(folder: Path, row: Row, **more: object) -> None:
    """Add a row to rows.json."""
    facts = {"machine": machine(), "rows": {**rows_of(folder), row.stage: {**asdict(row), **more}}}
    (folder / "rows.json").write_text(json.dumps(facts, indent=1) + "\n")


def machine() -> dict[str, object]:
    facts: dict[str, object] = {"cores": os.cpu_count(), "python": platform.python_version()}
    facts |= {name: version(name) for name in ("torch", "numpy", "onnx", *BACKENDS) if installed(name)}
    return facts


def installed(name: str) -> bool:
    return find_spec(BACKENDS.get(name, name)) is not None
