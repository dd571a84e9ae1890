"""An engine on disk: a folder with `manifest.json` and the compiled parts that it lists (docs/engine-bundle.md).

The manifest names every file with its size and SHA-256. Opening a bundle checks all of them, so a truncated or altered
part is refused by name before anything runs.
"""

from __future__ import annotations

import json
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from tqdit.card import GraphCard
from tqdit.engines import cpu
from tqdit.engines.config import BatchRange
from tqdit.errors import BackendError, FileFormatError, OutputError
from tqdit.files import JSON, check_only, decode_record, reading, sha256, writing
from tqdit.golden import Verdict

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
CALLS_FILE = "calls.npz"  # golden calls
FORECAST = "forecast"  # folder of the compiled forecast in a bundle


@dataclass(frozen=True)
class BundlePart:
    """One file of a bundle."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Audit:
    """Products of the scale table by what became of them, read off the compiled artefact."""

    integer: int
    simulated: int  # rounded in float arithmetic by choice of the export
    weight_only: int  # integer weights, float product, by choice of the calibration
    fallen_back: tuple[str, ...]  # should be integer and are not
    number: str = "int8"  # or fp8: what counts as integer here

    @property
    def line(self) -> str:
        return (
            f"quantized products: {self.integer} {self.number}, {self.simulated} simulated by choice, "
            f"{self.weight_only} weight-only by choice, {len(self.fallen_back)} fallen back"
        )


@dataclass(frozen=True)
class Verified:
    """What the golden calls gave where the engine was built: mean errors against the float model."""

    calls: int
    error: float
    expected: float

    @classmethod
    def of(cls, verdict: Verdict) -> Verified:
        return cls(len(verdict.found), float(verdict.found.mean()), float(verdict.expected.mean()))

    @property
    def line(self) -> str:
        return f"golden calls: {self.calls}, error against float {self.error:.1e} (expected {self.expected:.1e})"


@dataclass(frozen=True)
class Timing:
    """How fast the engine of one file was where several were built and the fastest was kept."""

    file: str
    attention: str | None  # its form; None: a float graph
    median_ms: float  # of a call
    rows: int  # of that call


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """What a backend compiled."""

    entry: str  # file that the backend opens
    decoder: str | None  # file of the VAE decoder
    versions: dict[str, str]  # of the libraries that built it
    target: dict[str, str]  # hardware that it runs on
    audit: Audit | None = None  # of a quantized graph
    batch: BatchRange | None = None  # images per call that it was built for; None: any number
    plugins: dict[str, str] = field(default_factory=dict)  # custom op -> 'plugin', or 'body: ' and why
    verified: Verified | None = None  # None: no golden calls, or they cannot run where it was built
    weights: Literal["fixed", "refittable", "refitted"] = "fixed"  # can be replaced, and were since it was compiled
    streams_weights: bool = False  # some may stay in the host's memory


@dataclass(frozen=True, kw_only=True)
class _Facts(Artefact):
    """The manifest without the card, which reads itself."""

    backend: str
    precision: str
    float_type: str = "fp32"  # of what is not integer
    files: dict[str, BundlePart] = field(default_factory=dict)
    measured: tuple[Timing, ...] = ()  # of the files that the engine was chosen from; (): one file, or not measured
    forecast: str | None = None  # file in the folder of the forecast; None: every call is full


@dataclass(frozen=True, kw_only=True)
class _Stored(_Facts):
    card: msgspec.Raw


@dataclass(frozen=True, kw_only=True)
class Manifest(_Facts):
    """What a bundle holds and what it needs in order to run."""

    card: GraphCard

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self), "card": self.card.to_json()}

    @classmethod
    def from_json(cls, text: str | bytes, where: Path) -> Manifest:
        """Raises FileFormatError naming `where` if the text is not a manifest of this version."""
        stored = decode_record(text, _Stored, FORMAT_VERSION, str(where), "Build the engine again.")
        manifest = cls(**vars(stored) | {"card": GraphCard.from_json(bytes(stored.card), str(where))})
        forecast = None if manifest.forecast is None else f"{FORECAST}/{manifest.forecast}"
        for name in [*manifest.files, manifest.entry, *filter(None, [manifest.decoder, forecast])]:
            plain = name.removeprefix(f"{FORECAST}/")
            if name not in manifest.files or Path(plain).name != plain or plain in ("", ".", ".."):
                raise FileFormatError(f"{where}: '{name}' is not a file of this bundle. Build the engine again.")
        card = manifest.card
        if (manifest.forecast is None) != (card.residual is None) or (card.sampling.full_calls and forecast is None):
            raise FileFormatError(
                f"{where}: found the forecast {manifest.forecast}, a residual {card.residual} and {card.sampling}, "
                "which do not go together. Build the engine again."
            )
        return manifest

    @property
    def of_forecast(self) -> Manifest:
        """The manifest of the forecast, as if its folder were a bundle."""
        assert self.forecast is not None
        inside = f"{FORECAST}/"
        files = {name.removeprefix(inside): part for name, part in self.files.items() if name.startswith(inside)}
        card = replace(self.card, graph="forecast", vae=None, text=None)
        return replace(self, entry=self.forecast, decoder=None, forecast=None, files=files, card=card)


def describe_parts(folder: Path) -> dict[str, BundlePart]:
    """Size and SHA-256 of every file in a folder that is being built."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): BundlePart(sha256(file), file.stat().st_size) for file in files}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle, without checking its parts."""
    if not folder.exists():
        raise FileFormatError(f"{folder}: no such engine. Run tqdit-build first.")
    if not (folder / MANIFEST).is_file():
        raise FileFormatError(
            f"{folder}: not an engine bundle (it has no {MANIFEST}). Pass a folder that tqdit-build wrote."
        )
    with reading(folder / MANIFEST, JSON, "Build the engine again."):
        text = (folder / MANIFEST).read_bytes()
    return Manifest.from_json(text, folder / MANIFEST)


