"""The process that an engine belongs to. A fork copies neither an engine's threads nor its device."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from tqdit.errors import BackendError


@dataclass(frozen=True)
class Process:
    """The process that opened something. What it opened neither works nor can be freed in a fork of that process."""

    pid: int = field(default_factory=os.getpid)

    @property
    def is_here(self) -> bool:
        return os.getpid() == self.pid

    def check(self, what: str) -> None:
        """Raise BackendError in a fork, where a call would not return."""
        if not self.is_here:
            raise self.refusal(what)

    def refusal(self, what: str) -> BackendError:
        """The error of a fork."""
        return BackendError(
            f"this {what} belongs to process {self.pid} and does not work in process {os.getpid()}, a fork of it. "
            "Open it in each worker, after the fork, or start the workers by multiprocessing's 'spawn'."
        )
