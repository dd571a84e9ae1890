"""The scale table: all that calibration hands on (docs/scale-table.md is the written format).

A frozen value in memory, one safetensors file on disk. A *site* is a tensor that is quantized: the name of a module in
the network's module tree and the role of the tensor there. This module needs NumPy; torch is never imported.

Symbols: k bits, q = 2^(k-1), s a step, o a zero point, G groups of timesteps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from tqdit.errors import FileFormatError, UsageError
from tqdit.extras import need
from tqdit.files import whole_file
from tqdit.quantization.seal import seal

FORMAT_VERSION = 2
METADATA_KEY = "tqdit_scales"
TRAINING_STEPS = 1000
BOUNDARIES = "boundaries"  # name of the tensor with the group boundaries

Role = Literal["weight", "input", "left", "right"]
ROLES: tuple[Role, ...] = ("weight", "input", "left", "right")


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: shape ()."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per index along `axis` of the tensor: shape (C,), C = tensor.shape[axis]."""

    axis: int = 0


@dataclass(frozen=True)
class PerTimestepGroup:
    """One scale per group of timesteps: shape (n,). A row takes that of its own timestep's group."""

    n: int


Granularity = PerTensor | PerChannel | PerTimestepGroup


@dataclass(frozen=True, eq=False)
class Symmetric:
    """x^ = s clip(round(x / s), -q, q - 1). `scale` float32 of the granularity's shape."""

    scheme: ClassVar[str] = "symmetric"
    bits: int
    granularity: Granularity
    scale: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Asymmetric:
    """x^ = s (clip(round(x / s) + o, 0, 2^k - 1) - o), eq. 5 as it must be meant. `zero_point` int32, like `scale`."""

    scheme: ClassVar[str] = "asymmetric"
    bits: int
    granularity: Granularity
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]

    @property
    def offset(self) -> NDArray[np.float32]:
        """b = (q - o) s, which moves the codes onto the int8 grid: x^ = Q(x - b; s) + b. Like `scale`."""
        return np.asarray((2 ** (self.bits - 1) - self.zero_point).astype(np.float32) * self.scale)


@dataclass(frozen=True, eq=False)
class TwoRegionSoftmax:
    """Multi-region quantizer of probabilities: c = round(x / s1); c s1 where c <= q - 1, else s2 clip(round(x / s2)).

    `low_step` s1 float32 of the granularity's shape, `high_step` s2 float32 (), codes 0..q-1 in both regions.
    """

    scheme: ClassVar[str] = "softmax"
    bits: int
    granularity: Granularity
    low_step: NDArray[np.float32]
    high_step: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class TwoRegionGelu:
    """Multi-region quantizer after GELU: x < 0 with step s1g and codes -q..0, x >= 0 with step s2g and codes 0..q-1.

    `negative_step` s1g and `positive_step` s2g, float32 of the granularity's shape.
    """

    scheme: ClassVar[str] = "gelu"
    bits: int
    granularity: Granularity
    negative_step: NDArray[np.float32]
    positive_step: NDArray[np.float32]