def check_parts(folder: Path, manifest: Manifest) -> None:
    """Every part is there, whole and unaltered."""
    for name, part in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise FileFormatError(f"{file}: missing from the bundle. Build the engine again.")
        size = file.stat().st_size
        if size != part.size_bytes:
            raise FileFormatError(
                f"{file}: {size} bytes, the manifest says {part.size_bytes}: truncated or altered. "
                "Build the engine again."
            )
        if sha256(file) != part.sha256:
            raise FileFormatError(f"{file}: altered since it was built (its SHA-256 differs). Build the engine again.")


def check_machine(folder: Path, manifest: Manifest) -> None:
    """Refuse a bundle of another kind of processor, and one of integers that this processor adds up wrongly."""
    machine = manifest.target.get("machine", platform.machine())
    if machine != platform.machine():
        raise BackendError(
            f"{folder}: built for {machine}, this machine is {platform.machine()}. Build the engine here."
        )
    if cpu.INTEGERS in manifest.target and cpu.sums_overflow():
        raise BackendError(
            f"{folder}: built for a CPU with {manifest.target[cpu.INTEGERS]}. This one has none, and its sums of "
            "integer products would overflow. Build the engine here with --backend onnxruntime."
        )


def check_not_older(folder: Path, manifest: Manifest, library: str, title: str, installed: str) -> None:
    """Refuse a library (its distribution's name) that is older than the one that built the bundle."""
    built_by = manifest.versions.get(library, "0")
    if release_numbers(installed)[:2] < release_numbers(built_by)[:2]:
        raise BackendError(
            f"{folder}: built by {title} {built_by}, installed is {installed}. Build the engine again, or run: "
            f"pip install '{library}>={built_by}'"
        )


def release_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


class _Ours(msgspec.Struct):
    """What tells a manifest of any version from other files of that name."""

    format_version: int
    backend: str
    files: dict[str, Any]


def check_overwrite(folder: Path, force: bool = True) -> None:
    """Raise OutputError unless a bundle may take this place: free, empty, or that of a bundle and nothing else.

    force: a bundle of another version of tqdit, too.
    """
    ours = None
    nothing = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
    with writing(folder), suppress(*nothing, msgspec.MsgspecError, UnicodeError, RecursionError):
        ours = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Ours)
    names = set() if ours is None else {MANIFEST, *ours.files}
    inside = {name.removeprefix(f"{FORECAST}/") for name in names if name.startswith(f"{FORECAST}/")}
    check_only(folder, names.__contains__, "an engine bundle", (FORECAST,) if inside else ())
    if inside:
        check_only(folder / FORECAST, inside.__contains__, "an engine bundle")
    if ours is not None and ours.format_version != FORMAT_VERSION and not force:
        raise OutputError(
            f"{folder}: an engine of format {ours.format_version}, this tqdit writes format {FORMAT_VERSION}. Choose "
            "another name, or pass --force to replace it."
        )
