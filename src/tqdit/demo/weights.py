"""The weights that ship with the package, each known by its SHA-256."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from tqdit.errors import CheckpointError
from tqdit.files import sha256

FOLDER = Path(str(resources.files("tqdit.demo")))
# As `scripts/train_demo.py package` says them.
DIGESTS = {
    "model.safetensors": "9db237a5476412b5386557b9bca9a0fd5b46a61ffa79ce9bf26270e048a5399a",
    "judge.safetensors": "9f5ed1b5550e7d1c35ee1337a9c51cabde1d106cfe269a823895acb55a955f19",
}


def shipped(name: str) -> Path:
    """The file of that name, whole and unaltered."""
    path = FOLDER / name
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; it comes with tqdit. Install tqdit again.")
    if sha256(path) != DIGESTS[name]:
        raise CheckpointError(f"{path}: altered since tqdit shipped it (its SHA-256 differs). Install tqdit again.")
    return path
