"""Every transformer class of diffusers through the flow: record, calibrate, export, build, golden calls.

    python scripts/families.py                          all classes, one process each; what is done is not done again
    python scripts/families.py --only WanTransformer3DModel --again
    python scripts/families.py --print                  the table of what was done

Networks are tiny and have random weights (scripts/family_classes.py): the rows say what can be expressed, traced and
compiled in integers, and nothing about quality. TensorRT-RTX compiles without a GPU; nothing runs there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

BACKENDS = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt-rtx": "tensorrt-rtx"}
CALLS = 3  # recorded, of two rows each
KNOBS: dict[str, Any] = {"preset": "min-max", "groups": 1, "rows_per_group": 6, "token_share": 1.0}


@dataclass
class Built:
    """What one backend made of the file."""

    integer: int = 0
    fallen_back: list[str] = field(default_factory=list)
    error: float | None = None  # of golden calls against the float network, mean; None: they do not run here
    expected: float | None = None  # the same of the fake-quantized network
    problem: str | None = None


@dataclass
class Row:
    """One class. stage: where it stopped; '' if it did not."""

    name: str
    stage: str = "start"
    problem: str | None = None
    products: int = 0
    rows: int | None = None  # of each call of the graph; None: any
    quantized: str = ""
    seconds: float = 0.0
    built: dict[str, Built] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        """Whether every backend built it, with each product in integers and golden calls right."""
        return not self.stage and all(not (each.problem or each.fallen_back) for each in self.built.values())

    @classmethod
    def of(cls, values: dict[str, Any]) -> Row:
        return cls(**values | {"built": {name: Built(**each) for name, each in values["built"].items()}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="CLASS")
    add("--folder", type=Path, default=Path("build/families"), help="a file for each class, and families.json")
    add("--timeout", type=float, default=600, help="seconds for a class")
    add("--again", action="store_true", help="also what is done")
    add("--print", action="store_true", dest="print_only", help="the table of what is done")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.child:
        run(args.child, args.folder)
        return
    if not args.print_only:
        run_all(args.folder, args.only, args.again, args.timeout)
    rows = [read(path) for path in sorted(args.folder.glob("*/row.json"))]
    facts = {"versions": {name: version(name) for name in ("diffusers", "torch", "onnxruntime", "openvino")}}
    text = json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1)
    (args.folder / "families.json").write_text(text + "\n")
    print(table([row for row in rows if not args.only or row.name in args.only]))


def run_all(folder: Path, only: Sequence[str], again: bool, timeout: float) -> None:
    """Each class in a process of its own: tracing an unknown network can crash the process, or never end."""
    from family_classes import classes

    for name in only or classes():
        path = folder / name / "row.json"
        if path.exists() and not again:
            continue
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        started = time.monotonic()
        command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        try:
            code = subprocess.run(command, env=environment, timeout=timeout, check=False).returncode
            ended = f"the process ended with {code}" if code else None
        except subprocess.TimeoutExpired:
            ended = f"not done after {timeout:g} s"
        row = read(path) if path.exists() else Row(name)
        row.problem, row.seconds = row.problem or ended, round(time.monotonic() - started, 1)
        save(row, path)
        print(table([row]).splitlines()[-1], flush=True)


def run(name: str, folder: Path) -> None:
    """One class; its row is saved after every stage."""
    warnings.simplefilter("ignore")
    row, path = Row(name), folder / name / "row.json"

    @contextmanager
    def stage(what: str) -> Iterator[None]:
        row.stage = what
        save(row, path)
        yield

    try:
        flow(row, folder / name, stage)
        row.stage = ""
    except Exception as error:  # whatever it is, it is what the row reports
        row.problem = describe(error)
        if not name.startswith("Tqdit"):
            import traceback

            (folder / name / "error.txt").write_text(traceback.format_exc())
    save(row, path)


def flow(row: Row, folder: Path, stage: Any) -> None:
    import torch
    from family_classes import make, vary

    import tqdit
    from tqdit.engines.config import BuildConfig
    from tqdit.models.load import load_model
    from tqdit.onnx_file import read_card

    with stage("configuration"):
        try:
            network, arguments = make(row.name)
        except KeyError:
            raise LookupError("not tried: scripts/family_classes.py has no configuration of it") from None
        with torch.no_grad():
            network(**arguments)
    with stage("record"):
        with torch.no_grad(), tqdit.record(network) as calls:
            for seed in range(CALLS):
                network(**vary(arguments, 100 * seed))
        recording = calls.recording()
    with stage("load"):
        model = load_model(network, interface=recording.interface)
        row.products = len(model.products)
    with stage("calibrate"):
        table = tqdit.calibrate(model, rows=calls, **KNOBS)
    with stage("export"):
        path = tqdit.export(model, folder / "model.onnx", scales=table, force=True)
        card = read_card(path)
        row.rows, row.quantized = card.rows, "" if card.quantization is None else card.quantization.summary
    for backend in BACKENDS:
        with stage(f"build {backend}"):
            built = row.built[backend] = Built()
            try:
                config = BuildConfig(allow_fallback=True)
                manifest = tqdit.build(path, folder / f"{backend}.engine", backend=backend, config=config, force=True)
            except Exception as error:  # the other backends may do
                built.problem = describe(error)
                continue
            assert manifest.audit is not None
            built.integer, built.fallen_back = manifest.audit.integer, list(manifest.audit.fallen_back)
            if manifest.verified is not None:
                built.error, built.expected = manifest.verified.error, manifest.verified.expected


def describe(error: BaseException) -> str:
    """One line, without places of this machine."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"(/[\w.-]+)+/", "", lines[0]) if lines else ""
    return f"{type(error).__name__}: {text}"[:400]


def shortened(text: str) -> str:
    """For a cell."""
    text = re.sub(r"(/[\w.-]+)+/", "", text).replace("|", "\\|")
    return text if len(text) <= 160 else f"{text[:157]}..."


def save(row: Row, path: Path) -> None:
    path.write_text(json.dumps(asdict(row), indent=1) + "\n")


def read(path: Path) -> Row:
    return Row.of(json.loads(path.read_text()))


def table(rows: Sequence[Row]) -> str:
    """One line a class: products, then integer / fallen back and the error of golden calls for each backend."""
    names = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt-rtx": "TensorRT-RTX"}
    lines = [
        f"| class | products | batch | {' | '.join(names[each] for each in BACKENDS)} | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [_cell(row.built.get(backend)) for backend in BACKENDS]
        stopped = shortened(f"{row.stage}: {row.problem}") if row.stage or row.problem else ""
        batch = "any" if row.rows is None else str(row.rows)
        lines.append(f"| {row.name} | {row.products} | {batch} | {' | '.join(cells)} | {stopped} |")
    done = sum(row.runs for row in rows)
    return "\n".join([*lines, *([f"\n{done} of {len(rows)} run"] if len(rows) > 1 else [])])


def _cell(built: Built | None) -> str:
    if built is None:
        return ""
    if built.problem:
        return shortened(built.problem)
    error = "" if built.error is None else f", {built.error:.0e}"
    return f"{built.integer} / {len(built.fallen_back)}{error}"


if __name__ == "__main__":
    main()
