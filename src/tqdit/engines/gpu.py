"""Which GPU runs an engine, and how much of its memory the engine's weights may take."""

from __future__ import annotations

from dataclasses import dataclass

from tqdit.bounds import check_count, check_number

MOST_MIB = 2**24


@dataclass(frozen=True)
class GpuShare:
    """index: of the GPU; None: the current one.

    weight_budget_bytes: weights on the GPU at most, of an engine of TensorRT or TensorRT-RTX that was built with
    `--weight-streaming`; the others stay in the host's memory and cross over in every call. None: all on the GPU.
    """

    index: int | None = None
    weight_budget_bytes: int | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for numbers that make no sense."""
        if self.index is not None:
            check_count("device", self.index, 0)
        if self.weight_budget_bytes is not None:
            check_count("weight budget", self.weight_budget_bytes, 0)

    @classmethod
    def of(cls, device: GpuChoice) -> GpuShare:
        return device if isinstance(device, GpuShare) else cls(device)

    @classmethod
    def with_budget(cls, index: int | None, mebibytes: float | None) -> GpuChoice:
        """From `--device` and `--weight-budget`; None if neither is given."""
        if mebibytes is None:
            return index
        return cls(index, int(check_number("--weight-budget", mebibytes, 0, MOST_MIB) * 2**20))


GpuChoice = int | GpuShare | None  # an index alone is enough
