"""The demo models' weights, of the distribution `tqdit-demo` (folder `demo-weights`), each known by its SHA-256."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from tqdit.errors import CheckpointError, MissingLibraryError
from tqdit.files import sha256

TEXT = "text"  # the pipeline of the text demo: what a user writes, and its folder

# As `scripts/train_demo.py package` and `scripts/train_text_demo.py package` say them.
DIGESTS = {
    "model.safetensors": "9db237a5476412b5386557b9bca9a0fd5b46a61ffa79ce9bf26270e048a5399a",
    "judge.safetensors": "9f5ed1b5550e7d1c35ee1337a9c51cabde1d106cfe269a823895acb55a955f19",
}


def shipped_pipeline() -> Path:
    """The directory of the text demo's pipeline, whole and unaltered."""
    files = {name: shipped(name) for name in DIGESTS if name.startswith(f"{TEXT}/")}
    return files[f"{TEXT}/model_index.json"].parent


def shipped(name: str) -> Path:
    """The file of that name, whole and unaltered. Raises MissingLibraryError if `tqdit-demo` is not installed."""
    try:
        path = Path(str(resources.files("tqdit_demo"))) / name
    except ModuleNotFoundError as error:
        raise MissingLibraryError(
            "the demo model's weights are in tqdit-demo, which is not installed. Run: pip install ./demo-weights (in a "
            "clone of tqdit, or the path of a wheel of tqdit-demo)"
        ) from error
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; it comes with tqdit-demo. Install tqdit-demo again.")
    if sha256(path) != DIGESTS[name]:
        raise CheckpointError(f"{path}: its SHA-256 is not that of this tqdit's demo model. Install tqdit-demo again.")
    return path
