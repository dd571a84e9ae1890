"""The model card: what the tensors of a checkpoint do not tell (docs/guides/own-checkpoint.md)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from tqdit.card import Latents
from tqdit.errors import CheckpointError, UsageError
from tqdit.files import JSON, reading
from tqdit.models.state import check_place, read_text
from tqdit.models.vae import LATENT_SCALE
from tqdit.ports import Port, Signature
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.process import Diffusion, Flow
from tqdit.sampling.schedule import SamplingSpec, samplers_of

if TYPE_CHECKING:
    from tqdit.models.loaded import LoadedModel

NAME = "model.json"  # in the directory of a model
Card = TypeVar("Card", "ModelCard", "PipelineCard")


class Proposal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The chain that engines of a model propose in place of its own, because it was found to be enough."""

    sampler: str
    steps: int

    def chain(self, own: SamplingSpec) -> SamplingSpec:
        """Its steps count as placed ones (`GraphCard.remark`). Raises UsageError if the model has no such chain."""
        chosen = own.choose(self.steps, self.sampler)
        return chosen.choose(timesteps=chosen.schedule.timesteps.tolist())


class ModelCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Facts of a model. One that is left out is as the family of the model has it.

    num_classes tells whether the last row of the class table is the null class of guidance (one row more than classes)
    or a class like the others (as many rows); 0: the model is unconditional. process: fields of `Diffusion` or `Flow`.
    """

    GUIDE: ClassVar[str] = "own-checkpoint.md"

    space: Literal["latents", "pixels"] | None = None  # pixels: the state is an image in -1..1
    latent_scale: float | None = None  # state = scale (code - shift)
    latent_shift: float | None = None
    heads: Annotated[int, Meta(ge=1)] | None = None  # of attention
    num_classes: Annotated[int, Meta(ge=0)] | None = None
    class_names: tuple[str, ...] = ()
    guidance_scale: float | UnsetType | None = UNSET  # None: sampled without guidance
    guidance_channels: Annotated[int, Meta(ge=1)] | None = None  # how many leading ones are guided
    process: dict[str, Any] = {}
    sampler: str | None = None
    steps: int | None = None
    proposed: Proposal | None = None

    def __post_init__(self) -> None:
        if self.space == "pixels" and (self.latent_scale, self.latent_shift) != (None, None):
            raise UsageError("'latent_scale' and 'latent_shift' belong to latents, 'space' is 'pixels'")
        if self.class_names and self.classes != len(self.class_names):
            raise UsageError(f"'class_names' are {len(self.class_names)}, 'num_classes' is {self.num_classes}")

    @property
    def classes(self) -> int | None:
        """The number of classes, if it is told."""
        return (len(self.class_names) or None) if self.num_classes is None else self.num_classes

    @property
    def told(self) -> set[str]:
        """Of the facts that can be assumed (`LoadedModel.assumed`), those that are here."""
        facts = {"space": self.space, "num_classes": self.classes}
        return {name for name, value in facts.items() if value is not None}

    def apply(self, model: LoadedModel) -> LoadedModel:
        """The model with these facts. Raises CheckpointError if they do not fit it."""
        try:
            signature = _with_classes(model.signature, self.classes)
            sampling = self._sampling(model.sampling)
            if isinstance(sampling.process, Flow):  # whose times are no whole numbers
                signature = _with_port(signature, replace(signature.time, dtype="float32"))
            return replace(
                model,
                signature=signature,
                sampling=sampling,
                proposed=model.proposed if self.proposed is None else self.proposed.chain(sampling),
                guidance=self._guidance(model.guidance, signature),
                latents=self._latents(model.latents),
                told_latents=(self.latent_scale, self.latent_shift) != (None, None),
                class_names=self.class_names or model.class_names,
            )
        except (msgspec.MsgspecError, ValueError, TypeError) as error:
            reason = str(error).rstrip(".")
            raise CheckpointError(
                f"{model.source}: its model card does not fit: {reason}. Correct the card."
            ) from error

    def _latents(self, own: Latents | None) -> Latents | None:
        if self.space == "pixels" or (self.space is None and own is None):
            return None
        base = own or Latents(LATENT_SCALE)
        scale = base.scale if self.latent_scale is None else self.latent_scale
        return Latents(scale, base.shift if self.latent_shift is None else self.latent_shift)

    def _guidance(self, own: Guidance | None, signature: Signature) -> Guidance | None:
        if all(port.null is None for port in signature.requests) or self.guidance_scale is None:
            if isinstance(self.guidance_scale, float | int):
                raise UsageError("'guidance_scale' is a number, but the model has no null class to guide with")
            return None
        base = own or Guidance(1.5)
        channels = None if self.space == "pixels" else base.channels
        if self.guidance_channels is not None and self.guidance_channels > signature.channels:
            raise UsageError(f"'guidance_channels' is {self.guidance_channels}, the model has {signature.channels}")
        return Guidance(
            base.scale if self.guidance_scale is UNSET else self.guidance_scale,
            channels if self.guidance_channels is None else self.guidance_channels,
        )

    def _sampling(self, own: SamplingSpec) -> SamplingSpec:
        process = own.process
        if self.process:
            base = msgspec.to_builtins(process)
            base = base if self.process.get("type", base["type"]) == base["type"] else {}
            process = msgspec.convert(base | self.process, Diffusion | Flow)
        known = samplers_of(process)
        usual = "euler" if isinstance(process, Flow) else "ddim"
        sampler = self.sampler or (own.sampler if own.sampler in known else usual)
        return SamplingSpec(process, sampler, own.steps if self.steps is None else self.steps)


class PipelineCard(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tqdit-calibrate runs the pipeline of a directory (docs/guides/any-pipeline.md)."""

    GUIDE: ClassVar[str] = "any-pipeline.md"

    call: dict[str, str | int | float | bool | None] = {}  # arguments of each call, unless a flag says otherwise
    prompts: tuple[str, ...] = ()  # if --prompts names no others
    proposed: Proposal | None = None


