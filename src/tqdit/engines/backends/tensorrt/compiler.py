"""Running the worker: one process for each graph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import IO, Any

from tqdit.engines.backends.tensorrt.layers import Layer
from tqdit.engines.backends.tensorrt.library import LIBRARIES
from tqdit.engines.backends.tensorrt.worker import Job, as_tuples
from tqdit.engines.config import Progress
from tqdit.errors import BackendError, MissingLibraryError, TqditError, UsageError

_ERRORS: dict[str, type[TqditError]] = {
    error.__name__: error for error in (BackendError, MissingLibraryError, UsageError)
}


@dataclass(frozen=True)
class Compiled:
    """What a worker says about the plan that it wrote."""

    version: str
    targets: tuple[str, ...]
    layers: tuple[Layer, ...]
    plugins: tuple[str, ...]  # ONNX nodes that became plugins


def run_worker(job: Job, progress: Progress) -> Compiled:
    """Compile `job` in a process of its own. Raises what the worker refuses, and BackendError if it crashes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tqdit.engines.backends.tensorrt.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8", env=environment,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(job)) + "\n")
            process.stdin.flush()
            last = _follow(process.stdout, progress)
            code = process.wait()
        except BrokenPipeError:
            last, code = {}, process.wait()
        finally:  # Ctrl-C among others
            process.kill()
            process.wait()
            process.stdout.close()
            _close(process.stdin)
        if last.get("kind") == "done":
            return _compiled(last)
        if last.get("kind") == "refused":
            raise _ERRORS.get(last["error"], BackendError)(last["text"])
        raise BackendError(_crash(job, code, errors))


def _follow(messages: IO[str], progress: Progress) -> dict[str, Any]:
    """The last message; progress on the way. A worker that dies may leave half a line."""
    last: dict[str, Any] = {}
    for line in messages:
        if not line.endswith("\n"):
            break
        last = json.loads(line)
        if last["kind"] == "progress":
            progress(last["what"], last["done"], last["total"])
    return last


def _compiled(message: dict[str, Any]) -> Compiled:
    layers = tuple(Layer(**as_tuples(layer)) for layer in message["layers"])
    return Compiled(message["version"], tuple(message["targets"]), layers, tuple(message["plugins"]))


def _crash(job: Job, code: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    words = f"; its last words: {lines[-1][:300]}" if lines else ""
    memory = " The system may have run out of memory." if code == -9 else ""
    return f"{LIBRARIES[job.backend].title} crashed while it compiled (exit status {code}{words}).{memory}"


def _close(pipe: IO[str]) -> None:
    with suppress(BrokenPipeError):
        pipe.close()
