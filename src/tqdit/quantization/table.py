"""The scale table: all that calibration hands on (docs/scale-table.md is the written format).

A frozen value in memory, one safetensors file on disk. A *site* is a tensor that is quantized: the name of a module in
the network's module tree and the role of the tensor there. This module needs NumPy; torch is never imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from tqdit import safetensors_file
from tqdit.errors import FileFormatError, UsageError
from tqdit.extras import need
from tqdit.files import SAFETENSORS, decode_record, reading, whole_file
from tqdit.golden import GoldenCalls
from tqdit.interface import CONSTANT, EXAMPLE, Interface, InterfaceEntry
from tqdit.quantization.checks import (
    AGAIN,
    BOUNDARIES,
    check_boundaries,
    check_codes,
    check_divisor,
    check_layer,
    check_quantizer,
)
from tqdit.quantization.granularity import Role, granularity_from_text, granularity_to_text
from tqdit.quantization.quantizer import Quantizer
from tqdit.quantization.schemes import find_schemes
from tqdit.sampling.correction import Correction

FORMAT_VERSION = 4
METADATA_KEY = "tqdit_scales"
GOLDEN = "golden."  # begins the names of the tensors of golden calls
LAYER = "layer."  # and of those that rewrites of layers need
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Site:
    """One quantized tensor.

    codes: int8, a weight's integers if they are not those of rounding to nearest.
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
        optional = {"codes": self.codes, "divisor": self.divisor}
        return self.quantizer.arrays() | {name: array for name, array in optional.items() if array is not None}


