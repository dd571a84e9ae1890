"""The Python of the guides runs as it stands, and every command in them is spelled right."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from tqdit.cli import main as cli

DOCS = Path(__file__).parents[2] / "docs"
PYTHON = re.findall(r"```python\n(.*?)```", (DOCS / "guides" / "diffusers-pipeline.md").read_text("utf-8"), re.DOTALL)
PAGES = [*sorted((DOCS / "guides").glob("*.md")), DOCS / "sampling-many.md"]
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for line in re.findall(r"^ *(tqdit-[a-z]+ .*)$", page.read_text("utf-8"), re.MULTILINE)
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")
def test_the_python_of_the_diffusers_guide_runs(tiny_pipeline, monkeypatch):
    monkeypatch.chdir(tiny_pipeline)
    names = {}
    for number, block in enumerate(PYTHON):
        exec(compile(block, f"block {number}", "exec"), names)
    assert np.shape(names["pictures"]) == (2, 8, 8, 3)
    assert 0 < names["distance"] < 1e-4  # a float32 engine: as in test_diffusers
    assert len(PYTHON) == 2


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}-{n}" for n, (page, _) in enumerate(COMMANDS)])
def test_a_command_of_the_guides_is_one_that_we_take(page, line, monkeypatch):
    """Its arguments parse; running them needs published weights (docs/guides say what was run)."""
    verb, *arguments = shlex.split(line, comments=True)
    taken = []
    module = cli._load(verb.removeprefix("tqdit-"))
    monkeypatch.setattr(module, "run", lambda *arguments: taken.append(arguments))
    assert cli.run(verb.removeprefix("tqdit-"), arguments) == 0
    assert len(taken) == 1
