"""What the rows of the ablation are as engines: which products are integers, and milliseconds per step."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from ablation_subjects import Subject

import tqdit
from tqdit.engines.bundle import read_manifest
from tqdit.engines.run.backend import Engine, open_engine
from tqdit.errors import TqditError
from tqdit.files import whole_file

BACKENDS = ("openvino", "onnxruntime")
IMAGES = 16  # of a timed call
CALLS = 15  # of each engine, in turns with the float one


@dataclass(frozen=True)
class EngineRow:
    """One table on one backend."""

    backend: str
    audit: str  # how many products are integers, or why there is no engine
    milliseconds: float | None = None  # of one step of IMAGES images, median
    against_float: float | None = None  # how many times faster than the float engine, in turns with it


class EngineBench:
    """Builds tables of one subject as engines and times them beside its float engines."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject, self.folder = subject, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._float: dict[str, Engine] = {}

    def is_kept(self, table: Path) -> bool:
        """Whether the engines of this scale table have been measured."""
        return _kept(table).is_file()

    def rows(self, table: Path) -> list[EngineRow]:
        """Of one scale table; kept beside it, so that they are measured once."""
        kept = _kept(table)
        if kept.is_file():
            return [EngineRow(**entry) for entry in json.loads(kept.read_text(encoding="utf-8"))]
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            file = tqdit.export(self.subject.model, Path(temporary, "model.onnx"), scales=table)
            rows = [self._row(file, backend) for backend in BACKENDS]
        with whole_file(kept) as part:
            part.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
        return rows

    def _row(self, file: Path, backend: str) -> EngineRow:
        folder = file.with_name(backend)
        try:
            manifest = tqdit.build(file, folder, backend=backend)
        except TqditError as error:
            return EngineRow(backend, str(error))
        audit = "" if manifest.audit is None else manifest.audit.line
        with closing(open_engine(folder, manifest, manifest.entry)) as engine:
            milliseconds, ratio = self._time(engine, self._float_engine(backend))
        return EngineRow(backend, audit, milliseconds, ratio)

    def _float_engine(self, backend: str) -> Engine:
        if backend not in self._float:
            file, folder = self.folder / "float.onnx", self.folder / f"float.{backend}"
            if not file.is_file():
                tqdit.export(self.subject.model, file, rows=self.subject.calls)
            if not folder.is_dir():
                tqdit.build(file, folder, backend=backend)
            manifest = read_manifest(folder)
            self._float[backend] = open_engine(folder, manifest, manifest.entry)
        return self._float[backend]

    def _time(self, engine: Engine, floating: Engine) -> tuple[float, float]:
        """(median milliseconds of `engine`, how many times faster it is), from calls in turns."""
        inputs = self.subject.model.signature.zeros(IMAGES * self.subject.model.card().rows_per_image)
        seconds: dict[Engine, list[float]] = {engine: [], floating: []}
        for call in range(CALLS + 2):
            for each, kept in seconds.items():
                started = time.perf_counter()
                each(inputs)
                if call >= 2:  # the first calls of an engine allocate
                    kept.append(time.perf_counter() - started)
        ours, theirs = (statistics.median(kept) for kept in seconds.values())
        return 1000 * ours, theirs / ours


def _kept(table: Path) -> Path:
    return table.with_suffix(".engines.json")
