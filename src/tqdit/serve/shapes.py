"""What requests and answers look like: OpenAI's images API, with fields of our own under documented names."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

JobStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
ErrorType = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]
Text = Annotated[str, Meta(max_length=8000)]
Name = Annotated[str, Meta(max_length=200)]


class ImageRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """What to draw. `class`, `seed`, `guidance_scale`, `guidance_interval`, `steps`, `full_calls`, `sampler` and
    `previews` are not OpenAI's.

    null stands for a field that is left out.
    """

    prompt: Annotated[Text | None, Meta(description="a text; for a model of classes, the name or number of one")] = None
    label: Annotated[
        int | Name | None, Meta(description="number or name of a class, in place of a prompt")
    ] = field(name="class", default=None)  # fmt: skip
    model: Annotated[Name | None, Meta(description="a model of /v1/models; by default the first")] = None
    n: Annotated[Annotated[int, Meta(ge=1)] | None, Meta(description="number of images")] = None
    size: Annotated[Name | None, Meta(description="WIDTHxHEIGHT of the model, or auto")] = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None, Meta(description="b64_json by default")
    ] = None  # fmt: skip
    output_format: Literal["png"] | None = None
    seed: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="equal requests with one seed make equal images; by default random, and in the answer"),
    ] = None
    guidance_scale: Annotated[float | None, Meta(description="by default the model's own")] = None
    guidance_interval: Annotated[
        tuple[float, float] | None,
        Meta(description="lowest and highest timestep with guidance; the steps outside cost half; by default all"),
    ] = None
    steps: Annotated[Annotated[int, Meta(ge=1)] | None, Meta(description="by default the model's own")] = None
    full_calls: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="how many steps call the whole network; the others are forecasts; by default the model's own"),
    ] = None
    sampler: Annotated[Name | None, Meta(description="by default the model's own")] = None
    previews: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="pictures of each unfinished image that a stream of events has, at most"),
    ] = None
    partial_images: Annotated[
        Annotated[int, Meta(ge=0)] | None, Meta(description="OpenAI's name of previews")
    ] = None  # fmt: skip
    stream: Annotated[bool | None, Meta(description="answer with events")] = None
    user: Annotated[Name | None, Meta(description="taken and not used")] = None


class ImageData(Struct, omit_defaults=True):
    """One image, in the form that was asked for."""

    b64_json: str | None = None  # a PNG
    url: str | None = None


class ImageAnswer(Struct, kw_only=True):
    """The images, and the settings that make them again: image i has the seed and the index i."""

    created: int  # seconds since 1970
    data: list[ImageData]
    model: str
    size: str
    seed: int
    steps: int
    sampler: str
    guidance_scale: float | None  # null: the model takes none
    guidance_interval: tuple[float, float] | None = None  # null: every step has guidance
    full_calls: int | None = None  # null: no step is a forecast, and none is by default
    output_format: Literal["png"] = "png"


class ErrorBody(Struct):
    """One line for a person; type and code for a program. param: the field at fault."""

    message: str
    type: ErrorType
    param: str | None
    code: str


class ErrorAnswer(Struct):
    """Every answer with a status of 400 or above."""

    error: ErrorBody


class ModelEntry(Struct, kw_only=True):
    """A model, and what can be asked of it."""

    id: str
    created: int  # seconds since 1970, when the engine was opened
    kind: Literal["class", "text", "unconditional"]
    classes: int | None  # how many
    class_names: list[str]
    size: str
    steps: int
    full_calls: int | None  # of these steps; null: it takes no other number than all
    sampler: str
    samplers: list[str]
    guidance_scale: float | None  # null: it takes none
    precision: str
    backend: str
    batch: int  # images per engine call
    most_images: int  # of one request
    most_previews: int  # of one image
    decodes: bool  # a preview costs a decoding
    object: Literal["model"] = "model"
    owned_by: str = "tqdit"


class ModelList(Struct):
    """The models of this server."""

    data: list[ModelEntry]
    object: Literal["list"] = "list"


class JobAnswer(Struct, kw_only=True):
    """A job. The images are there when it is completed, the error when it failed."""

    id: str
    status: JobStatus
    created: int
    model: str
    progress: list[int]  # steps done, of each image
    steps: int  # of each image
    result: ImageAnswer | None = None
    error: ErrorBody | None = None
    object: Literal["job"] = "job"


class PartialImage(Struct, kw_only=True, tag="image_generation.partial_image", tag_field="type"):
    """Event: an unfinished image."""

    b64_json: str
    partial_image_index: int
    image_index: int  # of n
    step: int  # steps done
    steps: int
    created_at: int
    size: str
    output_format: Literal["png"] = "png"
    quality: Literal["auto"] = "auto"
    background: Literal["auto"] = "auto"


class CompletedImage(Struct, kw_only=True, omit_defaults=True, tag="image_generation.completed", tag_field="type"):
    """Event: a finished image."""

    image_index: int
    steps: int
    created_at: int
    model: str
    seed: int
    sampler: str
    guidance_scale: float | None
    guidance_interval: tuple[float, float] | None = None
    full_calls: int | None = None
    size: str
    b64_json: str | None = None
    url: str | None = None
    output_format: str = field(default_factory=lambda: "png")  # not left out, as a default of no factory would be
    quality: str = field(default_factory=lambda: "auto")
    background: str = field(default_factory=lambda: "auto")


class JobEvent(Struct, kw_only=True):
    """Event of a job: job.queued, job.in_progress, job.completed, job.failed or job.cancelled."""

    type: str
    job: JobAnswer


class Health(Struct, omit_defaults=True):
    """Whether the server lives, or takes requests and can answer them."""

    status: Literal["ok", "shutting_down", "engine_stopped", "engine_fails"]
    model: str | None = None  # of the engine


def size_of(height: int, width: int) -> str:
    """OpenAI's order: the width comes first."""
    return f"{width}x{height}"


decode_request = msgspec.json.Decoder(ImageRequest).decode
