"""The pip command of a missing library works without a package index that has tqdit."""

import importlib
import sys
from importlib import metadata

import pytest

from tqdit.errors import MissingLibraryError
from tqdit.extras import install, need


def test_the_command_names_the_libraries_of_the_extra(monkeypatch):
    lines = [
        "numpy>=1.26", 'one>=1.2; extra == "first"', 'two; extra == "first-and-more"',
        'tqdit[second,third]; extra == "first"', 'three>=3; extra == "third"',
        'three>=3; (platform_machine == "x86_64" or platform_machine == "AMD64") and extra == "second"',
    ]  # fmt: skip
    monkeypatch.setattr(metadata, "requires", lambda _: lines)
    assert install("first") == "pip install 'one>=1.2' 'three>=3'"
    assert install("first-and-more") == "pip install two"


def test_every_extra_has_a_command_that_does_not_name_tqdit():
    for extra in metadata.metadata("tqdit").get_all("Provides-Extra"):
        libraries = install(extra).removeprefix("pip install ").split()
        assert libraries
        assert not any("tqdit" in library for library in libraries)


def test_in_a_clone_without_an_installation_the_command_installs_the_clone(monkeypatch):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingLibraryError, match=r"this needs onnxruntime, .* pip install '\.\[onnxruntime\]'$"):
        need("onnxruntime", "onnxruntime", "this")


def test_a_library_that_itself_lacks_one_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_there.py").write_text("import not_there")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="not_there"):
        need("half_there", "build", "this")


def test_metadata_older_than_the_extra_names_the_clone(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda _: ['onnx>=1; extra == "build"'])
    assert install("video") == "pip install '.[video]'"
