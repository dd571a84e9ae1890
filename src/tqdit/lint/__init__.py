"""What in an ONNX file makes a backend lose INT8, compute something else, or refuse (docs/lint.md).

Works on any ONNX file and never reads its weights. One rule per module of `rules`; what is known about a tensor before
anything runs comes from `program`.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from tqdit.errors import UsageError
from tqdit.lint.finding import BACKENDS, Finding
from tqdit.lint.program import read_program
from tqdit.lint.rules import RULES

__all__ = ["BACKENDS", "Finding", "lint"]


def lint(model: onnx.ModelProto, backend: str | None = None, folder: Path | None = None) -> tuple[Finding, ...]:
    """Findings about a model, errors first, then in the order of the rules and of the graph.

    `backend` keeps only the findings that concern that backend; None keeps everything. `folder` holds the model's
    external data, from which small scales are read; without it the numbers of scales in external data are not checked.
    Raises FileFormatError for a graph that ONNX does not allow.
    """
    if backend is not None and backend not in BACKENDS:
        raise UsageError(f"unknown backend '{backend}'; the lint knows {', '.join(BACKENDS)}.")
    program = read_program(model, folder)
    findings = dict.fromkeys(finding for rule in RULES for finding in rule(program))  # a function is seen once a call
    kept = [finding for finding in findings if backend is None or backend in finding.backends]
    return tuple(sorted(kept, key=lambda finding: finding.severity != "error"))
