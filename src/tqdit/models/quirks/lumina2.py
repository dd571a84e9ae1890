"""Lumina 2 keeps its rotary tables in complex128, which ONNX's exporter cannot convert to float32."""

from __future__ import annotations

from typing import Any

CLASSES = ("Lumina2Transformer2DModel",)


def prepare(network: Any) -> None:
    network.rope_embedder.freqs_cis = [table.cfloat() for table in network.rope_embedder.freqs_cis]
