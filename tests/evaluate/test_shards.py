"""Images in a folder of shards: the numbers of the merged file, a shard in memory at a time, and no work done twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tqdit.evaluate.feature_store as store_module
from evaluate import commands
from evaluate.commands import refused
from support import rounds
from tqdit.cli.main import run
from tqdit.console import Console
from tqdit.demo.glyphs import draw
from tqdit.engines.run.shards import INDEX, SamplingJob, ShardFolder, merge_shards, open_shards, shard_name
from tqdit.errors import FileFormatError, OutputError
from tqdit.evaluate.extractors import Features, JudgeExtractor
from tqdit.evaluate.judges import JUDGES
from tqdit.evaluate.observe import Observed, observe
from tqdit.evaluate.samples import read_images
from tqdit.files import sha256

QUIET = Console(quiet=True)
COUNT, SIZE = 320, 128  # of drawings: two shards and a half one


class Means:
    """A quick extractor with spatial features. It counts its calls, and fails at the one after `last`."""

    name, digest, size = "means", "0123456789ab", 6

    def __init__(self, last: int = 1000, reason: type[BaseException] = RuntimeError) -> None:
        self.calls, self._last, self._reason = 0, last, reason

    def __call__(self, images: np.ndarray) -> Features:
        if self.calls == self._last:
            raise self._reason
        self.calls += 1
        x = images.reshape(len(images), -1, 3)[:, ::7].astype(np.float32)
        pooled = np.concatenate([x.mean(axis=1), x.std(axis=1)], axis=1)
        return Features(pooled, x[:, :5, 0].copy(), pooled[:, :4] / pooled[:, :4].sum(axis=1, keepdims=True))


def write_shards(path: Path, pixels: np.ndarray, labels: np.ndarray, size: int, which: list[int] | None = None) -> Path:
    """These images as tqdit-sample leaves them; `which`: the shards that it has come to."""
    job = SamplingJob("0" * 64, 5, "ddpm", tuple(labels.tolist()), 1.0, 0, len(pixels), size)
    with open_shards(path, job) as folder:
        for shard in range(job.shards) if which is None else which:
            part = job.images(shard)
            folder.add(shard, {"arr_0": pixels[part.start : part.stop], "arr_1": job.labels(shard)})
    return path


def noise(count: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """22 pictures of noise in six shards of four, the last one of two."""
    return write_shards(tmp_path / "samples", noise(22), np.arange(22) % 3, 4)


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "drawn", *draw(COUNT, 2), SIZE)


def merged(folder: Path) -> Path:
    output = folder.with_suffix(".npz")
    merge_shards(folder, output)
    return output


def evaluate(subject: Path, *arguments: object) -> dict:
    return commands.evaluate(subject.parent, subject, *arguments)


def look(folder: Path, extractor: Means | None = None, console: Console = QUIET, count: int | None = None) -> Observed:
    return observe(extractor or Means(), read_images(folder, count), console)


def assert_same(one: Observed, other: Observed) -> None:
    """To the last bit."""
    for name in ("pooled", "spatial", "probabilities"):
        np.testing.assert_array_equal(getattr(one.features, name), getattr(other.features, name))
    np.testing.assert_array_equal(one.labels, other.labels)
    assert (len(one), one.extractor) == (len(other), other.extractor)


def kept(folder: Path) -> list[Path]:
    return sorted((folder.parent / f"{folder.name}.features" / "means-0123456789ab").iterdir())


# the same numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_shards_of_whole_batches_give_the_numbers_of_the_merged_file_to_the_last_bit(drawn, reference):
    """A shard of 128 is two of the extractor's batches of 64, so every image is seen in the company it has there."""
    one = evaluate(drawn, "--reference", reference, "--report", drawn.parent / "report.html")
    other = evaluate(merged(drawn), "--reference", reference)
    assert one["sets"] == other["sets"]
    assert set(one["sets"]["samples"]) >= {"frechet_distance", "recall", "accuracy"}
    assert one["subject"]["count"] == COUNT
    assert (drawn.parent / "report.html").read_text().count("<figure>") == 16
    again = evaluate(drawn, "--reference", reference)  # from the kept features alone
    assert again["sets"] == one["sets"]