@dataclass(frozen=True, eq=False)
class ScaleTable:
    """Everything that calibration found. Two tables are equal if their files are, byte for byte.

    boundaries float64 (G - 1,), increasing, in the network's unit of time: the group of timestep t is the number of
    boundaries <= t.
    errors: module -> error of its quantized output relative to the output's energy, in the metric of the search.
    interface: of a recorded network, what an export must know besides its weights.
    placed: where the steps of a short chain lie best, found with these scales. correction: of the errors of the network
    with these scales, which a chain takes back.
    layers: module -> tensors of its rewrites (tqdit.models.rewrites), which sites then describe: divisor float32 (K,),
    up float16 (O, r) and down float16 (r, K).
    """

    model: str  # what the user wrote: 'demo' or a path
    fingerprint: str  # of the model, SHA-256
    boundaries: NDArray[np.float64]
    sites: tuple[Site, ...]
    seed: int
    guidance_scale: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    golden: GoldenCalls | None = None
    interface: Interface | None = None
    placed: PlacedSteps | None = None
    correction: Correction | None = None
    layers: Mapping[str, Arrays] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises FileFormatError on the first thing that is wrong."""
        check_boundaries(self.boundaries)
        seen: set[str] = set()
        for site in self.sites:
            if site.name in seen:
                raise FileFormatError(f"'{site.name}' is listed twice. {AGAIN}")
            seen.add(site.name)
            check_quantizer(site.name, site.role, site.quantizer, self.groups)
            if site.divisor is not None:
                check_divisor(f"{site.name}.divisor", site.role, site.divisor)
            if site.codes is not None:
                check_codes(f"{site.name}.codes", site.role, site.quantizer, site.codes)
        for module, arrays in self.layers.items():
            check_layer(f"{LAYER}{module}", arrays)
        if not math.isfinite(self.guidance_scale):
            raise FileFormatError(f"the guidance scale is {self.guidance_scale}, expected a finite number. {AGAIN}")
        for module, error in self.errors.items():
            if not (math.isfinite(error) and error >= 0):
                raise FileFormatError(f"the error of '{module}' is {error}, expected a number >= 0. {AGAIN}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScaleTable) and self.to_bytes() == other.to_bytes()

    def __hash__(self) -> int:
        return hash(self.to_bytes())

    @property
    def groups(self) -> int:
        return len(self.boundaries) + 1

    def count(self, setting: str) -> int:
        """A setting that decides how layers are rewritten, and so how sites name them; 0: not at all.

        Raises FileFormatError for what is no such number.
        """
        return _count(setting, self.settings.get(setting, 0))

    @property
    def layer_columns(self) -> dict[str, int]:
        """The setting `columns` of the layers that have their own, by name. Raises FileFormatError like `count`."""
        name = "layer_columns"
        held = self.settings.get(name, {})
        if not isinstance(held, Mapping):
            raise FileFormatError(f"the setting '{name}' is {held!r}, expected a number for each layer. {AGAIN}")
        return {str(layer): _count(f"{name}.{layer}", columns) for layer, columns in held.items()}

    @cached_property
    def by_module(self) -> dict[str, dict[str, Site]]:
        """module -> role -> site."""
        modules: dict[str, dict[str, Site]] = {}
        for site in self.sites:
            modules.setdefault(site.module, {})[site.role] = site
        return modules

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
        if self.golden is not None:
            tensors |= {f"{GOLDEN}{key}": np.asarray(array, order="C") for key, array in self.golden.arrays().items()}
        for module, arrays in self.layers.items():
            tensors |= {f"{LAYER}{module}.{key}": np.asarray(array, order="C") for key, array in arrays.items()}
        if self.interface is not None:
            tensors |= self.interface.arrays
        text = msgspec.json.encode(self._header(), order="sorted").decode()
        content: bytes = numpy.save(tensors, metadata={METADATA_KEY: text})
        return content

    def _header(self) -> Header:
        entries = [
            SiteEntry(site.module, site.role, quantizer.scheme, quantizer.bits,
                      granularity_to_text(quantizer.granularity))
            for site in self.sites for quantizer in [site.quantizer]
        ]  # fmt: skip
        versions = {name: str(version) for name, version in self.versions.items()}  # torch's is a subclass of str
        return Header(
            FORMAT_VERSION, self.model, self.fingerprint, self.seed, self.guidance_scale,
            dict(self.settings), versions, dict(self.errors), entries,
            None if self.interface is None else self.interface.entry, self.placed or msgspec.UNSET,
            self.correction or msgspec.UNSET,
        )  # fmt: skip


def _count(name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise FileFormatError(f"the setting '{name}' is {value!r}, expected a whole number >= 0. {AGAIN}")
    return value


class PlacedSteps(msgspec.Struct, frozen=True):
    """The timesteps of a short chain, and the error of x_0 of chains of as many calls on the quantized network.

    errors: 'SAMPLER SPACING' of all that were tried -> |x - x_ref|^2 / |x_ref|^2, geometric mean over `images` of noise
    that the search did not see; x_ref is the end of a long chain of the float network. The timesteps are those of the
    least error, which a published spacing may have. full_calls: the steps whose calls are full if others are forecasts;
    (): all are.
    """

    sampler: str
    timesteps: tuple[float, ...]
    errors: dict[str, float]
    images: int
    full_calls: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) and value >= 0 for value in self.errors.values()):
            raise ValueError(f"errors {self.errors}, expected numbers >= 0")


class SiteEntry(msgspec.Struct):
    """One site in the metadata; its tensors lie beside."""

    module: str
    role: str
    scheme: str
    bits: int
    granularity: str


class Header(msgspec.Struct):
    """The metadata of a file, as JSON holds it."""

    format_version: int
    model: str
    fingerprint: str
    seed: int
    guidance_scale: float
    settings: dict[str, Any]
    versions: dict[str, str]
    errors: dict[str, float]
    sites: list[SiteEntry]
    interface: InterfaceEntry | None = None
    placed: PlacedSteps | msgspec.UnsetType = msgspec.UNSET
    correction: Correction | msgspec.UnsetType = msgspec.UNSET


def even_boundaries(groups: int, span: tuple[float, float] = (0, 1000)) -> NDArray[np.float64]:
    """Boundaries (G - 1,) of groups of equal length over the timesteps of `span` (its end excluded).

    If both ends are integers, so are the timesteps, and boundaries are rounded up to whole numbers.
    """
    start, end = span
    whole = isinstance(start, int) and isinstance(end, int)
    if groups < 1 or (whole and groups > end - start):
        most = f"1 to {end - start}" if whole else "at least 1"
        raise UsageError(f"--groups is {groups}; there can be {most} groups of timesteps.")
    inner = np.arange(1, groups)
    if whole:  # in integers, since (end - start) / groups is not exact
        return (start - (-(end - start) * inner // groups)).astype(np.float64)
    return start + (end - start) * inner / groups


def write_scale_table(path: Path, table: ScaleTable) -> None:
    """Write the file, whole or not at all."""
    content = table.to_bytes()
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def read_scale_table(path: Path) -> ScaleTable:
    """Read and validate everything. Raises FileFormatError with one line that names the file and what is wrong."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file. Write it with tqdit-calibrate.")
    with reading(path, SAFETENSORS, AGAIN, ValueError):
        metadata, tensors = safetensors_file.read(path)
    try:
        return parse(metadata, tensors)
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from error.__cause__


