"""Full disks, places where nobody may write, and two processes that want one output."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from hardening.conftest import Commands, Outcome
from hardening.damage import CAUSED
from hardening.test_kill import BUILD, CALIBRATE, EXPORT, SAMPLE, SHEET, digest
from support import ALL, few, rounds

pytestmark = pytest.mark.hardening
NPZ = ["sample", "{inputs}/model.engine", "-n", "20", "-o", "{here}/samples.npz", "-q"]
MERGE = ["sample", "--merge", "{inputs}/shards", "-o", "{here}/merged.npz"]
STAGES = {
    "calibrate": (CALIBRATE, "scales.safetensors", [0, 300, 5000] if ALL else [300]),
    "export": (EXPORT, "model.onnx", [20000]),
    "build": (BUILD, "model.engine", [0, 100, 3000, 20000]), "shards": (SAMPLE, "samples", [0, 600, 2000]),
    "picture": (SHEET, "samples.png", [0, 100, 2000]), "npz": (NPZ, "samples.npz", [0, 100, 3000]),
    "merge": (MERGE, "merged.npz", [0, 200, 900]),
}  # fmt: skip
NOBODY = 65534


def fill(argv, inputs, here):
    return [part.format(inputs=inputs, here=here) for part in argv]


@pytest.mark.parametrize("stage", few(STAGES, *(stage for stage in STAGES if stage != "picture")))
def test_a_disk_that_fills_up_is_one_line_and_the_old_output_stays(inputs, tmp_path, commands, stage):
    """A file of the command may grow to so many bytes and no further."""
    argv, name, limits = STAGES[stage]
    argv = fill(argv, inputs, tmp_path)
    for limit in limits:
        outcome = commands.run(*argv, limit=limit)
        outcome.check_refusal()
        assert "File too large" in outcome.lines[0]
        assert stage == "shards" or not (tmp_path / name).exists()
        assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    if stage in ("calibrate", "export"):
        return
    assert commands.run(*argv).code == 0
    before = digest(tmp_path / name)
    outcome = commands.run(*argv, limit=limits[-1])
    if stage != "shards":  # which are all there already
        outcome.check_refusal()
    assert digest(tmp_path / name) == before


def test_no_place_for_temporary_files_is_one_line(inputs, tmp_path, commands):
    """Where no file may grow at all, PyTorch's exporter finds none."""
    outcome = commands.run(*fill(EXPORT, inputs, tmp_path), limit=0)
    outcome.check_refusal()
    assert "PyTorch finds no place for its temporary files" in outcome.lines[0]
    assert outcome.lines[0].endswith("Free some space, or set TMPDIR to a folder that you may write to.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("argv", [["inspect", "demo"], ["inspect", "{inputs}/model.engine"],
                                  ["inspect", "--lint", "{inputs}/model.onnx"], NPZ])  # fmt: skip
def test_a_full_standard_output_is_one_line(inputs, tmp_path, commands, argv):
    outcome = commands.run(*fill(argv, inputs, tmp_path), stdout="/dev/full")
    outcome.check_refusal()
    assert "No space left on device" in outcome.lines[0]


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, which only root can")
@pytest.mark.parametrize("stage", ["build", "shards", "picture", "npz", "merge"])
def test_a_folder_of_others_is_refused_before_the_work(inputs, commands, stage):
    argv, _, _ = STAGES[stage]
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to others
        here = Path(place, "here")
        shutil.copytree(inputs, Path(place, "inputs"))
        here.mkdir()
        for folder in (Path(place), here, *(file for file in Path(place).rglob("*") if file.is_dir())):
            folder.chmod(0o755)
        outcome = commands.run(*fill(argv, Path(place, "inputs"), here), user=NOBODY)
        said = [line for line in outcome.lines if "telemetry" not in line]  # ONNX Runtime's, about its own file
        Outcome(outcome.code, "\n".join(said)).check_refusal()
        assert "Permission denied" in said[0]
        assert list(here.iterdir()) == []


@pytest.fixture(scope="session")
def others(tmp_path_factory):
    """A second source of commands, for two at a time."""
    other = Commands(tmp_path_factory.mktemp("others") / "stderr")
    yield other
    other.close()


PAIRS = [("npz", 6), ("picture", 3), ("build", 3), ("shards", 3), ("calibrate", 2)]


@pytest.mark.parametrize(("stage", "pairs"), few(PAIRS, ("npz", 6), ("build", 3), ("shards", 3)))
def test_two_commands_that_write_one_output_both_end_well_or_one_is_refused(
    inputs, tmp_path, commands, others, stage, pairs
):
    argv, name, _ = STAGES[stage]
    undisturbed = tmp_path / "alone"
    assert commands.run(*fill(argv, inputs, undisturbed)).code == 0
    for number in range(rounds(pairs)):
        here = tmp_path / str(number)
        here.mkdir()
        for each in (commands, others):
            each.start(*fill(argv, inputs, here))
        outcomes = [each.end() for each in (commands, others)]
        CAUSED["pairs of writers"] += 1
        codes = sorted(outcome.code for outcome in outcomes)
        for outcome in outcomes:
            if outcome.code:
                outcome.check_refusal()
                assert "is writing it" in outcome.lines[0]
        # two that meet: one is refused where a lock is held; one that begins when the other has ended is not
        assert codes == [0, 0] or (stage in ("shards", "calibrate") and codes == [0, 1])
        assert digest(here / name) == digest(undisturbed / name)
