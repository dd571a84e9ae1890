"""The card of an exported graph: all that an engine needs to know beyond the graph itself.

It travels inside the ONNX file as one JSON text under the metadata key `tqdit` (docs/onnx-file.md) and from there into
the manifest of every engine, so the engine side reads no other file.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Unpack, get_args

import msgspec

from tqdit.errors import UsageError
from tqdit.files import decode_record
from tqdit.ports import Signature
from tqdit.sampling.correction import Correction
from tqdit.sampling.forecasts import RESIDUAL
from tqdit.sampling.guidance import Guidance, rows_per_image
from tqdit.sampling.schedule import ChainArguments, SamplingSpec
from tqdit.text import TextCard

FORMAT_VERSION = 3
METADATA_KEY = "tqdit"

GraphName = Literal["denoiser", "step", "forecast"]  # the last one is part of an engine, made of a denoiser
GRAPHS: tuple[GraphName, ...] = ("denoiser", "step")


@dataclass(frozen=True)
class Layout:
    """From a row of states to the codes of a VAE: reshaped to `split`, its axes in `order`, reshaped to `codes`."""

    axis: int  # of the row: its channels
    split: tuple[int, ...]
    order: tuple[int, ...]
    codes: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != [*range(len(self.split))] or math.prod(self.split) != math.prod(self.codes):
            raise ValueError(f"a layout {self.split} in the order {self.order} is not {self.codes}")


@dataclass(frozen=True)
class Latents:
    """How a model's states relate to the codes of its VAE: state = scale (code - shift)."""

    scale: float | tuple[float, ...]  # or one for each channel
    shift: float | tuple[float, ...] = 0.0
    layout: Layout | None = None  # None: codes lie as states do, channels first
    decoder: str = "AutoencoderKL"  # diffusers' class of the VAE

    def __post_init__(self) -> None:
        for value in (self.scale, self.shift):
            values = value if isinstance(value, tuple) else (value,)
            if not all(map(math.isfinite, values)) or (value is self.scale and not all(values)):
                raise ValueError(
                    f"latents of scale {self.scale} and shift {self.shift}; expected finite numbers, scale not 0"
                )

    def __str__(self) -> str:
        scale, shift = (
            f"{value:g}" if isinstance(value, float | int) else f"{min(value):g} to {max(value):g}"
            for value in (self.scale, self.shift)
        )
        return f"scale {scale}" + (f", shift {shift}" if self.shift else "")


@dataclass(frozen=True)
class VaeCard:
    """The decoder beside a latent model: latents (states) -> image float[B,3,H,W] or [B,3,F,H,W] in -1..1."""

    file: str  # name beside the ONNX file
    sha256: str
    image_height: int
    image_width: int
    frames: int | None = None  # of a video
    rows: int | None = None  # of each call, if the graph takes no other number


SHIPPED = ("demo", "text")  # models that a user may name in place of a path
AttentionForm = Literal["simulated", "fused", "integer", "float"]
ATTENTION_FORMS: tuple[AttentionForm, ...] = get_args(AttentionForm)
DEFAULT_ATTENTION: AttentionForm = "integer"  # on CPUs at least as fast as the others that round (docs/engines.md)
ProductForm = Literal["integer", "simulated", "weight-only", "float"]


@dataclass(frozen=True)
class QuantizationCard:
    """What was quantized: enough for a builder to prove that it stayed so."""

    weight_bits: int  # the fewest of any weight; codes are stored as int8 at any width
    activation_bits: int  # the fewest of any activation
    boundaries: tuple[float, ...]  # of the groups of timesteps
    attention: AttentionForm
    products: dict[str, ProductForm]  # module -> how its product was exported
    sampling: SamplingSpec  # the chain that the scales were found for

    @property
    def quantized(self) -> frozenset[str]:
        """The modules of the products that do not stay float."""
        return frozenset(module for module, form in self.products.items() if form != "float")

    @property
    def summary(self) -> str:
        """W8A8: products 26 integer, 12 simulated, 8 weight-only, 1 float; 10 groups of timesteps."""
        counts = Counter(self.products.values())
        forms = ", ".join(f"{counts[form]} {form}" for form in get_args(ProductForm) if counts[form])
        return (
            f"W{self.weight_bits}A{self.activation_bits}: products {forms}; "
            f"{len(self.boundaries) + 1} group(s) of timesteps"
        )


