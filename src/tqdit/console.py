"""What a command shows while it works: lines and progress bars on stderr, results on stdout."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Console:
    """`quiet` silences everything but errors and the last line of stdout."""

    quiet: bool = False

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def bar(self, total: int, what: str, unit: str) -> tqdm[Any]:
        """A progress bar with the time left; use it as a context manager and call `update()`."""
        return tqdm(
            total=total,
            desc=what,
            unit=unit,
            disable=self.quiet,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {unit}, {remaining} left{postfix}",
        )
