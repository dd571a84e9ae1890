"""Cheap checks come before expensive work, in the order of docs/checks.md."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import sys
from pathlib import Path

import pytest

from evaluate.conftest import make_flow
from support import made_once
from tqdit.cli import main as cli

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "scripts" / "checks.py"
SPEC = importlib.util.spec_from_file_location("checks", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
module = sys.modules["checks"] = importlib.util.module_from_spec(SPEC)  # dataclasses look their module up there
SPEC.loader.exec_module(module)
CHECKS, Check, refuse = module.CHECKS, module.Check, module.refuse


def flags(argv: tuple[str, ...]) -> set[str]:
    return {part for part in argv if part.startswith("-") and part != "-"}


def names_a_file(one: Check) -> bool:
    """Whether it begins with a file or folder without a flag."""
    return not one.argv[0].startswith("-")


# Flags of which a command takes one: two of them are a mistake of their own.
ALTERNATIVES = ({"--prompts", "--rows", "--data"}, {"--prompt", "--embeddings", "--classes"})


def belong_together(first: Check, second: Check) -> bool:
    """Whether one command line can hold both of two mistakes: in different arguments, and in no alternatives."""
    ours, theirs = flags(first.argv), flags(second.argv)
    alike = ours & theirs or any(ours & each and theirs & each for each in ALTERNATIVES)
    return not alike and not (names_a_file(first) and names_a_file(second))


PAIRS = [
    (verb, first, second) for verb, checks in CHECKS.items() for first, second in itertools.combinations(checks, 2)
    if belong_together(first, second)
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in float, and the wrong files."""
    flow, place = made_once("flow", make_flow), tmp_path_factory.mktemp("checks")
    shutil.copy(flow / "float.onnx", place / "model.onnx")
    shutil.copytree(flow / "float.engine", place / "model.engine")
    module.make_inputs(place)
    return place


@pytest.fixture(autouse=True)
def no_work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder, where whatever takes long fails."""
    if "verb" not in request.fixturenames:
        return
    monkeypatch.chdir(request.getfixturevalue("folder"))
    for name in (
        "tqdit.sampling.chains.Chains.advance", "torch.onnx.export", "tqdit.engines.backends.onnxruntime.build.build"
    ):  # fmt: skip
        monkeypatch.setattr(name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))


@pytest.mark.parametrize(("verb", "one"), [(verb, one) for verb, checks in CHECKS.items() for one in checks])
def test_a_mistake_is_one_line_before_the_work(folder: Path, verb: str, one: Check) -> None:
    before = sorted(folder.rglob("*"))
    code, line, _ = refuse(verb, one)
    assert (code, len(line.splitlines())) == (one.code, 1), line
    assert one.says in line
    assert not [file for file in set(folder.rglob("*")) - set(before) if file.is_file() and file.name != ".lock"]


@pytest.mark.parametrize(("verb", "first", "second"), PAIRS)
def test_the_first_of_two_mistakes_is_the_one_that_is_said(verb: str, first: Check, second: Check) -> None:
    ahead, behind = (second, first) if names_a_file(second) else (first, second)  # what has no flag comes first
    code, line, _ = refuse(verb, Check("both", ahead.argv + behind.argv, first.says, first.code))
    assert first.says in line, f"{second.what} came before {first.what}: {line}"
    assert code == first.code


def test_every_check_of_every_command_is_in_the_table() -> None:
    assert set(CHECKS) == set(cli.VERBS)
    page = (SCRIPT.parents[1] / "docs" / "checks.md").read_text(encoding="utf-8")
    for verb, checks in CHECKS.items():
        rows = [line for line in page.split(f"## tqdit-{verb}\n")[1].split("\n## ")[0].splitlines() if "` |" in line]
        assert [row.split(" | ")[0] for row in rows] == [f"| {one.what}" for one in checks]