def is_scale_table(path: Path) -> bool:
    """Whether the header of this safetensors file says so; reads nothing else."""
    try:
        with reading(path, SAFETENSORS, AGAIN, ValueError):
            return METADATA_KEY in safetensors_file.read_metadata(path)
    except FileFormatError:
        return False


def parse(metadata: Mapping[str, str], tensors: Arrays) -> ScaleTable:
    """A table from the two parts of its file."""
    header = _read_header(metadata)
    if BOUNDARIES not in tensors:
        raise FileFormatError(f"'{BOUNDARIES}' is missing. {AGAIN}")
    schemes = find_schemes()
    sites = tuple(_read_site(entry, schemes, tensors) for entry in header.sites)
    known = {BOUNDARIES} | {f"{site.name}.{key}" for site in sites for key in site.arrays()}
    golden = {name.removeprefix(GOLDEN): array for name, array in tensors.items() if name.startswith(GOLDEN)}
    unknown = sorted(name for name in set(tensors) - known if not name.startswith((GOLDEN, LAYER, CONSTANT, EXAMPLE)))
    if unknown:
        raise FileFormatError(f"'{unknown[0]}' belongs to no site that the metadata lists. {AGAIN}")
    layers: dict[str, dict[str, NDArray[Any]]] = {}
    for name in sorted(name for name in set(tensors) - known if name.startswith(LAYER)):
        module, _, key = name.removeprefix(LAYER).rpartition(".")
        layers.setdefault(module, {})[key] = tensors[name]
    interface = None if header.interface is None else Interface.of(header.interface, tensors)
    if interface is not None:
        interface.check("recorded calls")
    return ScaleTable(
        header.model, header.fingerprint, tensors[BOUNDARIES], sites, header.seed, header.guidance_scale,
        header.settings, header.versions, header.errors, GoldenCalls.of(golden) if golden else None, interface,
        header.placed or None, header.correction or None, layers,
    )  # fmt: skip


def _read_header(metadata: Mapping[str, str]) -> Header:
    if METADATA_KEY not in metadata:
        raise FileFormatError(
            f"not a scale table: it has no '{METADATA_KEY}' metadata. Pass a file that tqdit-calibrate wrote."
        )
    return decode_record(metadata[METADATA_KEY], Header, FORMAT_VERSION, f"'{METADATA_KEY}' metadata", AGAIN)


def _read_site(entry: SiteEntry, schemes: Mapping[str, type[Quantizer]], tensors: Arrays) -> Site:
    name = f"{entry.module}.{entry.role}"
    if entry.scheme not in schemes:
        raise FileFormatError(f"'{name}' has scheme '{entry.scheme}'; known are {', '.join(schemes)}. {AGAIN}")
    scheme = schemes[entry.scheme]
    missing = [key for key in scheme.tensors if f"{name}.{key}" not in tensors]
    if missing:
        raise FileFormatError(f"'{name}.{missing[0]}' is missing. {AGAIN}")
    try:
        granularity = granularity_from_text(entry.granularity)
    except FileFormatError as error:
        raise FileFormatError(f"'{name}': {error}") from error
    quantizer = scheme(entry.bits, granularity, **{key: tensors[f"{name}.{key}"] for key in scheme.tensors})
    role = cast(Role, entry.role)  # which ScaleTable checks
    return Site(entry.module, role, quantizer, tensors.get(f"{name}.codes"), tensors.get(f"{name}.divisor"))
