"""Samples on disk."""

import json

import numpy as np
import pytest

import support
from tqdit.engines.run.images import check_output, grid, write_images
from tqdit.errors import OutputError, UsageError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
LABELS = np.arange(5)


def test_npz_is_what_the_adm_evaluator_reads(tmp_path):
    write_images(tmp_path / "s.npz", IMAGES, LABELS, {})
    with np.load(tmp_path / "s.npz") as content:
        assert content.files[0] == "arr_0"
        np.testing.assert_array_equal(content["arr_0"], IMAGES)
        assert content["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(content["arr_1"], LABELS)


def test_a_folder_holds_every_image_losslessly_and_says_how_it_was_made(tmp_path):
    folder = tmp_path / "samples"
    write_images(folder, IMAGES, LABELS, {"seed": 3})
    for index in range(5):
        np.testing.assert_array_equal(support.read_picture(folder / f"{index:06d}.png"), IMAGES[index])
    assert json.loads((folder / "samples.json").read_text()) == {"seed": 3, "classes": [0, 1, 2, 3, 4]}


def test_images_without_classes_are_written_without_them(tmp_path):
    write_images(tmp_path / "s.npz", IMAGES, None, {})
    write_images(tmp_path / "samples", IMAGES, None, {"seed": 3})
    with np.load(tmp_path / "s.npz") as content:
        assert content.files == ["arr_0"]
    assert json.loads((tmp_path / "samples" / "samples.json").read_text()) == {"seed": 3}


def test_a_grid_shows_every_image_enlarged(tmp_path):
    write_images(tmp_path / "s.png", IMAGES, LABELS, {})
    sheet = support.read_picture(tmp_path / "s.png")
    assert sheet.shape == (2 * 64 + 2, 3 * 64 + 4, 3)
    for index in range(5):
        top, left = index // 3 * 66, index % 3 * 66
        np.testing.assert_array_equal(sheet[top : top + 64 : 4, left : left + 64 : 4], IMAGES[index])


def test_large_images_keep_their_size():
    assert grid(np.zeros((1, 256, 256, 3), np.uint8)).size == (256, 256)


def test_earlier_samples_are_replaced_but_other_files_are_not(tmp_path):
    folder = tmp_path / "samples"
    for count in (5, 2):
        check_output(folder)
        write_images(folder, IMAGES[:count], LABELS[:count], {})
    assert len(list(folder.glob("*.png"))) == 2
    (tmp_path / "photo.jpg").write_text("precious")
    with pytest.raises(OutputError, match=r"photo\.jpg' is not of samples"):
        check_output(tmp_path)
    folder.with_suffix(".png").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_output(folder.with_suffix(".png"))


def test_an_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"unknown kind of output '\.jpeg'"):
        check_output(tmp_path / "samples.jpeg")


def test_an_unwritable_place_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_images(tmp_path / "file" / "s.png", IMAGES, LABELS, {})
