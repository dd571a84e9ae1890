"""What a user may choose about a build. Each backend names the fields that it honours; the others are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from tqdit.bounds import MOST_BATCH
from tqdit.errors import UsageError

Precision = Literal["int8", "fp8", "fp16", "bf16", "fp32"]
FloatType = Literal["fp32", "fp16", "bf16"]
FloatChoice = Literal["auto", "fp32", "fp16", "bf16"]
QUANTIZED = ("int8", "fp8")  # what a quantized file can become without losing its quantization
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
FLOAT_CHOICES: tuple[FloatChoice, ...] = get_args(FloatChoice)


LAYERS_FILE = "layers.txt"  # what a compiler said of its layers; kept beside the output if the build is refused
LAYERS_KEPT = " The compiler's own list of layers: "  # comes before the path of that file


@dataclass(frozen=True)
class BatchRange:
    """Images per engine call: the fewest, the number to tune for, the most. With guidance an image is two rows."""

    least: int = 1
    best: int = 16
    most: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.best <= self.most <= MOST_BATCH:
            raise UsageError(
                f"--batch {self.least},{self.best},{self.most}: expected MIN,OPT,MAX with 1 <= MIN <= OPT <= MAX <= "
                f"{MOST_BATCH}."
            )

    def rows(self, rows_per_image: int) -> tuple[int, int, int]:
        """The same in rows of a call."""
        return self.least * rows_per_image, self.best * rows_per_image, self.most * rows_per_image

    @classmethod
    def parse(cls, text: str) -> BatchRange:
        """'1,4,16', or '4' for exactly four."""
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 3):
            raise UsageError(f"--batch {text}: expected MIN,OPT,MAX (such as 1,4,16) or one number.")
        return cls(*numbers) if len(numbers) == 3 else cls(*numbers * 3)


@dataclass(frozen=True)
class BuildConfig:
    """One build. Where a field is None the backend chooses.

    Every backend takes `precision`, `float_type` and `allow_fallback`; the rest are named in its `OPTIONS`.
    """

    precision: Precision | None = None  # None: int8 for a quantized file, fp32 for a float one
    float_type: FloatChoice = "auto"  # of what is not integer
    allow_fallback: bool = False  # keep an engine although quantized products run in float
    batch: BatchRange | None = None
    provider: str | None = None  # execution provider of ONNX Runtime: cpu, cuda, tensorrt
    targets: tuple[str, ...] = ()  # compute capabilities such as '8.9'
    workspace_bytes: int | None = None  # scratch memory at most
    timing_cache: Path | None = None  # read when it exists, then written
    optimization_level: int | None = None
    version_compatible: bool = False  # TensorRT: the plan also runs on later versions of the same major one
    lean_runtime: Literal["embed", "exclude"] = "embed"  # of a version-compatible plan
    device: int | None = None  # index of the GPU to build on; None: the current one
    plugins: bool = True  # use kernels for the custom ops if the backend takes them
    refit: bool = False  # weights can be replaced; those of an engine that is there are, if nothing else differs
    weight_streaming: bool = False  # weights may stay in the host's memory (GpuShare.weight_budget_bytes)
    base: Path | None = None  # with refit, the bundle whose weights may be replaced; chosen by `build_engine`

    def refuse_unknown(self, backend: str, honoured: frozenset[str]) -> None:
        """Raises UsageError if a field was set that this backend does not know."""
        common = {"precision", "float_type", "allow_fallback"}
        for field in fields(self):
            if field.name not in common | honoured and getattr(self, field.name) != field.default:
                flag = FLAGS.get(field.name, f"--{field.name.replace('_', '-')}")
                raise UsageError(f"{flag} has no meaning for {backend}. Leave it out, or choose another --backend.")


FLAGS = {  # of the fields that have another name
    "targets": "--target",
    "workspace_bytes": "--workspace",
    "lean_runtime": "--exclude-lean-runtime",
    "plugins": "--no-plugins",
}

# Reports how far a build is: (what is being done, parts done, parts in all or 0 if unknown).
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """No-op callback."""
