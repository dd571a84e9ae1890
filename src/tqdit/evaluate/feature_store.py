"""Features of shards on disk: one file per shard, in a folder beside that of the shards.

`samples/` has its features in `samples.features/inception-0123456789ab/shard-00000.npz`, and so on; inside `samples/`
they would be foreign to tqdit-sample. A file names the SHA-256 of its shard and what extracted it. Where one of these
is another now, or the file is damaged, it counts as missing. Any number of processes may write the same file: each puts
a whole one in its place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tqdit.console import Console
from tqdit.engines.run.images import write_npz
from tqdit.engines.run.shards import ShardFolder, shard_name
from tqdit.errors import FileFormatError, InputError, OutputError
from tqdit.evaluate.extractors import Extractor, Features, identity
from tqdit.files import check_writable, read_npz

VERSION = 1  # of the files, and of what extractors.py computes: raised if either changes


class FeatureStore:
    """What one extractor sees in the shards of one folder."""

    def __init__(self, folder: ShardFolder, extractor: Extractor, console: Console) -> None:
        shards = Path(os.path.abspath(folder.path))  # noqa: PTH100 (a link stays one: the place beside it is the user's)
        self.path = shards.parent / f"{shards.name}.features" / f"{extractor.name}-{extractor.digest}"
        self._folder, self._extractor, self._console = folder, extractor, console
        self._refused = False

    def has(self, shard: int) -> bool:
        """Whether there is a file, be it as it may."""
        return self._file(shard).is_file()

    def load(self, shard: int) -> Features | None:
        """Features of a whole shard, or None if they are to be extracted."""
        try:
            content = read_npz(self._file(shard))
        except (FileFormatError, InputError):  # missing or damaged
            return None
        if any(str(content.pop(name, None)) != fact for name, fact in self._facts(shard).items()):
            return None
        if not self._fits(content, len(self._folder.job.images(shard))):
            return None
        return Features(content["pooled"], content.get("spatial"), content["probabilities"])

    def _fits(self, content: dict[str, NDArray[Any]], count: int) -> bool:
        """Whether these are the arrays of `count` images, and no others."""
        return (
            content.keys() | {"spatial"} == {"pooled", "spatial", "probabilities"}
            and all(x.dtype == np.float32 and x.ndim == 2 and len(x) == count for x in content.values())
            and content["pooled"].shape[1] == self._extractor.size
        )

    def check(self) -> None:
        """Report before the work, not after it, that nothing can be kept."""
        try:
            check_writable(self._file(0))
        except OutputError as error:
            self._say(error)

    def save(self, shard: int, features: Features) -> None:
        """Keep the features of a whole shard. If that is not possible, the evaluation continues without it."""
        arrays = {"pooled": features.pooled, "probabilities": features.probabilities}
        if features.spatial is not None:
            arrays["spatial"] = features.spatial
        facts = {name: np.array(fact) for name, fact in self._facts(shard).items()}
        try:
            write_npz(self._file(shard), **arrays, **facts)
        except OutputError as error:
            self._say(error)

    def _say(self, error: OutputError) -> None:
        if not self._refused:
            reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
            self._console.say(
                f"{self.path}: cannot be written ({reason}), so features are not kept, and an evaluation that is "
                f"stopped begins anew. To keep them, pass a link to {self._folder.path} in a writable folder."
            )
        self._refused = True

    def _file(self, shard: int) -> Path:
        return self.path / shard_name(shard)

    def _facts(self, shard: int) -> dict[str, str]:
        """What the features depend on. Another torch rounds otherwise, and an evaluation names the one it used."""
        return {
            "version": str(VERSION), "shard": str(self._folder.digest(shard)), "extractor": identity(self._extractor),
            "torch": torch.__version__,
        }  # fmt: skip
