"""What the lint says about one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]

BACKENDS = ("onnxruntime", "openvino", "tensorrt-rtx", "tensorrt")
TENSORRT = ("tensorrt-rtx", "tensorrt")


@dataclass(frozen=True)
class Rule:
    """A rule by its name in the findings; `node` is the name of a node, or of what else the finding is about."""

    name: str

    def error(self, node: str, message: str, remedy: str, backends: tuple[str, ...] = BACKENDS) -> Finding:
        return Finding(self.name, "error", node, message, remedy, backends)

    def warning(self, node: str, message: str, remedy: str, backends: tuple[str, ...] = BACKENDS) -> Finding:
        return Finding(self.name, "warning", node, message, remedy, backends)


@dataclass(frozen=True)
class Finding:
    """An error means wrong values, a refused file or INT8 lost silently; a warning costs size or a detour.

    `backends` are those that are affected; a lint for another backend leaves the finding out.
    """

    rule: str
    severity: Severity
    node: str
    message: str
    remedy: str
    backends: tuple[str, ...] = BACKENDS

    def __str__(self) -> str:
        return f"{self.severity}: {self.node}: {self.message} [{self.rule}]\n    remedy: {self.remedy}"