def _with_classes(signature: Signature, classes: int | None) -> Signature:
    """With the last row of the class table as the null class, or as one of the classes."""
    label = signature.label
    if classes is None:
        return signature
    rows = 0 if label is None or label.values is None else label.values
    if label is None or classes not in (rows - 1, rows):
        expected = f"{rows - 1} (the last row is the null class) or {rows} (it is a class)" if label else "0"
        raise UsageError(f"it tells {classes} classes, the class table has {rows} rows, expected {expected}")
    return _with_port(signature, replace(label, null=rows - 1 if classes == rows - 1 else None))


def _with_port(signature: Signature, port: Port) -> Signature:
    return replace(signature, ports=tuple(port if port.name == one.name else one for one in signature.ports))


def card_path(source: Path) -> Path:
    """Where the card of a model lies: `model.json` in a directory, `dit.json` beside `dit.pt`.

    That of a sharded `dit.safetensors.index.json` is `dit.json`, too.
    """
    if source.is_dir():
        return source / NAME
    return source.with_name(f"{Path(source.name.removesuffix('.index.json')).stem}.json")


def read_pipeline_card(folder: Path) -> PipelineCard:
    """The card of a pipeline's directory; an empty one if there is none. Raises CheckpointError if it is not one."""
    return _read(folder / NAME, PipelineCard) or PipelineCard()


def read_model_card(path: Path) -> ModelCard | None:
    """The card at `path`; None if there is none. Raises CheckpointError if it is not one."""
    return _read(path, ModelCard)


def _read(path: Path, kind: type[Card]) -> Card | None:
    if not path.is_file():
        return None
    check_place(path, path.parent)
    correct = f"Correct it (docs/guides/{kind.GUIDE}), or rename it if another program wrote it."
    with reading(path, JSON, correct, ValueError, error=CheckpointError):
        text = read_text(path)
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a model card ({error}). {correct}") from error
