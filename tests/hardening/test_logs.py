"""What the commands say to a log file: plain lines with the time left, and with -q the path alone."""

import re

import pytest

from hardening.test_kill import BUILD, CALIBRATE, EXPORT, SAMPLE, SHEET

EVALUATE = ["evaluate", "{inputs}/model.engine", "--alone", "-n", "2", "-o", "{here}/evaluation.json", "-q"]
MERGE = ["sample", "--merge", "{inputs}/shards", "-o", "{here}/merged.npz", "-q"]
COMMANDS = {
    "calibrate": (CALIBRATE, "scales.safetensors"), "export": (EXPORT, "model.onnx"), "build": (BUILD, "model.engine"),
    "shards": (SAMPLE, "samples"), "picture": (SHEET, "samples.png"), "merge": (MERGE, "merged.npz"),
    "evaluate": (EVALUATE, "evaluation.json"),
}  # fmt: skip
SLOW = ("calibrate", "export")
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in COMMANDS]
LINE = re.compile(r"[\w /]+: (\d+) %, \d+ of \d+ \w+, ([\d.]+ (s|min|h) left|done in [\d.]+ (s|min|h))")


def fill(argv, inputs, here):
    return [part.format(inputs=inputs, here=here) for part in argv]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_quiet_command_prints_its_output_and_nothing_else(inputs, tmp_path, run, name):
    argv, output = COMMANDS[name]
    outcome = run(*fill(argv, inputs, tmp_path))
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{tmp_path / output}\n", "")


@pytest.mark.parametrize("name", ["model.engine", "scales.safetensors", "model.onnx", "samples.npz", "shards"])
def test_a_quiet_inspect_says_nothing_but_its_facts(inputs, run, name):
    outcome = run("inspect", inputs / name, "-q")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("kind")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("shards", 10), ("picture", 10), ("evaluate", 10), ("calibrate", 14)])
def test_without_a_terminal_there_is_a_line_per_ten_percent_with_the_time_left(inputs, tmp_path, run, name, least):
    argv, _ = COMMANDS[name]
    outcome = run(*[part for part in fill(argv, inputs, tmp_path) if part != "-q"])
    assert outcome.code == 0
    assert "\r" not in outcome.err
    shown = [found for line in outcome.lines if (found := LINE.fullmatch(line))]
    assert least <= len(shown) <= 40, outcome.err
    assert all("left" in found[2] for found in shown if found[1] != "100")