def test_shards_of_other_sizes_differ_by_rounding_alone(tmp_path):
    pixels, labels = draw(150, 2)
    folder = write_shards(tmp_path / "samples", pixels, labels, 50)
    extractor = JudgeExtractor()
    found = observe(extractor, read_images(folder), QUIET)
    expected = observe(extractor, read_images(merged(folder)), QUIET)
    np.testing.assert_allclose(found.features.pooled, expected.features.pooled, rtol=1e-4, atol=1e-5)
    assert found.features.spatial is None


@pytest.mark.slow
def test_the_first_images_are_those_of_the_merged_file(drawn):
    extractor, file = JudgeExtractor(), merged(drawn)
    for count in (200, 200, 128, 320, 200):  # before and after the whole shards are kept
        found = observe(extractor, read_images(drawn, count), QUIET)
        expected = observe(extractor, read_images(file, count), QUIET)
        np.testing.assert_array_equal(found.features.pooled, expected.features.pooled)
        np.testing.assert_array_equal(found.labels, expected.labels)


@pytest.mark.slow
def test_a_folder_of_shards_serves_as_the_reference_as_well(drawn, reference, tmp_path):
    with np.load(reference) as content:
        shards = write_shards(tmp_path / "reference", content["arr_0"], content["arr_1"], 64)
    one, other = evaluate(drawn, "--reference", shards), evaluate(drawn, "--reference", reference)
    assert one["sets"] == other["sets"]
    assert one["reference"] == {"name": str(shards), "count": 200}
    assert (tmp_path / "reference.features").is_dir()


@pytest.mark.slow
def test_a_folder_is_at_distance_zero_from_itself_and_from_the_statistics_it_left(drawn, tmp_path):
    stored = tmp_path / "stored.npz"
    found = evaluate(drawn, "--reference", drawn, "--write-reference", stored)["sets"]["samples"]
    assert found["frechet_distance"]["value"] == pytest.approx(0, abs=1e-6)
    found = evaluate(drawn, "--reference", stored)["sets"]["samples"]
    assert found["frechet_distance"]["value"] == pytest.approx(0, abs=1e-6)


def test_images_of_an_unconditional_model_have_no_labels(tmp_path):
    pixels = noise(6)
    job = SamplingJob("0" * 64, 5, "ddpm", (), None, 0, 6, 4)
    with open_shards(tmp_path / "samples", job) as folder:
        for shard in range(2):
            part = job.images(shard)
            folder.add(shard, {"arr_0": pixels[part.start : part.stop]})
    found = look(tmp_path / "samples")
    assert found.labels is None
    assert len(found) == 6
    np.testing.assert_array_equal(found.features.pooled, look(merged(tmp_path / "samples")).features.pooled)


def test_a_report_shows_the_first_pictures_however_small_the_shards_are(small):
    np.testing.assert_array_equal(read_images(small).shown, noise(22)[:16])
    np.testing.assert_array_equal(read_images(small, 5).shown, noise(22)[:5])
    assert read_images(small).shape == (8, 8, 3)


# kept features -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", range(6))
def test_a_run_that_was_stopped_goes_on_behind_the_finished_shards_to_the_same_bits(small, last):
    with pytest.raises(RuntimeError):
        look(small, Means(last))
    assert [file.name for file in kept(small)] == [shard_name(shard) for shard in range(last)] if last else True
    second = Means()
    found = look(small, second)
    assert second.calls == 6 - last
    assert_same(found, look(merged(small)))
    third = Means()
    assert_same(look(small, third), found)
    assert third.calls == 0


