"""Where a trace is: what an error names, and what a child process leaves behind if the exporter ends it.

PyTorch's exporter can crash the process, or never come to an end, on a network that was never tried. The command
therefore traces such a network in a child process.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from tqdit.errors import TqditError, UsageError, first_line

PLACE = "TQDIT_TRACE_PLACE"  # environment of a child: the file that says where its trace is
_NODE = re.compile(r"translating node (%\S+) .*?target=([\w.]+)")  # in errors of torch.onnx


class UntraceableError(UsageError):
    """A network that PyTorch's exporter refuses."""


class Watch:
    """Follows one trace of a module, check by check."""

    def __init__(self, module: nn.Module) -> None:
        self._names = {id(part): name for name, part in module.named_modules()}
        self._check = ""
        self._file = os.environ.get(PLACE)

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Inside, errors that are not ours become an UntraceableError that names the check, and the module or node."""
        self._check = name
        self._tell("")
        hook = register_module_forward_pre_hook(self._enter)
        try:
            yield
        except TqditError:
            raise
        except Exception as error:  # the exporters raise errors of all kinds
            raise UntraceableError(f"{self._place}{_node(error)} says: {_root(error)}") from error
        finally:
            hook.remove()

    def _enter(self, module: nn.Module, _inputs: Any) -> None:
        self._tell(self._names.get(id(module), ""))

    def _tell(self, module: str) -> None:
        self._place = self._check + (f", module '{module}'," if module else "")
        if self._file:
            Path(self._file).write_text(self._place, encoding="utf-8")


def _node(error: BaseException | None) -> str:
    """The graph's node that an error of torch.onnx is about, if it is about one."""
    while error is not None:
        found = _NODE.search(" ".join(str(error).split()))
        if found:
            return f", node {found[1]} ({found[2]}),"
        error = error.__cause__
    return ""


def _root(error: BaseException) -> str:
    """What the exporters' errors began with, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def export_in_child(arguments: Sequence[str], family: str, minutes: float) -> int:
    """Run `tqdit export` with these arguments in a child process; its exit code.

    Raises UsageError, naming the check that the trace was in and the module that it entered last, if a signal ends the
    child, if it takes longer than `minutes`, or if a library ends it. The child ends with this process.
    """
    stdin, held = os.pipe()  # nothing is ever written: the child reads its end when this process ends, however it does
    with os.fdopen(stdin, "rb") as alive, os.fdopen(held, "wb"), tempfile.TemporaryDirectory(prefix="tqdit-") as folder:
        place = Path(folder, "place")
        command = [sys.executable, "-m", "tqdit.cli", "export", *arguments]
        try:
            code = subprocess.run(
                command, env=os.environ | {PLACE: str(place)}, stdin=alive, stdout=subprocess.DEVNULL,
                timeout=60 * minutes,
            ).returncode  # fmt: skip
            problem = f"was ended by signal {-code} ({_name_of(-code)})" if code < 0 else f"ended with code {code}"
        except subprocess.TimeoutExpired:
            code, problem = -1, f"took longer than {minutes:g} minutes (--trace-minutes)"
        if code in (0, 1, 2):  # it has said why
            return code
        where = place.read_text(encoding="utf-8").rstrip(",") if place.is_file() else "loading the network"
    raise UsageError(f"the trace of {family} {problem} in {where}. PyTorch's exporter does not take this network.")


def end_with_parent() -> None:
    """In a child process of `export_in_child`: end it when the parent is gone, which may have been killed."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _name_of(number: int) -> str:
    if number == signal.SIGKILL:
        return "SIGKILL, which a system sends if memory runs out"
    return signal.Signals(number).name if number in set(signal.Signals) else "unknown"
