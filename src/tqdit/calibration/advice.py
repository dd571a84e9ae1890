"""The advice of `tqdit-evaluate --layers` (docs/evaluation.md), as a calibration takes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tqdit.calibration.config import QuantizationConfig
from tqdit.errors import FileFormatError, UsageError
from tqdit.files import JSON, reading

AGAIN = "Write it with tqdit-evaluate --layers."


@dataclass(frozen=True)
class Advice:
    """The settings of the table that was diagnosed, with the changes for single layers."""

    config: QuantizationConfig
    fingerprint: str
    source: str

    def check_model(self, fingerprint: str, model: str) -> None:
        if fingerprint != self.fingerprint:
            raise UsageError(
                f"{self.source}: diagnoses another model (fingerprint {self.fingerprint[:12]}) than '{model}' "
                f"({fingerprint[:12]}). Pass the model that was diagnosed."
            )


def read_advice(path: Path) -> Advice:
    """Raises FileFormatError if the file is not a diagnosis or has no advice."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file. {AGAIN}")
    with reading(path, JSON, AGAIN, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
    try:
        config = QuantizationConfig.of_settings(content["settings"])
        config = config.with_layer_knobs((str(entry["layer"]), entry["change"]) for entry in content["advice"])
        return Advice(config, str(content["fingerprint"]), str(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path}: not a diagnosis that this tqdit reads ({error}). {AGAIN}") from error