@dataclass(frozen=True)
class GraphCard:
    """The network's ports, and how it is sampled unless a user chooses otherwise."""

    graph: GraphName
    signature: Signature  # of the network; a step graph takes the state and the requests of it
    sampling: SamplingSpec  # the chain that the file proposes; placed steps were found for this very network
    guidance: Guidance | None
    latents: Latents | None  # None: the state is an image in -1..1
    class_names: tuple[str, ...]
    model: str  # what was exported, as the user named it
    origin: str
    fingerprint: str
    written_by: str  # tqdit's version
    vae: VaeCard | None = None
    text: TextCard | None = None  # encoders of prompts
    quantization: QuantizationCard | None = None  # None: a float graph
    constants: dict[str, str] = field(default_factory=dict)  # arguments that are part of the graph -> digest
    alike: tuple[str, ...] = ()  # those of them that have rows, all the same: the digest is of one row
    config: dict[str, Any] = field(default_factory=dict)  # settings of the network, as diffusers' pipelines read them
    rows: int | None = None  # of every call of the graph; None: any number
    published: SamplingSpec | None = None  # the chain of the model's origin; None: the one that the file proposes
    correction: Correction | None = None  # of the quantized network's errors, which a chain takes back
    residual: tuple[int, ...] | None = None  # shape of a row of what the blocks add; None: the graph does not return it

    @property
    def rows_per_image(self) -> int:
        """Rows of one call of the graph; a guided step graph doubles its rows inside."""
        return 1 if self.graph == "step" else rows_per_image(self.guidance)

    @property
    def as_published(self) -> SamplingSpec:
        """The chain that the model's origin samples with."""
        return self.published or self.sampling

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of one row."""
        return self.signature.state.row_shape

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """The graph's inputs by name, in their order, with the shape of one row."""
        if self.graph != "step":
            residual = {RESIDUAL: self.residual} if self.graph == "forecast" and self.residual is not None else {}
            return {port.name: port.row_shape for port in self.signature.ports} | residual
        requests = {port.name: port.row_shape for port in self.signature.requests}
        scale: dict[str, tuple[int, ...]] = {} if self.guidance is None else {"guidance_scale": ()}
        return {"x": self.state_shape, "step": ()} | requests | scale | {"noise": self.state_shape}

    def choose(self, any_rows: bool, **chain: Unpack[ChainArguments]) -> SamplingSpec:
        """`SamplingSpec.choose`. any_rows: whether the engine was built for any number of rows.

        Raises UsageError for a guidance interval or forecasts that the engine cannot do.
        """
        chosen = self.sampling.choose(**chain)
        if chosen.full_calls and self.residual is None:
            raise UsageError(
                f"this engine computes every call in full; {chosen.calls} full calls of {chosen.steps} steps need "
                "forecasts. Leave them out, or take an engine that was exported with forecasts."
            )
        if chosen.guidance_interval is not None:
            if self.guidance is None:
                raise UsageError("this model is sampled without guidance, which has no interval. Leave it out.")
            if self.rows is not None or not any_rows:
                raise UsageError(
                    "this engine was built for certain numbers of rows, and outside a guidance interval an image has "
                    "one row in place of two. Leave the interval out, or use an engine for any number of rows."
                )
        return chosen

    def remark(self, chosen: SamplingSpec) -> str | None:
        """One line if the scales were found for another chain than the chosen one; None otherwise.

        Also None for the placed steps of this card, which were found with these scales. Forecasts and a guidance
        interval make no other chain: scales cannot be found for them.
        """
        if self.quantization is None:
            return None
        found_for = self.quantization.sampling
        chosen, own = (replace(each, full_calls=(), guidance_interval=None) for each in (chosen, self.sampling))
        if chosen == found_for or (chosen.timesteps and chosen == own):
            return None
        process = "" if chosen.process == found_for.process else " in another process"
        return (
            f"the scales were found for {found_for}; sampling {chosen}{process}. Calibrate for it if quality matters."
        )

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = msgspec.to_builtins(self)
        return {"format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> GraphCard:
        """Raises FileFormatError naming `where` if the text is not a card of this version."""
        return decode_record(text, cls, FORMAT_VERSION, f"{where}: '{METADATA_KEY}' metadata", "Export again.")
