"""`tqdit-evaluate` as the tests of this folder run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tqdit.cli.main import run


def evaluate(folder: Path, *arguments: object) -> dict:
    """Run it, and read what it wrote into `folder`."""
    output = folder / "evaluation.json"
    assert run("evaluate", [*map(str, arguments), "-o", str(output), "-q"]) == 0
    content: dict = json.loads(output.read_text())
    return content


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a run that fails."""
    capsys.readouterr()
    assert run("evaluate", [*map(str, arguments), "-q"]) in (1, 2)
    out, line = capsys.readouterr()
    assert (out, line.count("\n")) == ("", 1)
    return line
