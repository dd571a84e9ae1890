"""The names in the package: one word has one meaning."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import tqdit

PACKAGE = Path(tqdit.__file__).parent


def public_classes() -> dict[str, list[str]]:
    """Name of each public class, nested ones too, and the files that define one of that name."""
    found = defaultdict(list)
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(file.relative_to(PACKAGE)))
    return found


@pytest.mark.slow
def test_no_two_public_classes_have_one_name():
    classes = public_classes()
    assert len(classes) > 50
    assert {name: files for name, files in classes.items() if len(files) > 1} == {}