def test_the_user_learns_what_was_kept_and_what_is_left(small, capsys):
    with pytest.raises(
        KeyboardInterrupt, match=r"features of 4 of 6 shards are kept in .*samples\.features/means-0123"
    ):
        look(small, Means(4, KeyboardInterrupt))
    capsys.readouterr()
    look(small, console=Console())
    text = capsys.readouterr().err
    assert f"features of 4 of 6 shards are kept from an earlier run in {small}.features/means-0123456789ab\n" in text
    assert "features of" in text.splitlines()[-1]
    assert "2 of 2 shards" in text.splitlines()[-1]


def test_ctrl_c_is_one_line_that_says_what_is_kept(drawn, monkeypatch, capsys):
    class Stopped(JudgeExtractor):
        calls = 0

        def __call__(self, images: np.ndarray) -> Features:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(images)

    monkeypatch.setitem(JUDGES, "demo", replace(JUDGES["demo"], extractor=Stopped))
    assert run("evaluate", [str(drawn), "--reference", str(merged(drawn)), "-q"]) == 130
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "interrupted; features of 1 of 3 shards are kept in" in line
    assert line.endswith("Run the same command again.")


def test_a_shard_that_was_sampled_anew_is_extracted_anew(small):
    look(small)
    pixels = noise(22)
    pixels[4:8] = 255 - pixels[4:8]
    (small / shard_name(1)).unlink()
    write_shards(small, pixels, np.arange(22) % 3, 4, [1])
    extractor = Means()
    found = look(small, extractor)
    assert extractor.calls == 1
    assert_same(found, look(merged(small)))


def rewritten(file: Path, **changes: np.ndarray | None) -> None:
    with np.load(file) as content:
        arrays = {name: content[name] for name in content.files} | changes
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize("spoil", [
    lambda file: file.write_bytes(b""), lambda file: file.write_bytes(file.read_bytes()[:-40]),
    lambda file: file.write_bytes(file.read_bytes().replace(b"\x93NUMPY", b"\x93NUMPI", 1)),
    lambda file: rewritten(file, pooled=np.zeros((3, 6), np.float32)),
    lambda file: rewritten(file, pooled=np.zeros((4, 7), np.float32)),
    lambda file: rewritten(file, pooled=np.zeros((4, 6))), lambda file: rewritten(file, probabilities=None),
    lambda file: rewritten(file, shard=np.array("f" * 64)), lambda file: rewritten(file, extractor=np.array("judge 0")),
    lambda file: rewritten(file, torch=np.array("1.0")), lambda file: rewritten(file, version=None),
    lambda file: np.save(file.open("wb"), np.zeros(3)),
], ids=["empty", "truncated", "altered", "short", "wide", "float64", "incomplete", "of another shard",
        "of another extractor", "of another torch", "of no version", "no npz"])  # fmt: skip
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_kept_features_that_do_not_fit_are_made_again(small, spoil):
    expected = look(small)
    spoil(kept(small)[2])
    extractor = Means()
    assert_same(look(small, extractor), expected)
    assert extractor.calls == 1
    look(small, extractor)
    assert extractor.calls == 1


