"""All quantization passes in their order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from tqdit.card import AttentionForm, ProductForm, QuantizationCard
from tqdit.errors import UsageError
from tqdit.exporter.passes.attention import quantize_attention
from tqdit.exporter.passes.groups import GroupSelector
from tqdit.exporter.passes.linear import quantize_linears
from tqdit.exporter.passes.scopes import network_timestep
from tqdit.models.loaded import LoadedModel
from tqdit.models.products import Product, Scores, ValueProduct
from tqdit.plugins import DOMAIN, VERSION
from tqdit.plugins.multi_region_attention import schema as multi_region_attention
from tqdit.plugins.multi_region_integer_attention import schema as multi_region_integer_attention
from tqdit.plugins.multi_region_numerator import schema as multi_region_numerator
from tqdit.plugins.multi_region_numerator_attention import schema as multi_region_numerator_attention
from tqdit.plugins.multi_region_numerator_integer_attention import schema as multi_region_numerator_integer_attention
from tqdit.plugins.multi_region_softmax import schema as multi_region_softmax
from tqdit.plugins.time_group_select import schema as time_group_select
from tqdit.quantization.fake_quant import find_module
from tqdit.quantization.table import ScaleTable
from tqdit.sampling.schedule import SamplingSpec

SCHEMAS = (
    multi_region_attention, multi_region_integer_attention, multi_region_numerator, multi_region_numerator_attention,
    multi_region_numerator_integer_attention, multi_region_softmax, time_group_select,
)  # fmt: skip


def exported_sites(table: ScaleTable, form: AttentionForm) -> ScaleTable:
    """The part of a table that an export holds: with float attention, without the sites of its products.

    `tqdit.quantization.fake_quant.apply` of this table is what the export computes.
    """
    if form != "float":
        return table
    return replace(table, sites=tuple(site for site in table.sites if site.role not in ("left", "right")))


def describe(
    products: Iterable[Product], table: ScaleTable, form: AttentionForm, sampling: SamplingSpec
) -> QuantizationCard:
    """What `quantize` makes of a network with these products and a table whose scales were found for `sampling`."""
    exported = exported_sites(table, form)
    forms: dict[str, ProductForm] = {product.name: "float" for product in products}
    for module, sites in exported.by_module.items():
        if "left" in sites:
            forms[module] = "integer" if form == "integer" else "simulated"
        elif "weight" in sites:
            forms[module] = "integer" if "input" in sites else "weight-only"
    return QuantizationCard(
        weight_bits=min((site.quantizer.bits for site in exported.sites if site.role == "weight"), default=32),
        activation_bits=min((site.quantizer.bits for site in exported.sites if site.role != "weight"), default=32),
        boundaries=tuple(float(boundary) for boundary in table.boundaries),
        attention=form if any(site.role == "left" for site in exported.sites) else "float",
        products=forms,
        sampling=sampling,
    )


def quantize(graph: ir.Model, model: LoadedModel, table: ScaleTable, form: AttentionForm) -> None:
    """Requires: a float trace of the model's network or of a step around it; a table without divisors (`fold`).

    Ensures: every site of `exported_sites(table, form)` is quantized; bodies of the custom ops in use are in the graph;
    nothing unused is left.
    """
    assert all(site.divisor is None for site in table.sites)
    table = exported_sites(table, form)
    check_sites(model.network, table)
    groups = GroupSelector(network_timestep(graph, model.signature.time), table.boundaries)
    quantize_linears(graph, model.network, table, groups, model.weights)
    quantize_attention(graph, model.network, table, groups, form)
    RemoveUnusedNodesPass()(graph)
    add_bodies(graph)


def check_sites(network: nn.Module, table: ScaleTable) -> None:
    """Refuse a table that names what the network lacks, or only a part of what a product needs."""
    for name, sites in table.by_module.items():
        module = find_module(network, name)
        needed = {"left", "right"} if isinstance(module, Scores | ValueProduct) else {"weight"}
        known = needed | {"input"} if needed == {"weight"} else needed
        if not needed <= set(sites) <= known:
            raise UsageError(
                f"the scale table quantizes {', '.join(sorted(sites))} of '{name}'; an export needs "
                f"{' and '.join(sorted(needed))} there. Calibrate again."
            )


def add_bodies(model: ir.Model) -> None:
    """Give the model the function body of every custom op that it uses."""
    opset = model.graph.opset_imports[""]
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for schema in SCHEMAS:
        if schema.OP_TYPE in used:
            function = ir.serde.deserialize_function(schema.body(opset))
            model.functions[function.identifier()] = function
    if used:
        model.graph.opset_imports[DOMAIN] = VERSION