Quantizer = Symmetric | Asymmetric | TwoRegionSoftmax | TwoRegionGelu
SCHEMES: dict[str, type[Quantizer]] = {
    scheme.scheme: scheme for scheme in (Symmetric, Asymmetric, TwoRegionSoftmax, TwoRegionGelu)
}
# Which tensors a quantizer holds, with their dtype; `high_step` alone does not follow the granularity.
TENSORS: dict[str, dict[str, str]] = {
    "symmetric": {"scale": "float32"},
    "asymmetric": {"scale": "float32", "zero_point": "int32"},
    "softmax": {"low_step": "float32", "high_step": "float32"},
    "gelu": {"negative_step": "float32", "positive_step": "float32"},
}
ROLES_OF_SCHEME: dict[str, tuple[Role, ...]] = {
    "symmetric": ROLES, "asymmetric": ("input",), "softmax": ("left",), "gelu": ("input",)
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Site:
    """One quantized tensor.

    codes: int8, a weight's integers where they are not those of rounding to nearest.
    divisor: float32 (K,), of a linear layer's input: the channels of x come divided by it and W is multiplied with it,
    so the product stays the same and the channels get equal ranges. Every site of a table describes the network in
    which this is done (`tqdit.quantization.fold`): adaLN divides for qkv, fc1 and the final layer, rows of V for proj.
    """

    module: str
    role: Role
    quantizer: Quantizer
    codes: NDArray[np.int8] | None = None
    divisor: NDArray[np.float32] | None = None

    @property
    def name(self) -> str:
        return f"{self.module}.{self.role}"

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The tensors that the file holds for this site, by their last name."""
        arrays = {name: getattr(self.quantizer, name) for name in TENSORS[self.quantizer.scheme]}
        optional = {"codes": self.codes, "divisor": self.divisor}
        return arrays | {name: array for name, array in optional.items() if array is not None}


@dataclass(frozen=True, eq=False)
class ScaleTable:
    """Everything that calibration found. Two tables are equal where their files are, byte for byte.

    boundaries int64 (G - 1,), increasing, in 1..999: the group of timestep t is the number of boundaries <= t.
    errors: module -> error of its quantized output relative to the output's energy, in the metric of the search.
    """

    model: str  # what the user wrote: 'demo' or a path
    fingerprint: str  # of the model, SHA-256
    boundaries: NDArray[np.int64]
    sites: tuple[Site, ...]
    seed: int
    guidance_scale: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from tqdit.quantization.checks import check_table  # which needs the types of this module

        check_table(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScaleTable) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    @property
    def groups(self) -> int:
        return len(self.boundaries) + 1

    @cached_property
    def by_module(self) -> dict[str, dict[str, Site]]:
        """module -> role -> site."""
        modules: dict[str, dict[str, Site]] = {}
        for site in self.sites:
            modules.setdefault(site.module, {})[site.role] = site
        return modules

    def group_of(self, timestep: NDArray[np.int64]) -> NDArray[np.int64]:
        """Group 0..G-1 of each timestep in 0..999."""
        return np.searchsorted(self.boundaries, timestep, side="right").astype(np.int64)

    def check_model(self, fingerprint: str, source: str) -> None:
        """Refuse a model other than the calibrated one."""
        if fingerprint != self.fingerprint:
            raise UsageError(
                f"the scale table was calibrated for model '{self.model}' (fingerprint {self.fingerprint[:12]}), this "
                f"is '{source}' ({fingerprint[:12]}). Calibrate this model, or pass the one that the table names."
            )

    def to_bytes(self) -> bytes:
        """The content of the file; the same table gives the same bytes."""
        numpy = need("safetensors.numpy", "calibrate", "writing a scale table")
        tensors = {BOUNDARIES: np.ascontiguousarray(self.boundaries)}
        for site in self.sites:
            # np.asarray keeps 0-d arrays 0-d, which ascontiguousarray does not
            tensors |= {f"{site.name}.{key}": np.asarray(array, order="C") for key, array in site.arrays().items()}
        text = json.dumps(seal(self._metadata(), tensors), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        content: bytes = numpy.save(tensors, metadata={METADATA_KEY: text})
        return content

    def _metadata(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "guidance_scale": self.guidance_scale,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "errors": dict(self.errors),
            "sites": [
                {
                    "module": site.module,
                    "role": site.role,
                    "scheme": site.quantizer.scheme,
                    "bits": site.quantizer.bits,
                    "granularity": granularity_to_text(site.quantizer.granularity),
                }
                for site in self.sites
            ],
        }


def even_boundaries(groups: int, span: tuple[float, float] = (0.0, 1000.0)) -> NDArray[np.float64]:
    """Boundaries (G - 1,) of groups of equal length."""
    return np.ceil(np.arange(1, groups) * 1000 / groups)


def factor_steps(steps: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(s_ref, r) with s[g] = s_ref r[g], s_ref = max s[g]: shapes () and that of `steps`, both float32.

    The one place that factors steps: an export and the fake-quantized network must agree to the last bit.
    """
    reference = np.asarray(steps.max(), dtype=np.float32)
    return reference, np.asarray(steps / reference, dtype=np.float32)


def granularity_to_text(granularity: Granularity) -> str:
    match granularity:
        case PerTensor():
            return "tensor"
        case PerChannel(axis):
            return f"channel:{axis}"
        case PerTimestepGroup(n):
            return f"group:{n}"


def granularity_from_text(text: str) -> Granularity:
    kind, _, number = text.partition(":")
    if kind == "tensor" and not number:
        return PerTensor()
    if kind in ("channel", "group") and number.isdigit():
        return PerChannel(int(number)) if kind == "channel" else PerTimestepGroup(int(number))
    raise FileFormatError(f"granularity '{text}' is unknown; known are tensor, channel:AXIS, group:N. Calibrate again.")


def write_scale_table(path: Path, table: ScaleTable) -> None:
    """Write the file, whole or not at all."""
    content = table.to_bytes()
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def read_scale_table(path: Path) -> ScaleTable:
    """Read and validate everything. Raises FileFormatError with one line that names the file and what is wrong."""
    from tqdit.quantization.checks import parse

    safetensors = need("safetensors", "calibrate", "reading a scale table")
    if not path.is_file():
        raise UsageError(f"{path}: no such file. Write it with tqdit-calibrate.")
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
        raise FileFormatError(f"{path}: damaged or truncated ({error}). Calibrate again.") from error
    try:
        return parse(metadata, tensors)
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error.__cause__


def is_scale_table(path: Path) -> bool:
    """Whether the header of this safetensors file says so; reads nothing else."""
    safetensors = need("safetensors", "calibrate", "reading a scale table")
    try:
        with safetensors.safe_open(path, "np") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False
