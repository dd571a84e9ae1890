"""Running the worker: one process for each graph."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import IO, Any

import msgspec

from tqdit import errors
from tqdit.engines.backends.tensorrt.library import LIBRARIES
from tqdit.engines.backends.tensorrt.worker import Compiled, Job
from tqdit.engines.config import Progress
from tqdit.errors import BackendError


def run_worker(job: Job, progress: Progress) -> Compiled:
    """Compile `job` in a process of its own. Raises what the worker refuses, and BackendError if it crashes."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "tqdit.engines.backends.tensorrt.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed, env=environment,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(job.to_json() + b"\n")
            process.stdin.flush()
            last = _follow(process.stdout, progress)
            code = process.wait()
        except BrokenPipeError:
            last, code = {}, process.wait()
        finally:  # Ctrl-C among others
            process.kill()
            process.wait()
            process.stdout.close()
            with suppress(BrokenPipeError):
                process.stdin.close()
        if last.get("kind") == "done":
            return msgspec.convert(last["compiled"], Compiled)
        if last.get("kind") == "refused":
            raise getattr(errors, last["error"])(last["text"])
        raise BackendError(_crash(job, code, printed))


def _follow(messages: IO[bytes], progress: Progress) -> dict[str, Any]:
    """The last message; progress on the way. A worker that dies may leave half a line."""
    last: dict[str, Any] = {}
    for line in messages:
        if not line.endswith(b"\n"):
            break
        last = msgspec.json.decode(line)
        if last["kind"] == "progress":
            progress(last["what"], last["done"], last["total"])
    return last


def _crash(job: Job, code: int, printed: IO[bytes]) -> str:
    printed.seek(0)
    lines = [line.strip() for line in printed.read().decode(errors="replace").splitlines() if line.strip()]
    words = f"; its last words: {lines[-1][:300]}" if lines else ""
    memory = " The system may have run out of memory." if code == -9 else ""
    return f"{LIBRARIES[job.backend].title} crashed while it compiled (exit status {code}{words}).{memory}"
