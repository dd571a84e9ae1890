"""The proof that a build stayed integer: in which precision each quantized product of the compiled artefact runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tqdit.card import QuantizationCard
from tqdit.errors import BackendError


@dataclass(frozen=True)
class Audit:
    """Products of the scale table by what became of them, read off the compiled artefact."""

    integer: int
    simulated: int  # rounded in float arithmetic by choice of the export
    weight_only: int  # integer weights, float product, by choice of the calibration
    fallen_back: tuple[str, ...]  # should be integer and are not

    @property
    def line(self) -> str:
        return (
            f"quantized products: {self.integer} int8, {self.simulated} simulated by choice, "
            f"{self.weight_only} weight-only by choice, {len(self.fallen_back)} fallen back"
        )

    def check(self, backend: str, cause: str) -> None:
        """Refuse an engine in which a product fell back to float."""
        if self.fallen_back:
            shown = ", ".join(self.fallen_back[:6]) + (", ..." if len(self.fallen_back) > 6 else "")
            raise BackendError(
                f"{len(self.fallen_back)} quantized product(s) would run in float on {backend}: {shown}. Likely cause: "
                f"{cause}. Pass --allow-float-fallback to keep the engine all the same."
            )


def audit(card: QuantizationCard, integer_nodes: Iterable[str], float_nodes: Iterable[str]) -> Audit:
    """Compare what the export promised with the compiled graph's products, both by node names MODULE/OpType...

    A product counts as integer where the artefact has integer nodes of its module and no float ones.
    """
    integer = {name.split("/")[0] for name in integer_nodes}
    floating = {name.split("/")[0] for name in float_nodes}
    promised = [module for module, form in card.products.items() if form == "integer"]
    fallen = tuple(module for module in promised if module not in integer or module in floating)
    forms = list(card.products.values())
    return Audit(len(promised) - len(fallen), forms.count("simulated"), forms.count("weight-only"), fallen)
