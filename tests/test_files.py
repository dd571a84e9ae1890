"""Outputs appear whole or not at all, whatever happens on the way."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tqdit.errors import FileFormatError, OutputError, UsageError
from tqdit.files import (
    LOCK,
    check_only,
    check_writable,
    lock_folder,
    read_npz,
    sha256,
    temporary_folder,
    whole_file,
    whole_folder,
)


def content(folder):
    """Every file below a folder with its text."""
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def anything(path):
    """No folder is refused."""


def write_file(path, text="new"):
    with whole_file(path) as temporary:
        temporary.write_text(text)


def write_folder(path, **files):
    with whole_folder(path, anything) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


def refusal(write, path):
    with pytest.raises(OutputError) as error:
        write(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}: cannot be written (")
    return str(error.value).removeprefix(f"{path}: cannot be written ")


def fail_in_the_middle(kind, path, error):
    with kind(path, anything) if kind is whole_folder else kind(path) as temporary:
        (temporary if kind is whole_file else temporary / "new").write_text("half")
        raise error


def python(program, *arguments):
    """Start a program of our own in another process."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_file_appears_with_its_whole_content(tmp_path):
    write_file(tmp_path / "new" / "folder" / "out.txt")
    assert content(tmp_path) == {"new/folder/out.txt": "new"}


def test_a_file_is_replaced(tmp_path):
    (tmp_path / "out.txt").write_text("old")
    write_file(tmp_path / "out.txt")
    assert content(tmp_path) == {"out.txt": "new"}


def test_the_old_file_is_there_until_the_new_one_is_complete(tmp_path):
    (tmp_path / "out.txt").write_text("old")
    with whole_file(tmp_path / "out.txt") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "out.txt").read_text() == "old"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_in_the_middle_keeps_the_old_file(tmp_path, error):
    (tmp_path / "out.txt").write_text("old")
    with pytest.raises(error):
        fail_in_the_middle(whole_file, tmp_path / "out.txt", error)
    assert content(tmp_path) == {"out.txt": "old"}


def test_a_failure_in_the_middle_leaves_no_new_file(tmp_path):
    with pytest.raises(ValueError, match="why"):
        fail_in_the_middle(whole_file, tmp_path / "out.txt", ValueError("why"))
    assert content(tmp_path) == {}


def test_a_folder_appears_with_its_whole_content(tmp_path):
    write_folder(tmp_path / "deep" / "out", a="1", b="2")
    assert content(tmp_path) == {"deep/out/a": "1", "deep/out/b": "2"}


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    write_folder(tmp_path / "out", old="1", both="1")
    write_folder(tmp_path / "out", new="2", both="2")
    assert content(tmp_path) == {"out/new": "2", "out/both": "2"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_returns_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", old="1")
    rename = Path.rename

    def fail_if_the_place_is_free(self, target):
        if target == tmp_path / "out" and not target.exists() and (self / "new").exists():
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_if_the_place_is_free)
    with pytest.raises(OutputError, match="No space left on device"):
        write_folder(tmp_path / "out", new="2")
    assert content(tmp_path) == {"out/old": "1"}


