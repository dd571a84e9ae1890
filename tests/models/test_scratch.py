"""No folder for temporary files: one line, whether a model is loaded or a network traced."""

import errno
import getpass
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import support
from tqdit.errors import OutputError
from tqdit.exporter.graph import ExportConfig, trace_graph
from tqdit.models.load import load_model

NOWHERE = (
    "PyTorch finds no place for its temporary files (No usable temporary directory found in ['/tmp', '/here']). "
    "Free some space, or set TMPDIR to a folder that you may write to."
)


@pytest.mark.parametrize(
    "work", [lambda: load_model("demo"), lambda: trace_graph(support.tiny_model(), ExportConfig())]
)
def test_no_folder_for_temporary_files_is_one_line(monkeypatch, work):
    def fail():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/here']")

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # which PyTorch sets when it has found a place
    monkeypatch.setattr(tempfile, "gettempdir", fail)
    with pytest.raises(OutputError) as error:
        work()
    assert str(error.value) == NOWHERE


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", support.few([["export", "m.onnx", "--float"], ["inspect", "demo"]], ["inspect", "demo"])
)
def test_a_spoilt_folder_of_pytorchs_is_named(tmp_path, command):
    """In a process of its own: PyTorch looks once."""
    place = tmp_path / f"torchinductor_{getpass.getuser()}"
    place.write_text("no folder")
    done = subprocess.run(
        [sys.executable, "-m", "tqdit.cli", *command], cwd=tmp_path, env=environment(tmp_path), text=True,
        capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        f"{place}: PyTorch finds no place for its temporary files (File exists). Free some space, or set TMPDIR to a "
        "folder that you may write to."
    )
    assert "Traceback" not in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == [place.name]


def environment(folder: Path) -> dict[str, str]:
    dropped = ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR")
    return {name: value for name, value in os.environ.items() if name not in dropped} | {"TMPDIR": str(folder)}
