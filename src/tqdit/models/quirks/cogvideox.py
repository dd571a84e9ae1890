"""CogVideoX makes its position table in every call whose size is not that of its configuration, in a way that no trace
can follow: make it once, for the recorded size."""

from __future__ import annotations

from typing import Any

CLASSES = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")


def prepare(network: Any, state: tuple[int, ...]) -> None:
    embed = network.patch_embed
    frames, _, embed.sample_height, embed.sample_width = state
    embed.sample_frames = (frames - 1) * embed.temporal_compression_ratio + 1
    if embed.use_positional_embeddings and not embed.use_learned_positional_embeddings:
        table = embed._get_positional_embeddings(embed.sample_height, embed.sample_width, embed.sample_frames)
        embed.register_buffer("pos_embedding", table, persistent=False)
