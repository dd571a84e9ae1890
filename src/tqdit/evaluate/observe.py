"""What an extractor sees in a set of images. Found once, and everything that is measured is measured of it.

Images in memory are extracted at once. Those of a folder of shards are read a shard at a time, and the features of each
shard are kept on disk, so that an evaluation that was stopped continues after the finished ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tqdit.console import Console
from tqdit.evaluate.extractors import Extractor, Features, identity
from tqdit.evaluate.feature_store import FeatureStore
from tqdit.evaluate.samples import AnyImages, Images, ShardImages


@dataclass(frozen=True)
class Outline:
    """What is known of a set of images before they are made."""

    source: str
    count: int
    has_labels: bool  # whether their classes are known


@dataclass(frozen=True, eq=False)
class Observed:
    """Features of N images, their classes (N,) if they are known, and the source of both."""

    features: Features
    labels: NDArray[np.int64] | None
    source: str
    extractor: str  # "name digest"

    def __len__(self) -> int:
        return len(self.features.pooled)

    @property
    def outline(self) -> Outline:
        return Outline(self.source, len(self), self.labels is not None)


def observe(extractor: Extractor, images: AnyImages, console: Console) -> Observed:
    """Run the extractor over all of them, or over what no earlier run has kept."""
    features = extractor(images.pixels) if isinstance(images, Images) else _of_shards(extractor, images, console)
    return Observed(features, images.labels, images.source, identity(extractor))


def _of_shards(extractor: Extractor, images: ShardImages, console: Console) -> Features:
    """Features of all shards. In memory are these, and the pixels of one shard."""
    store = FeatureStore(images.folder, extractor, console)
    parts = _kept(store, images, console)
    left = [shard for shard in images.shards if shard not in parts]
    if any(images.is_whole(shard) for shard in left):
        store.check()
    try:
        with console.bar(len(left), f"features of {images.source}", "shards") as bar:
            for shard in left:
                parts[shard] = extractor(images.pixels(shard))
                if images.is_whole(shard):  # a part of one is at most one shard's work
                    store.save(shard, parts[shard])
                bar.update()
    except KeyboardInterrupt:
        kept = sum(map(store.has, parts))
        raise KeyboardInterrupt(f"features of {kept} of {len(images.shards)} shards are kept in {store.path}") from None
    return Features.join([parts[shard] for shard in images.shards])


def _kept(store: FeatureStore, images: ShardImages, console: Console) -> dict[int, Features]:
    """What earlier runs have left. Pixels are checked by their SHA-256 as they would be if they were read."""
    whole = [shard for shard in images.shards if images.is_whole(shard)]
    found: dict[int, Features] = {}
    if not any(map(store.has, whole)):
        return found
    with console.bar(len(whole), "kept features", "shards") as bar:
        for shard in whole:
            features = store.load(shard)
            if features is not None:
                images.folder.check(shard)
                found[shard] = features
            bar.update()
    console.say(f"features of {len(found)} of {len(images.shards)} shards are kept from an earlier run in {store.path}")
    return found
