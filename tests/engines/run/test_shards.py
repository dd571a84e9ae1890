"""Many samples: shards on disk, continued from wherever a run stopped, always with the same bytes."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import support
from tqdit.cli.main import run
from tqdit.engines.bundle import MANIFEST, read_manifest
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.shards import (
    INDEX,
    SamplingJob,
    describe_job,
    merge_shards,
    open_shards,
    read_index,
    read_shards,
)
from tqdit.errors import FileFormatError, OutputError, UsageError
from tqdit.files import sha256
from tqdit.ports import Port, Signature
from tqdit.sampling.process import Flow
from tqdit.sampling.schedule import SamplingSpec

COUNT, SIZE = 11, 4  # three shards, the last one of three images


def command(bundle, output, *more):
    return [str(bundle), "-n", str(COUNT), "--shard-size", str(SIZE), "-o", str(output), "-q", *more]


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(bundle, tmp_path_factory):
    """The content of a folder that one run wrote without a stop."""
    folder = tmp_path_factory.mktemp("whole") / "samples"
    assert run("sample", command(bundle, folder)) == 0
    return content(folder)


@pytest.fixture
def folder(whole, tmp_path):
    """A finished folder to spoil."""
    path = tmp_path / "samples"
    path.mkdir()
    for name, data in whole.items():
        (path / name).write_bytes(data)
    return path


def refused(capsys, arguments, code=1):
    assert run("sample", arguments) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def test_the_shards_together_hold_the_images_of_one_run(bundle, folder):
    with Sampler.open(bundle) as sampler:
        labels = np.resize(np.arange(5), COUNT)
        images = sampler.sample(labels, seed=0)
    shards = list(read_shards(folder))
    assert [len(shard["arr_0"]) for shard in shards] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate([shard["arr_0"] for shard in shards]), images)
    np.testing.assert_array_equal(np.concatenate([shard["arr_1"] for shard in shards]), labels)
    assert shards[0]["arr_1"].dtype == np.int64


def test_the_python_of_the_guide_reads_them(folder, monkeypatch):
    guide = Path(__file__).parents[3] / "docs" / "sampling-many.md"
    (block,) = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(folder.parent)
    names = {}
    exec(compile(block, guide.name, "exec"), names)
    assert names["count"] == COUNT


def test_the_index_says_what_was_made_and_lists_every_shard(bundle, whole):
    values = json.loads(whole[INDEX])
    assert values["job"] == {
        "engine": sha256(bundle / MANIFEST), "steps": 20, "sampler": "ddpm", "classes": [0, 1, 2, 3, 4],
        "guidance_scale": 1.5, "seed": 0, "count": COUNT, "shard_size": SIZE, "content": "images",
        "prompts": None, "timesteps": [], "guidance_interval": None, "full_calls": [],
    }  # fmt: skip
    assert list(values["shards"]) == ["shard-00000.npz", "shard-00001.npz", "shard-00002.npz"]
    assert set(whole) == {INDEX, *values["shards"]}


def test_a_merged_file_is_byte_for_byte_that_of_a_run_into_one_file(bundle, folder, tmp_path, capsys):
    assert run("sample", [str(bundle), "-n", str(COUNT), "-o", str(tmp_path / "one.npz"), "-q"]) == 0
    assert run("sample", ["--merge", str(folder), "-o", str(tmp_path / "merged.npz")]) == 0
    assert (tmp_path / "merged.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "merged.npz")
    assert "--merge writes an .npz" in refused(capsys, ["--merge", str(folder), "-o", str(tmp_path / "x.png")], 2)


def test_a_finished_folder_is_left_as_it_is(bundle, folder, whole):
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.npz")}
    assert run("sample", command(bundle, folder)) == 0
    assert {file.name: file.stat().st_mtime_ns for file in folder.glob("*.npz")} == before
    assert content(folder) == whole


@pytest.mark.parametrize("spoil", [
    lambda path: path.unlink(), lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
], ids=["missing", "truncated", "altered"])  # fmt: skip
def test_a_spoilt_shard_is_refused_by_readers_and_made_again_by_the_same_command(
    bundle, folder, whole, spoil, tmp_path
):
    spoil(folder / "shard-00001.npz")
    with pytest.raises(FileFormatError, match=r"shard-00001\.npz: (no such file|(empty|truncated) or )"):
        list(read_shards(folder))
    with pytest.raises(FileFormatError):
        merge_shards(folder, tmp_path / "merged.npz")
    assert not (tmp_path / "merged.npz").exists()
    before = (folder / "shard-00000.npz").stat().st_mtime_ns
    assert run("sample", command(bundle, folder)) == 0
    assert content(folder) == whole
    assert (folder / "shard-00000.npz").stat().st_mtime_ns == before


def test_an_unfinished_folder_is_refused_by_readers(bundle, tmp_path):
    job = describe_job(bundle, read_manifest(bundle), None, 0, COUNT, SIZE)
    with open_shards(tmp_path / "samples", job), Sampler.open(bundle) as sampler:
        pass
    with open_shards(tmp_path / "samples", job) as folder, Sampler.open(bundle) as sampler:
        assert folder.pending() == [0, 1, 2]
        folder.add(1, job.make(sampler, 1))
    with pytest.raises(FileFormatError, match="1 of 3 shards are done"):
        next(read_shards(tmp_path / "samples"))
    assert read_index(tmp_path / "samples").pending() == [0, 2]


@pytest.mark.parametrize(("more", "message"), [
    (["--seed", "1"], "holds samples of another run: seed 0 (asked for 1)"),
    (["--guidance-scale", "2"], "guidance_scale 1.5 (asked for 2.0)"),
    (["--steps", "10"], "steps 20 (asked for 10)"),
    (["--sampler", "ddim"], "sampler ddpm (asked for ddim)"),
    (["--guidance-interval", "3,700"], "guidance_interval None (asked for 3.0,700.0)"),
    (["--classes", "1,2"], "classes 0,1,2,3,4 (asked for 1,2)"),
    (["-n", "12"], "count 11 (asked for 12)"),
    (["--shard-size", "5"], "shard_size 4 (asked for 5)"),
])  # fmt: skip
def test_other_settings_in_the_same_folder_are_refused_with_what_differs(bundle, folder, whole, capsys, more, message):
    assert message in refused(capsys, command(bundle, folder, *more))
    assert content(folder) == whole


def test_a_chain_without_forecasts_does_not_continue_one_with_them(bundle, tmp_path):
    job = describe_job(bundle, read_manifest(bundle), None, 0, COUNT, SIZE)
    with open_shards(tmp_path / "samples", replace(job, full_calls=(0, 18, 19))):
        pass
    with (
        pytest.raises(OutputError, match=r"full_calls 0,18,19 \(asked for \(\)\)"),
        open_shards(tmp_path / "samples", job),
    ):
        pass


@pytest.mark.slow
def test_another_engine_in_the_same_folder_is_refused(bundle_of, folder, whole, capsys):
    assert "another run: engine " in refused(capsys, command(bundle_of(steps=10), folder))
    assert content(folder) == whole


def test_force_starts_anew_and_removes_the_shards_that_are_left_over(bundle, folder, whole):
    assert run("sample", command(bundle, folder, "--shard-size", "6", "--force")) == 0
    assert sorted(content(folder)) == ["shard-00000.npz", "shard-00001.npz", INDEX]
    assert run("sample", command(bundle, folder, "--force")) == 0
    assert content(folder) == whole


def test_a_folder_of_other_things_is_never_touched(bundle, tmp_path, capsys):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "thesis.tex").write_text("years")
    for more in ([], ["--force"]):
        message = refused(capsys, command(bundle, tmp_path / "samples", *more))
        assert "'thesis.tex' is not of shards of samples" in message
    assert content(tmp_path / "samples") == {"thesis.tex": b"years"}
    (tmp_path / "thesis").write_text("years")
    assert "thesis: cannot be written (File exists)" in refused(capsys, command(bundle, tmp_path / "thesis"))


def test_shards_without_an_index_are_somebody_elses(bundle, tmp_path, capsys):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "shard-00000.npz").write_text("years")
    for more in ([], ["--force"]):
        message = refused(capsys, command(bundle, tmp_path / "samples", *more))
        assert "'shard-00000.npz' is not of shards of samples" in message
    assert content(tmp_path / "samples") == {"shard-00000.npz": b"years"}


def test_more_images_than_there_is_room_for_are_refused_before_any_is_made(bundle, tmp_path, capsys, monkeypatch):
    """A trillion at once, in a trillion shards, in shards that are too large, and on a disk that is too small."""
    many = 10**12
    for more, message in (
        (["-o", "s.npz"], "1000000000000 images at once: 960,000.0 GB of memory are needed"),
        (["-o", "s.png"], "1000000000000 images at once: 960,000.0 GB of memory are needed"),
        (["-o", "s"], "7812500000 shards, a folder holds at most 100000. Pass a larger --shard-size"),
        (["-o", "s", "--shard-size", "1000000000"], "1000000000 images at once: 960.0 GB of memory are needed"),
        (["-o", "s", "--shard-size", "10000000"], "s: needs 192,000.0 GB, the disk has"),
    ):
        monkeypatch.chdir(tmp_path)
        code = 1 if "disk" in message else 2
        assert message in refused(capsys, [str(bundle), "-n", str(many), "-q", *more], code)
        assert not any(file.name.endswith((".npz", ".png")) for file in tmp_path.rglob("*"))


@pytest.mark.parametrize(("more", "kind"), [
    ([], "png"), (["--format", "npz"], "npz"), (["--format", "png"], "png"), (["--shard-size", "2"], "npz"),
])  # fmt: skip
def test_a_folder_holds_pictures_or_shards_by_the_flags(bundle, tmp_path, more, kind):
    assert run("sample", [str(bundle), "-n", "2", "-o", str(tmp_path / "samples"), "-q", *more]) == 0
    assert {file.suffix for file in (tmp_path / "samples").iterdir()} == {f".{kind}", ".json"}


def test_many_images_go_into_shards(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("tqdit.cli.sample.MOST_PICTURES", 3)
    assert run("sample", [str(bundle), "-n", "4", "-o", str(tmp_path / "samples"), "-q"]) == 0
    assert (tmp_path / "samples" / INDEX).is_file()


@pytest.mark.slow
def test_latents_go_into_shards_and_merge_as_well(bundle_of, tmp_path):
    folder = bundle_of(pixels=False)
    assert run("sample", [str(folder), "-n", "5", "-o", str(tmp_path / "s"), "-q"]) == 0
    assert run("sample", [str(folder), "-n", "5", "-o", str(tmp_path / "one.npz"), "-q"]) == 0
    (shard,) = read_shards(tmp_path / "s")
    assert shard["latents"].shape == (5, 4, 8, 8)
    merge_shards(tmp_path / "s", tmp_path / "merged.npz")
    assert (tmp_path / "merged.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


def test_another_chain_makes_other_shards_and_continues_with_the_same_flags(bundle, folder, tmp_path):
    flags = ["--steps", "7", "--sampler", "ddim"]
    assert run("sample", command(bundle, tmp_path / "s", *flags)) == 0
    before = content(tmp_path / "s")
    assert before["shard-00000.npz"] != content(folder)["shard-00000.npz"]
    (tmp_path / "s" / "shard-00001.npz").unlink()
    assert run("sample", command(bundle, tmp_path / "s", *flags)) == 0
    assert content(tmp_path / "s") == before


def test_shards_of_an_unconditional_model_hold_images_alone(tmp_path):
    """11 images from 4 on: the numbers of the images, not their requests, tell them apart."""
    ports = Port("x", "state", "float32", (None, 3, 4, 4)), Port("t", "time", "float32", (None,))
    model = replace(
        support.tiny_model(pixels=True), signature=Signature(ports, (None, 3, 4, 4), "Toy"), guidance=None,
        sampling=SamplingSpec(Flow(), "euler", 3),
    )  # fmt: skip
    sampler = Sampler(model.card(), lambda inputs: inputs["x"] / 3)
    job = SamplingJob("x", 3, "euler", (), None, 0, COUNT, SIZE)
    with open_shards(tmp_path / "s", job) as folder:
        for shard in folder.pending():
            folder.add(shard, job.make(sampler, shard))
    shards = list(read_shards(tmp_path / "s"))
    assert [list(shard) for shard in shards] == 3 * [["arr_0"]]
    images = sampler.sample(COUNT)
    np.testing.assert_array_equal(np.concatenate([shard["arr_0"] for shard in shards]), images)
    merge_shards(tmp_path / "s", tmp_path / "merged.npz")
    with np.load(tmp_path / "merged.npz") as merged:
        assert merged.files == ["arr_0"]
        np.testing.assert_array_equal(merged["arr_0"], images)


def test_an_unguided_engine_makes_shards(bundle_of, tmp_path):
    assert run("sample", command(bundle_of(guided=False), tmp_path / "s")) == 0
    assert len(list(read_shards(tmp_path / "s"))) == 3


@pytest.mark.parametrize(("more", "message"), [
    (["--shard-size", "0"], "--shard-size is 0"), (["--classes", "9"], "9 is out of range"),
    (["--seed", "-1"], "seed is -1"), (["--batch", "0"], "batch is 0"),
    (["--workers", "2"], "--workers belongs to --ray"),
    (["--format", "png"], "--shard-size makes shards"), (["-o", "s.png"], "--shard-size belongs to a folder"),
])  # fmt: skip
def test_a_bad_request_is_one_line_and_writes_nothing(bundle, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, command(bundle, "samples", *more), 2)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_cannot_write_one_folder(bundle, folder, whole, capsys):
    job = read_index(folder).job
    with open_shards(folder, job):
        message = refused(capsys, command(bundle, folder))
    assert f"{folder}: another process is writing it" in message
    assert content(folder) == whole


def sampling(bundle, output):
    return subprocess.Popen(
        [sys.executable, "-m", "tqdit.cli", "sample", *command(bundle, output)],
        stderr=subprocess.PIPE, text=True, preexec_fn=support.listen_to_ctrl_c,
    )  # fmt: skip


@pytest.fixture(scope="module")
def slow(bundle_of, tmp_path_factory):
    """A bundle whose shards take a while, and the content of its folder."""
    bundle, folder = bundle_of(steps=200), tmp_path_factory.mktemp("slow") / "samples"
    assert run("sample", command(bundle, folder)) == 0
    return bundle, content(folder)


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_stopped_is_continued_to_the_same_bytes(slow, tmp_path, signal_number):
    (bundle, expected), output = slow, tmp_path / "samples"
    process = sampling(bundle, output)
    until = time.monotonic() + 60
    while not (output / "shard-00000.npz").exists() and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal_number)
    _, err = process.communicate(timeout=60)
    if signal_number == signal.SIGINT:
        assert process.returncode == 130
        assert "shards are done and kept in" in err
    else:
        assert process.returncode == -signal_number
        assert err == ""
    first = (output / "shard-00000.npz").stat().st_mtime_ns
    listed = len(read_index(output).pending()) < 3
    assert run("sample", command(bundle, output)) == 0
    assert content(output) == expected
    assert ((output / "shard-00000.npz").stat().st_mtime_ns == first) >= listed  # what is listed is not made again


@pytest.mark.slow
def test_a_full_disk_keeps_the_finished_shards_and_the_next_run_goes_on(bundle, folder, whole, capsys):
    """A file of the run cannot grow: the third shard is lost, the first two are not."""
    (folder / "shard-00002.npz").unlink()
    code = (
        "import resource, signal, sys; from tqdit.cli.main import run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))\n"
        "sys.exit(run('sample', sys.argv[1:]))"
    )
    arguments = [sys.executable, "-c", code, *command(bundle, folder)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "cannot be written (File too large)" in result.stderr
    assert run("sample", command(bundle, folder)) == 0
    assert content(folder) == whole


@pytest.mark.parametrize(("change", "message"), [
    (lambda text: text[:-30], "damaged"), (lambda text: f"[{text}]", "not a JSON object"),
    (lambda text: text[:0], "empty or truncated"),
    (lambda text: text.replace('"count": 11', '"count": "11"'), "$.job.count"),
    (lambda text: text.replace('"seed": 0', '"seed": -1'), "seed is -1"),
    (lambda text: text.replace('"content": "images"', '"content": "sounds"'), "$.job.content"),
    (lambda text: text.replace('"format_version": 3', '"format_version": 4'), "written in format 4"),
    (lambda text: text.replace("shard-00000", "../../etc/x"), "not a shard of this job"),
    (lambda text: text.replace("shard-00002", "shard-00003"), "not a shard of this job"),
])  # fmt: skip
def test_a_spoilt_index_is_refused_and_force_starts_anew(bundle, folder, whole, capsys, change, message):
    (folder / INDEX).write_text(change((folder / INDEX).read_text()))
    assert message in refused(capsys, command(bundle, folder))
    assert message in refused(capsys, ["--merge", str(folder), "-o", str(folder.parent / "m.npz")])
    assert run("sample", command(bundle, folder, "--force")) == 0
    assert content(folder) == whole


@pytest.mark.parametrize(("changes", "message"), [
    ({"count": 0}, "0 images"), ({"steps": 0}, "0 steps of ddim"), ({"shard_size": -1}, "shards of -1"),
    ({"seed": -1}, "seed is -1"),
])  # fmt: skip
def test_a_job_that_no_run_can_have_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        SamplingJob(
            **{
                "engine": "x",
                "steps": 1,
                "sampler": "ddim",
                "classes": (1,),
                "guidance_scale": 1.0,
                "seed": 0,
                "count": 1,
                **changes,
            }
        )


def test_the_index_has_one_line_per_shard(whole):
    """So that a diff of two folders shows which shards differ."""
    text = whole[INDEX].decode()
    assert text.endswith("}\n")
    assert sum("shard-0000" in line for line in text.splitlines()) == 3


def test_a_read_only_folder_is_one_line(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tqdit.files.os.access", lambda *_: False)  # root may write everywhere else
    assert "Permission denied" in refused(capsys, command(bundle, tmp_path / "s"))


def test_a_folder_of_shards_is_not_taken_for_a_folder_of_pictures(bundle, folder, whole, capsys):
    message = refused(capsys, [str(bundle), "-n", "2", "--format", "png", "-o", str(folder), "-q"])
    assert "'shard-00000.npz' is not of samples" in message
    assert content(folder) == whole
    with pytest.raises(OutputError):
        merge_shards(folder, folder)
