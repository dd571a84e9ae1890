"""Lumina 2 keeps its rotary tables in complex128, which torch's ONNX exporter cannot convert."""

from __future__ import annotations

from typing import Any

CLASSES = ("Lumina2Transformer2DModel",)


def prepare(network: Any, state: tuple[int, ...]) -> None:
    network.rope_embedder.freqs_cis = [table.cfloat() for table in network.rope_embedder.freqs_cis]
