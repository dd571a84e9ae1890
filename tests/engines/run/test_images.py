"""Samples on disk."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

import support
from tqdit.engines.run.images import check_output, grid, write_images
from tqdit.errors import MissingLibraryError, OutputError, UsageError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
LABELS = np.arange(5)
VIDEOS = np.repeat(np.random.default_rng(0).integers(0, 256, (2, 3, 1, 1, 3), np.uint8), 16, 2).repeat(17, 3)


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


def test_a_picture_of_videos_has_a_row_of_frames_for_each(tmp_path):
    write_images(tmp_path / "s.png", VIDEOS, None, {})
    sheet = support.read_picture(tmp_path / "s.png")
    height, width = 3 * 16, 3 * 17
    assert sheet.shape == (2 * height + 2, 3 * width + 4, 3)
    for video in range(2):
        for frame in range(3):
            found = sheet[video * (height + 2) + height // 2, frame * (width + 2) + width // 2]
            np.testing.assert_array_equal(found, VIDEOS[video, frame, 0, 0])


def test_a_gif_shows_every_frame_of_all_videos_side_by_side(tmp_path):
    write_images(tmp_path / "s.gif", VIDEOS, None, {}, frames_per_s=10)
    with Image.open(tmp_path / "s.gif") as file:
        assert (file.n_frames, file.info["duration"], file.info["loop"]) == (3, 100, 0)
        for frame in range(3):
            file.seek(frame)
            shown = np.asarray(file.convert("RGB")).astype(int)
            for video in range(2):  # at most 256 colours
                assert np.abs(shown[24, 25 + video * (3 * 17 + 2)] - VIDEOS[video, frame, 0, 0]).max() <= 8


def test_a_folder_holds_a_gif_of_each_video(tmp_path):
    for _ in range(2):
        check_output(tmp_path / "s")
        write_images(tmp_path / "s", VIDEOS, None, {})
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == ["000000.gif", "000001.gif", "samples.json"]
    with Image.open(tmp_path / "s" / "000001.gif") as file:
        assert (file.n_frames, file.size) == (3, (17, 16))


def test_an_npz_of_videos_has_an_axis_of_frames(tmp_path):
    write_images(tmp_path / "s.npz", VIDEOS, None, {})
    np.testing.assert_array_equal(np.load(tmp_path / "s.npz")["arr_0"], VIDEOS)


def test_pictures_are_no_video_and_an_mp4_needs_its_library(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match=r"s\.gif: the engine makes pictures"):
        check_output(tmp_path / "s.gif")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingLibraryError, match=r"\.mp4 needs av.*pip install"):
        check_output(tmp_path / "s.mp4", is_video=True)
    check_output(tmp_path / "s.gif", is_video=True)


def test_an_mp4_holds_the_frames(tmp_path):
    av = pytest.importorskip("av", reason="PyAV, of the extra video, is not installed")
    write_images(tmp_path / "s.mp4", VIDEOS, None, {}, frames_per_s=10)
    with av.open(str(tmp_path / "s.mp4")) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert file.streams.video[0].average_rate == 10
    assert len(frames) == 3
    for number, frame in enumerate(frames):
        for video in range(2):  # lossy
            shown = frame[24, 25 + video * (3 * 17 + 2)].astype(int)
            assert np.abs(shown - VIDEOS[video, number, 0, 0]).max() <= 16
