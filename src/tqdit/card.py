"""The card of an exported graph: all that an engine needs to know beyond the graph itself.

It travels inside the ONNX file as one JSON text under the metadata key `tqdit` (docs/onnx-file.md) and from there into
the manifest of every engine, so the engine side reads no other file.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from tqdit.diffusion import SamplingSpec
from tqdit.errors import FileFormatError, UsageError

FORMAT_VERSION = 1
METADATA_KEY = "tqdit"
LARGEST = 2**20  # of any size

GraphName = Literal["step", "denoiser"]
GRAPHS: tuple[GraphName, ...] = ("step", "denoiser")


@dataclass(frozen=True)
class VaeCard:
    """The decoder beside a latent model: latents float[B,C,h,w] -> image float[B,3,H,W] in -1..1."""

    file: str  # name beside the ONNX file
    sha256: str
    image_height: int
    image_width: int


AttentionForm = Literal["simulated", "fused", "integer", "float"]
ATTENTION_FORMS: tuple[AttentionForm, ...] = ("simulated", "fused", "integer", "float")
ProductForm = Literal["integer", "simulated", "weight-only"]


@dataclass(frozen=True)
class QuantizationCard:
    """What was quantized: enough for a builder to prove that it stayed so."""

    weight_bits: int  # the fewest of any weight; codes are stored as int8 at any width
    activation_bits: int  # the fewest of any activation
    boundaries: tuple[int, ...]  # of the groups of timesteps
    attention: AttentionForm
    products: dict[str, ProductForm]  # module -> how its product was exported

    @property
    def summary(self) -> str:
        """W8A8: 26 products integer, 12 simulated, 8 weight-only; 10 groups of timesteps."""
        counts = Counter(self.products.values())
        forms = ", ".join(f"{counts[form]} {form}" for form in get_args(ProductForm) if counts[form])
        return (
            f"W{self.weight_bits}A{self.activation_bits}: products {forms}; "
            f"{len(self.boundaries) + 1} group(s) of timesteps"
        )


@dataclass(frozen=True)
class GraphCard:
    """Shapes, schedule and conventions of one exported graph."""

    graph: GraphName
    channels: int
    out_channels: int
    height: int
    width: int
    num_classes: int
    guided: bool  # the graph takes guidance_scale and runs two rows per image
    guidance_scale: float  # default of the sampler
    sampling: SamplingSpec
    latent_scale: float | None  # None: x is an image in -1..1
    class_names: tuple[str, ...]
    model: str  # what was exported, as the user named it
    origin: str
    fingerprint: str
    written_by: str  # tqdit's version
    vae: VaeCard | None = None
    quantization: QuantizationCard | None = None  # None: a float graph

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, text: str, where: str) -> GraphCard:
        """Raises FileFormatError naming `where` if the text is not a card of this version."""
        try:
            values = json.loads(text)
            version = values.pop("format_version")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise FileFormatError(
                f"{where}: its '{METADATA_KEY}' metadata is damaged ({error}). Export again."
            ) from error
        if version != FORMAT_VERSION:
            raise FileFormatError(
                f"{where}: written in format {version}, this tqdit reads format {FORMAT_VERSION}. "
                "Export again, or install the tqdit that wrote it."
            )
        try:
            values["sampling"] = SamplingSpec.from_json(values["sampling"])
            values["class_names"] = tuple(values["class_names"])
            values["vae"] = VaeCard(**values["vae"]) if values["vae"] else None
            values["quantization"] = _quantization(values.get("quantization"))
            card = cls(**values)
            card.check()
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, UsageError) as error:
            raise FileFormatError(
                f"{where}: its '{METADATA_KEY}' metadata is damaged ({error}). Export again."
            ) from error
        return card

    def check(self) -> None:
        """Raise ValueError or UsageError for values that nothing could be done with."""
        sizes = (self.channels, self.out_channels, self.height, self.width, self.num_classes)
        if not all(type(size) is int and 0 < size <= LARGEST for size in sizes) or self.graph not in GRAPHS:
            raise ValueError(f"graph '{self.graph}' with sizes {sizes}")
        texts = [self.model, self.origin, self.fingerprint, self.written_by, *self.class_names]
        numbers: list[object] = [self.guidance_scale, *([] if self.latent_scale is None else [self.latent_scale])]
        whole: list[object] = [self.sampling.steps, self.sampling.steps_offset]
        if self.vae is not None:
            texts += [self.vae.file, self.vae.sha256]
            whole += [self.vae.image_height, self.vae.image_width]
        if self.quantization is not None:
            facts = self.quantization
            texts += [*facts.products, *facts.products.values()]
            whole += [facts.weight_bits, facts.activation_bits, *facts.boundaries]
            if facts.attention not in ATTENTION_FORMS or not set(facts.products.values()) <= set(get_args(ProductForm)):
                raise ValueError(f"attention '{facts.attention}' with products {sorted(set(facts.products.values()))}")
        if type(self.guided) is not bool or not all(type(text) is str for text in texts):
            raise ValueError("a value of another type")
        if not all(type(number) is int and abs(number) <= LARGEST for number in whole):
            raise ValueError(f"one of {whole} is not a whole number")
        if not all(type(number) in (int, float) and math.isfinite(cast(float, number)) for number in numbers):
            raise ValueError(f"one of {numbers} is not a finite number")
        _ = self.sampling.schedule  # which knows what fits together


def _quantization(values: dict[str, Any] | None) -> QuantizationCard | None:
    return None if values is None else QuantizationCard(**{**values, "boundaries": tuple(values["boundaries"])})
