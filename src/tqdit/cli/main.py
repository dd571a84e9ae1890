"""The commands: `tqdit-VERB` and `tqdit VERB` are the same. Each stage keeps its own arguments in its `cli` module."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from tqdit.console import Console
from tqdit.errors import MissingLibraryError, TqditError, TqditWarning, UsageError
from tqdit.extras import missing
from tqdit.files import explain
from tqdit.version import __version__

VERBS = ("calibrate", "export", "build", "sample", "serve", "evaluate", "inspect", "doctor")  # modules of this package
# Verbs whose modules need more than the runtime's own libraries, and the extra that brings them.
EXTRAS = {"calibrate": "calibrate", "export": "export", "serve": "serve", "evaluate": "evaluate"}


class VerbModule(Protocol):
    """What a verb's module offers. `run` returns the path that it wrote, which becomes the last line of stdout."""

    SUMMARY: str
    EXAMPLES: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace, console: Console) -> Path | None: ...


def main(argv: Sequence[str] | None = None) -> int:
    """`tqdit VERB ...`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in VERBS:
        return run(arguments[0], arguments[1:], prog=f"tqdit {arguments[0]}")
    parser = argparse.ArgumentParser(
        prog="tqdit",
        description="Deploy a quantized diffusion transformer: checkpoint -> ONNX -> engine -> images.",
        epilog="\n".join(["verbs:", *(f"  {verb:<10} {_summary(verb)}" for verb in VERBS)])
        + "\n\ntqdit VERB --help explains each. With no arguments every verb works on the demo model and on what the\n"
        "verb before it wrote.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tqdit {__version__}")
    parser.add_argument("verb", choices=list(VERBS), help="one of those below")
    parser.parse_args(arguments)
    return 2


def run(verb: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one verb; every error of ours becomes one line and an exit code (1, or 2 for usage)."""
    prog = prog or f"tqdit-{verb}"
    try:
        module = _load(verb)
    except MissingLibraryError as error:
        return _fail(prog, error, 1)
    except KeyboardInterrupt:  # libraries take seconds to be imported
        return _interrupted(prog, "nothing was changed")
    parser = argparse.ArgumentParser(
        prog=prog,
        description=module.SUMMARY[0].upper() + module.SUMMARY[1:] + ".",
        epilog=module.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, only the last line, and warnings")
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")
    parser.add_argument("--version", action="version", version=f"tqdit {__version__}")
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal's encoding does not have
    try:
        with _warnings_as_lines(prog):
            written = module.run(args, Console(args.quiet))
        if written is not None:
            print(written)
        sys.stdout.flush()  # here, where a refusal becomes one line, and not when Python ends
        return 0
    except TqditError as error:
        if args.debug:
            raise
        return _fail(prog, error, 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt as error:
        return _interrupted(prog, str(error) or "nothing was changed")  # a verb that keeps what is done says so
    except BrokenPipeError:  # the reader of our output went away, as in `tqdit-inspect FILE | head`
        _drop_output()
        return 1
    except (OSError, MemoryError) as error:  # any that no stage has turned into a TqditError, as a full standard output
        if args.debug:
            raise
        _drop_output()
        return _fail(prog, explain(error), 1)


@contextmanager
def _warnings_as_lines(prog: str) -> Iterator[None]:
    """Our own warnings in one line each, also in quiet commands; those of libraries as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", TqditWarning)
        show = warnings.showwarning

        def show_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, TqditWarning):
                print(f"{prog}: warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
            else:
                show(message, category, *place, **more)

        warnings.showwarning = show_line
        yield


def _drop_output() -> None:
    """Let what is still to be printed go nowhere, or Python would fail again when it ends."""
    with suppress(OSError, ValueError):  # a stream without a file behind it has nothing that could fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(prog: str, error: Exception | str, code: int) -> int:
    print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)  # one line, whatever a library put into it
    return code


def _interrupted(prog: str, kept: str) -> int:
    print(f"\n{prog}: interrupted; {kept}. Run the same command again.", file=sys.stderr)
    return 130


def _load(verb: str) -> VerbModule:
    try:
        return cast(VerbModule, importlib.import_module(f"tqdit.cli.{verb}"))
    except ModuleNotFoundError as error:
        library = (error.name or "tqdit").split(".")[0]
        if verb not in EXTRAS or library == "tqdit":
            raise
        raise missing(library, EXTRAS[verb], f"tqdit-{verb}") from error


def _summary(verb: str) -> str:
    """A machine that only samples has no torch, and its `tqdit --help` works as well."""
    try:
        return _load(verb).SUMMARY
    except MissingLibraryError as error:
        return str(error)


# What the console scripts `tqdit-VERB` call.
calibrate, export, build, sample, serve, evaluate, inspect, doctor = (partial(run, verb) for verb in VERBS)