def test_a_folder_that_another_run_puts_there_meanwhile_is_replaced(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", old="1")
    rename, theirs = Path.rename, []

    def add_theirs(self, target):
        result = rename(self, target)
        if self == tmp_path / "out" and not theirs:
            theirs.append(self)
            self.mkdir()
            (self / "theirs").write_text("3")
        return result

    monkeypatch.setattr(Path, "rename", add_theirs)
    write_folder(tmp_path / "out", new="2")
    assert theirs
    assert content(tmp_path) == {"out/new": "2"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_in_the_middle_keeps_the_old_folder(tmp_path, error):
    write_folder(tmp_path / "out", old="1")
    with pytest.raises(error):
        fail_in_the_middle(whole_folder, tmp_path / "out", error)
    assert content(tmp_path) == {"out/old": "1"}


def test_a_folder_is_asked_for_before_the_work_and_after_it(tmp_path):
    write_folder(tmp_path / "out", ours="1")

    def check(path):
        check_only(path, {"ours"}.__contains__, "a test")

    with pytest.raises(OutputError, match=r"out: 'photo\.jpg' is not of a test"), whole_folder(tmp_path / "out", check):
        (tmp_path / "out" / "photo.jpg").write_text("precious")
    assert content(tmp_path) == {"out/ours": "1", "out/photo.jpg": "precious"}
    begun = []
    with pytest.raises(OutputError, match=r"photo\.jpg"), whole_folder(tmp_path / "out", check):
        begun.append(True)
    assert not begun


@pytest.mark.parametrize("name", ["sub/ours", "ours/file", "file"])
def test_a_folder_with_anything_else_is_not_ours(tmp_path, name):
    """Another file, a folder of our file's name, and a file in the folder's place."""
    place = tmp_path / "out" / name if name != "file" else tmp_path / "out"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("precious")
    with pytest.raises(OutputError, match="tqdit removes only what it wrote"):
        check_only(tmp_path / "out", {"ours"}.__contains__, "a test")


def test_a_folder_takes_the_place_of_a_file_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "out").write_text("old")
    write_folder(tmp_path / "out", new="2")
    assert content(tmp_path) == {"out/new": "2"}


def test_links_stay_and_their_targets_are_replaced(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    write_folder(tmp_path / "real", old="1")
    (tmp_path / "link.txt").symlink_to("real.txt")
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link.txt")
    write_folder(tmp_path / "link", new="2")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "link.txt", "real", "real.txt"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    assert content(tmp_path / "real") == {"new": "2"}


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from tqdit import files
    kind, path = sys.argv[1], Path(sys.argv[2])
    with getattr(files, kind)(path, *([str] if kind == "whole_folder" else [])) as temporary:
        target = temporary if kind == "whole_file" else temporary / "half"
        target.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["whole_file", "whole_folder", "temporary_folder"])
def test_kill_in_the_middle_keeps_the_old_content_and_the_next_run_cleans_up(tmp_path, kind):
    path = tmp_path / "out"
    if kind == "whole_file":
        path.write_text("old")
    else:
        write_folder(path, old="1")
    before = content(tmp_path)
    process = python(KILLED, kind, path)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    after = content(tmp_path)
    assert before.items() < after.items()  # the old content, and what the dead run left
    assert "half" in after.values()
    if kind == "whole_file":
        write_file(path)
        assert content(tmp_path) == {"out": "new"}
    else:
        write_folder(path, new="2")
        assert content(tmp_path) == {"out/new": "2"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_what_a_living_run_is_writing_is_left_alone(tmp_path):
    other = python("import sys; sys.stdin.read()")
    try:
        theirs = tmp_path / f".out.{other.pid}.partial"
        theirs.write_text("half")
        write_file(tmp_path / "out")
        assert theirs.exists()
    finally:
        other.kill()
        other.communicate()
    write_file(tmp_path / "out")
    assert content(tmp_path) == {"out": "new"}


def test_files_of_others_that_look_similar_are_left_alone(tmp_path):
    names = {".out.txt.partial", ".out.mine.partial", ".outer.1.partial", "out.1.partial", ".out.partial"}
    for name in names:
        (tmp_path / name).write_text("keep")
    write_file(tmp_path / "out")
    assert set(content(tmp_path)) == names | {"out"}


FULL = """
    import resource, sys
    from pathlib import Path
    from tqdit.errors import OutputError
    from tqdit import files
    kind, path = sys.argv[1], Path(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
    try:
        with getattr(files, kind)(path, *([str] if kind == "whole_folder" else [])) as temporary:
            target = temporary if kind == "whole_file" else temporary / "large"
            target.write_bytes(bytes(50000))
    except OutputError as error:
        print(error)
"""


@pytest.mark.parametrize("kind", ["whole_file", "whole_folder"])
def test_a_file_size_limit_is_one_line_and_keeps_the_old_content(tmp_path, kind):
    path = tmp_path / "out"
    if kind == "whole_file":
        path.write_text("old")
    else:
        write_folder(path, old="1")
    before = content(tmp_path)
    output, errors = python(FULL, kind, path).communicate(timeout=60)
    assert (output, errors) == (
        f"{path}: cannot be written (File too large). Raise the file size limit or choose another place.\n", ""
    )  # fmt: skip
    assert content(tmp_path) == before


def test_a_full_disk_is_one_line(tmp_path):
    def write(path):
        with whole_file(path):
            Path("/dev/full").write_text("x")

    assert "No space left on device" in refusal(write, tmp_path / "out")
    assert content(tmp_path) == {}


@pytest.mark.parametrize("write", [write_file, write_folder, check_writable])
@pytest.mark.parametrize("below", ["file/out", "file/deeper/out"])
def test_a_place_below_a_file_is_refused(tmp_path, write, below):
    (tmp_path / "file").write_text("old")
    reason = refusal(write, tmp_path / below)
    assert reason in (f"('{tmp_path / 'file'}' is not a folder). Choose another place.",
                      "(Not a directory). Choose another place.")  # fmt: skip
    assert content(tmp_path) == {"file": "old"}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that refuses even root")
@pytest.mark.parametrize("write", [write_file, write_folder, check_writable])
def test_a_place_where_nobody_may_write_is_refused(write):
    assert refusal(write, Path("/proc/self/tqdit/out")).endswith("). Choose another place.")


@pytest.mark.parametrize("write", [write_file, write_folder])
def test_a_name_that_is_too_long_is_refused(tmp_path, write):
    assert refusal(write, tmp_path / ("x" * 250)) == "(File name too long). Choose a shorter name."
    assert content(tmp_path) == {}


@pytest.mark.parametrize("write", [write_file, check_writable])
def test_a_pipe_or_a_device_is_not_replaced(tmp_path, write):
    os.mkfifo(tmp_path / "pipe")
    assert "something other than a file" in refusal(write, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    write_folder(tmp_path / "out", old="1")
    assert "something other than a file" in refusal(write_file, tmp_path / "out")
    assert content(tmp_path) == {"out/old": "1"}


@pytest.mark.parametrize(("number", "advice"), [
    (13, "write to"), (30, "read-only"), (28, "space"), (5, "another place"),
])  # fmt: skip
def test_the_advice_fits_the_reason(tmp_path, number, advice):
    def fail(path):
        with whole_file(path):
            raise OSError(number, os.strerror(number))

    reason, _, told = refusal(fail, tmp_path / "out").partition(").")
    assert reason == f"({os.strerror(number)}"
    assert advice in told


def test_a_read_only_place_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere else
    assert "Permission denied" in refusal(check_writable, tmp_path / "out")


def test_checking_writes_nothing(tmp_path):
    check_writable(tmp_path / "deep" / "out")
    assert content(tmp_path) == {}


def test_a_temporary_folder_is_gone_afterwards(tmp_path):
    with temporary_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert list(tmp_path.iterdir()) == []


def test_sha256_is_that_of_the_standard(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


HOLD = """
    import sys, time
    from pathlib import Path
    from tqdit.files import lock_folder
    with lock_folder(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


def test_a_second_writer_of_a_folder_is_refused_at_once_until_the_first_is_killed(tmp_path):
    owner = python(HOLD, tmp_path)
    try:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(OutputError) as error, lock_folder(tmp_path):
            pass
        assert str(error.value).startswith(f"{tmp_path}: another process is writing it")
        assert "\n" not in str(error.value)
    finally:
        owner.kill()
        owner.communicate()
    with lock_folder(tmp_path):
        assert [file.name for file in tmp_path.iterdir()] == [LOCK]
    assert content(tmp_path) == {}


def test_a_folder_can_be_locked_again_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="why"), lock_folder(tmp_path):
        raise ValueError("why")
    with lock_folder(tmp_path), pytest.raises(OutputError), lock_folder(tmp_path):
        pass


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OutputError, match="file: cannot be written"), lock_folder(tmp_path / "file"):
        pass


def test_arrays_are_read_and_anything_else_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.arange(3), y=np.zeros((2, 0), np.float32))
    arrays = read_npz(path)
    assert arrays["x"].tolist() == [0, 1, 2]
    assert (arrays["y"].shape, arrays["y"].dtype) == ((2, 0), np.float32)
    whole = path.read_bytes()
    np.save(tmp_path / "one.npy", np.arange(3))
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], object))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("x.txt", "text")
    for name, data in {"cut.npz": whole[:-40], "flipped.npz": whole.replace(b"\1\0\0\0\0", b"\3\0\0\0\0"),
                       "text.npz": b"text", "empty.npz": b""}.items():  # fmt: skip
        assert data != whole
        (tmp_path / name).write_bytes(data)
    refused = ["cut.npz", "flipped.npz", "text.npz", "empty.npz", "one.npy", "pickled.npz", "other.npz", "missing.npz"]
    for name in refused:
        with pytest.raises(FileFormatError) as error:
            read_npz(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert str(error.value).endswith(". Write it again.")


def claim(path, shape, held=b"", compression=zipfile.ZIP_STORED):
    """An .npz whose header claims a shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.npy", header.getvalue() + held)


@pytest.mark.parametrize("shape", [(True, 16), (-8, 16), (2, -3, -4)])
def test_a_shape_that_is_none_is_refused(tmp_path, shape):
    claim(tmp_path / "a.npz", shape, bytes(64))
    with pytest.raises(FileFormatError, match=r"a\.npz"):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_header_that_claims_more_than_the_file_holds_is_refused_before_memory_is_taken(tmp_path, compression):
    claim(tmp_path / "a.npz", (8 * 10**9, 16, 16, 3), bytes(3000), compression)
    tracemalloc.start()
    with pytest.raises(FileFormatError, match=r"'x', uint8 \(8000000000, .* claims 6144000000000 bytes, .* 3000"):
        read_npz(tmp_path / "a.npz")
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_a_zip_entry_that_claims_more_than_its_bytes_can_unpack_to_is_refused(tmp_path):
    claim(tmp_path / "a.npz", (1000,), bytes(1000), zipfile.ZIP_DEFLATED)
    content = (tmp_path / "a.npz").read_bytes()
    at = content.index(b"PK\x01\x02") + 24  # the unpacked size, in the directory
    (tmp_path / "a.npz").write_bytes(content[:at] + (2**31).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(FileFormatError, match="'x' claims 2147483648 bytes"):
        read_npz(tmp_path / "a.npz")


def test_arrays_that_are_larger_than_the_memory_are_no_damage(tmp_path, monkeypatch):
    monkeypatch.setattr("tqdit.bounds.memory_left", lambda: 10**6)
    np.savez(tmp_path / "a.npz", x=np.zeros(2 * 10**6, np.uint8))
    with pytest.raises(UsageError, match=r"a\.npz: 0\.0 GB of memory are needed"):
        read_npz(tmp_path / "a.npz")