@pytest.mark.slow
def test_no_flipped_bit_of_a_kept_file_moves_a_feature(small):
    """Files of zip have checksums: what is read is what was written, or is made again."""
    expected, file = look(small), kept(small)[2]
    data, rng = file.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(0, 8 * len(data), rounds(300)):
        spoilt = bytearray(data)
        spoilt[place // 8] ^= 1 << place % 8
        file.write_bytes(bytes(spoilt))
        assert_same(look(small), expected)


def test_each_extractor_keeps_its_own_features(small):
    look(small)
    other = Means()
    other.digest = "ba9876543210"
    look(small, other)
    assert other.calls == 6
    assert sorted(path.name for path in Path(f"{small}.features").iterdir()) == ["means-0123456789ab",
                                                                                  "means-ba9876543210"]  # fmt: skip


def test_tqdit_sample_still_takes_the_folder_for_its_own(small):
    before = {file.name: sha256(file) for file in small.iterdir()}
    look(small)
    assert {file.name: sha256(file) for file in small.iterdir()} == before
    with open_shards(small, ShardFolder(small, read_images(small).folder.job, {}).job) as folder:
        assert folder.pending() == []


def test_features_lie_beside_the_name_that_was_given(small, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "link").symlink_to(small)
    look(tmp_path / "mine" / "link")
    assert (tmp_path / "mine" / "link.features").is_dir()
    monkeypatch.chdir(small)
    look(Path())
    assert len(kept(small)) == 6


def test_a_place_that_cannot_be_written_costs_the_keeping_alone(small, capsys):
    """As samples on a disk that is not one's own; one line says so before the work begins."""
    Path(f"{small}.features").write_text("a file in the way")
    found = look(small, console=Console())
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert len(said) == 1
    assert "so features are not kept, and an evaluation that is stopped begins anew" in said[0]
    assert f"link to {small}" in said[0]
    assert_same(found, look(merged(small)))


def test_a_disk_that_is_full_for_a_while_costs_the_keeping_alone(small, capsys, monkeypatch):
    write = store_module.write_npz
    full = iter([False, True, True, False, False, False])

    def sometimes(path: Path, **arrays: np.ndarray) -> None:
        if next(full):
            raise OutputError("no space") from OSError(28, "No space left on device")
        write(path, **arrays)

    monkeypatch.setattr(store_module, "write_npz", sometimes)
    found = look(small, console=Console())
    assert capsys.readouterr().err.count("cannot be written (No space left on device), so features are not kept") == 1
    assert len(kept(small)) == 4
    extractor = Means()
    monkeypatch.undo()
    assert_same(look(small, extractor), found)
    assert extractor.calls == 2


@pytest.mark.slow
def test_two_evaluations_at_once_both_end_well(drawn, reference, tmp_path):
    arguments = ["--reference", reference, "--metrics", "accuracy", "precision"]
    expected = evaluate(merged(drawn), *arguments)["sets"]
    outputs = [tmp_path / f"{number}.json" for number in range(2)]
    command = [sys.executable, "-m", "tqdit.cli", "evaluate", drawn, *arguments, "-q", "-o"]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, output], env=environment, **options) for output in outputs]
    ends = [process.communicate(timeout=120)[1] for process in processes]
    assert ends == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(json.loads(output.read_text())["sets"] == expected for output in outputs)
    names = [file.name for file in (tmp_path / "drawn.features").rglob("*") if file.is_file()]
    assert sorted(names) == [shard_name(shard) for shard in range(3)]


# memory --------------------------------------------------------------------------------------------------------------


def test_never_more_than_one_shard_of_pixels_is_in_memory(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "samples", noise(160, 128), np.arange(160) % 3, 8)
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0
    read = ShardFolder.read

    def watched(self: ShardFolder, shard: int) -> dict[str, np.ndarray]:
        nonlocal most
        most = max(most, sum(one() is not None for one in alive))
        found = read(self, shard)
        pixels = found["arr_0"]
        alive.append(weakref.ref(pixels if pixels.base is None else pixels.base))  # a slice holds the base alone
        return found

    monkeypatch.setattr(ShardFolder, "read", watched)
    tracemalloc.start()
    shown = read_images(folder).shown  # of two shards of eight
    alive.clear()
    most = 0
    look(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(alive) == 21  # the first one twice: it says how large the images are
    assert len(shown) == 16
    assert most == 0
    assert not any(one() is not None for one in alive)
    pixels = 8 * 128 * 128 * 3
    assert peak < 6 * pixels  # bytes and pixels of a shard, the pictures of a report, the reader's buffers; all is 20


# what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"),
], ids=["missing", "altered"])  # fmt: skip
@pytest.mark.parametrize("seen", [False, True])
def test_a_shard_that_is_missing_or_altered_is_refused_even_where_its_features_are_kept(small, change, seen):
    if seen:
        look(small)
    change(small / shard_name(3))
    with pytest.raises(
        FileFormatError, match=r"shard-00003\.npz: (no such file|truncated or altered).*[Rr]un the same"
    ):
        look(small)
    look(small, count=12)  # three shards are as they were


