"""The proof that a build stayed integer: in which precision each quantized product of the compiled artefact runs."""

from __future__ import annotations

from collections.abc import Iterable

from tqdit.card import QuantizationCard
from tqdit.engines.bundle import Audit
from tqdit.errors import BackendError
from tqdit.graph_names import Scopes


def audit(card: QuantizationCard, scopes: Scopes, integer_nodes: Iterable[str], float_nodes: Iterable[str]) -> Audit:
    """Compare what the export promised with the compiled graph's products, both by node names of the ONNX file.

    A product counts as integer if the artefact has integer nodes of its module and no float ones.
    """
    integer = {scopes.scope_of_name(name) for name in integer_nodes}
    floating = {scopes.scope_of_name(name) for name in float_nodes}
    promised = tuple(module for module, form in card.products.items() if form == "integer")
    fallen = tuple(module for module in promised if module not in integer or module in floating)
    forms = list(card.products.values())
    return Audit(len(promised) - len(fallen), forms.count("simulated"), forms.count("weight-only"), fallen)


def check_audit(report: Audit, backend: str, cause: str) -> None:
    """Refuse an engine in which a product fell back to float."""
    if report.fallen_back:
        shown = ", ".join(report.fallen_back[:6]) + (", ..." if len(report.fallen_back) > 6 else "")
        raise BackendError(
            f"{len(report.fallen_back)} quantized product(s) would run in float on {backend}: {shown}. Likely cause: "
            f"{cause}. Pass --allow-float-fallback to keep the engine all the same."
        )
