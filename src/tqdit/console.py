"""Progress of a command: messages and progress bars on stderr; results go to stdout."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Self, TypeAlias

from tqdm import tqdm


@dataclass(frozen=True)
class Console:
    """`quiet` hides everything but errors and the last line of stdout."""

    quiet: bool = False

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def bar(self, total: int, what: str, unit: str) -> Bar:
        """A context manager that shows the progress and the time left after each `update()`.

        It is a progress bar on a terminal; otherwise, one line per 10 %.
        """
        if not self.quiet and not sys.stderr.isatty():
            return Lines(total, what, unit)
        return tqdm(
            total=total,
            desc=what,
            unit=unit,
            disable=self.quiet,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format="{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {unit}, {remaining} left{postfix}",
        )


class Lines:
    """A bar for log files: a line on stderr at each further 10 %. It has what TQDiT uses of tqdm's bar."""

    leave = True  # lines stay

    def __init__(self, total: int, desc: str, unit: str) -> None:
        self.desc, self.unit = desc, unit
        self.reset(total)

    def reset(self, total: int) -> None:
        self.n, self.total = 0, total
        self._started = self._last_time = time.monotonic()
        self._last_n = 0

    def update(self, n: int = 1) -> None:
        self.n += n
        self.refresh()

    def refresh(self) -> None:
        if self.total and 10 * self.n // self.total > 10 * self._last_n // self.total:
            now = time.monotonic()
            speed = (self.n - self._last_n) / max(now - self._last_time, 1e-9)  # since the last line
            left = (self.total - self.n) / speed
            end = f"{_duration(left)} left" if self.n < self.total else f"done in {_duration(now - self._started)}"
            percent = 10 * (10 * self.n // self.total)
            line = f"{self.desc}: {percent} %, {self.n} of {self.total} {self.unit}, {end}"
            print(line, file=sys.stderr, flush=True)
            self._last_time, self._last_n = now, self.n

    def set_description_str(self, desc: str, refresh: bool = True) -> None:  # noqa: ARG002 (tqdm's)
        self.desc = desc

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        """Not shown: it changes with every update."""

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...


Bar: TypeAlias = tqdm | Lines


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