def test_an_unfinished_job_says_how_far_it_is_and_what_can_be_had(tmp_path, capsys):
    pixels, labels = draw(96, 2)
    folder = write_shards(tmp_path / "samples", pixels, labels, 32, [1])
    line = refused(capsys, folder)
    assert "samples: 1 of 3 shards are done. Run the same tqdit-sample command again.\n" in line
    write_shards(folder, pixels, labels, 32, [0])
    line = refused(capsys, folder, "-n", 65)
    assert "2 of 3 shards are done. Run the same tqdit-sample command again, or pass -n 64 for those that" in line
    assert "2 of 3 shards are done. Run the same tqdit-sample command again.\n" in refused(
        capsys, folder, "-n", 8, "--reference", folder
    )
    assert "holds 96 images, -n asks for 97" in refused(capsys, folder, "-n", 97)


@pytest.mark.slow
def test_the_finished_beginning_of_an_unfinished_job_can_be_measured(tmp_path, reference):
    pixels, labels = draw(256, 2)
    folder = write_shards(tmp_path / "samples", pixels, labels, 64, [0, 1, 3])
    np.savez(tmp_path / "one.npz", arr_0=pixels[:100], arr_1=labels[:100])
    found = evaluate(folder, "-n", 100, "--reference", reference)
    assert found["sets"] == evaluate(tmp_path / "one.npz", "--reference", reference)["sets"]
    assert found["subject"]["count"] == 100


def test_latents_are_refused_as_samples_and_as_a_reference(small, drawn, tmp_path, capsys):
    job = SamplingJob("0" * 64, 5, "ddpm", (0,), 1.0, 0, 4, 4, "latents")
    latents = tmp_path / "latents"
    with open_shards(latents, job) as folder:
        folder.add(0, {"latents": np.zeros((4, 4, 8, 8), np.float32), "labels": job.labels(0)})
    expected = "latents: holds latents, expected images. Export with --vae DIR to sample images."
    assert expected in refused(capsys, latents)
    assert expected in refused(capsys, drawn, "--reference", latents)


def test_shards_that_hold_no_images_are_refused_by_name(tmp_path):
    def written(*arrays: np.ndarray) -> Path:
        job = SamplingJob("0" * 64, 5, "ddpm", (0,), 1.0, 0, 8, 4)
        with open_shards(tmp_path / "samples", job, force=True) as folder:
            for shard, array in enumerate(arrays):
                folder.add(shard, {"arr_0": array, "arr_1": job.labels(shard)})
        return tmp_path / "samples"

    with pytest.raises(FileFormatError, match=r"shard-00000\.npz: arr_0 is float64 \(4, 8, 8, 3\), expected images"):
        read_images(written(noise(4).astype(float), noise(4)))
    with pytest.raises(FileFormatError, match=r"shard-00001\.npz: 9x9 pixels, the first shard has 8x8"):
        look(written(noise(4), noise(4, 9)))


def test_a_spoilt_index_is_refused(small, capsys):
    (small / INDEX).write_text("{")
    assert "shards.json: empty or truncated" in refused(capsys, small)
    assert "shards.json: empty or truncated" in refused(capsys, merged_like(small), "--reference", small)


def merged_like(folder: Path) -> Path:
    path = folder.parent / "other.npz"
    pixels, labels = draw(8, 0)
    np.savez(path, arr_0=pixels, arr_1=labels)
    return path
