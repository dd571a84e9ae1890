"""The exported graph, with optimisations off, equals the fake-quantized PyTorch model.

Tolerance. Both do the same float32 operations on the same integer codes in the same order. What may differ is the last
bit of a softmax, a GELU, a LayerNorm or of a sum inside a product; where that decides a rounding tie, the image in
question gets one neighbouring code. So out of 48 images at most 5 may differ, by at most 3 % (relative L2; a flip moves
an element by one step, and the steps of these tiny random models are coarse), and all others agree to 1e-5 of the
largest output. Measured: 0 to 2 images with a flip, the others bit for bit or to 2e-7.
"""

import re

import numpy as np
import onnx
import onnx.inliner
import onnx.numpy_helper
import onnxruntime as ort
import pytest

import support
from tables import Kind, make_table, random_rows
from tqdit.engines.backends.onnxruntime.library import session_options
from tqdit.errors import UsageError
from tqdit.exporter.graph import ExportConfig, export_graph, finish_graph, trace_graph
from tqdit.exporter.onnx_writer import write
from tqdit.exporter.passes.quantize import exported_sites
from tqdit.onnx_file import read_card
from tqdit.quantization.fake_quant import apply, weight_codes
from tqdit.quantization.granularity import PerTensor
from tqdit.quantization.schemes.symmetric import Symmetric
from tqdit.quantization.table import ScaleTable, Site

KINDS = {
    "W8A8": Kind(),
    "W8A8 asymmetric": Kind(asymmetric=True),
    "W8A8 10 softmax groups": Kind(groups=10),
    "W8A8 numerators, 10 groups": Kind(groups=10, numerators=True),
    "W8A8 10 groups everywhere, asymmetric": Kind(groups=10, everywhere=True, asymmetric=True),
    "W6A6 10 groups everywhere": Kind(6, 6, groups=10, everywhere=True),
    "W6A6 asymmetric": Kind(6, 6, asymmetric=True),
    "W4A8 10 softmax groups": Kind(4, 8, groups=10),
    "W6A6 equalised, asymmetric": Kind(6, 6, asymmetric=True, groups=10, everywhere=True, equalised=True),
    "W8A8 dynamic": Kind(dynamic=True, conditioning_inputs=True),
    "W8A6 dynamic, asymmetric": Kind(8, 6, dynamic=True, asymmetric=True, conditioning_inputs=True),
    "W4A6 dynamic, 10 softmax groups": Kind(4, 6, dynamic=True, groups=10),
    "W8 bits per group": Kind(groups=10, everywhere=True, group_bits=True),
    "W6 bits per group, asymmetric": Kind(
        6, groups=10, everywhere=True, group_bits=True, asymmetric=True, equalised=True
    ),
    "W8 bits of one group": Kind(group_bits=True, asymmetric=True),
    "W4A8 everything": Kind(4, 8, asymmetric=True, groups=10, everywhere=True, conditioning_inputs=True),
}
FORMS = ["simulated", "integer", "float"]
RNG = np.random.default_rng(0)


def session(path, optimise=False):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


PARTS = ("W8A8 numerators, 10 groups", "W8A6 dynamic, asymmetric", "W4A8 everything")  # each part of a kind once


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "origin", "form"), support.few(
    [
        *((kind, "published", form) for kind in KINDS for form in FORMS),
        *((kind, "diffusers", form) for kind in PARTS for form in FORMS),
    ],
    *((kind, "published", "integer") for kind in KINDS),
    *((kind, "published", form) for kind in PARTS for form in FORMS),
    *((kind, "diffusers", "integer") for kind in PARTS),
))  # fmt: skip
def test_the_denoiser_equals_the_fake_quantized_model(tmp_path, kind, origin, form):
    model, kind = support.tiny_model(origin), KINDS[kind]
    table = make_table(model, kind)
    path = tmp_path / "model.onnx"
    write(path, *support.exported(ExportConfig(graph="denoiser", attention=form), origin, table=table))
    onnx.checker.check_model(str(path), full_check=True)
    inputs = random_rows(model.signature, 48, last=999)  # rows in every group of timesteps
    (out,) = session(path).run(None, inputs)
    expected, unquantized = apply(model, exported_sites(table, form))(inputs), model(inputs)
    support.assert_agrees(out, expected, kind.activation_bits)
    assert np.linalg.norm(expected - unquantized) > 1e-3 * np.linalg.norm(expected)  # it is quantized at all


@pytest.mark.slow
@pytest.mark.parametrize(("origin", "sampler", "guided"), support.few(
    [("published", "ddpm", True), ("published", "ddim", False), ("diffusers", "ddim", True)],
    ("published", "ddpm", True), ("published", "ddim", False),
))  # fmt: skip
def test_a_step_with_rows_at_different_steps_takes_each_rows_own_group(tmp_path, origin, sampler, guided):
    model = support.tiny_model(origin)
    table = make_table(model, KINDS["W8A8 10 groups everywhere, asymmetric"])
    path = tmp_path / "model.onnx"
    config = ExportConfig("step", sampler=sampler, guided=guided, attention="float")
    _, card = graph = support.exported(config, origin, table=table)
    write(path, *graph)
    rows = 20
    step = np.arange(20)[::-1].copy()
    inputs = {
        "x": RNG.standard_normal((rows, 4, 8, 8), np.float32),
        "step": step,
        "class_labels": RNG.integers(0, 6, rows),
        "noise": RNG.standard_normal((rows, 4, 8, 8), np.float32),
    }
    if guided:
        inputs["guidance_scale"] = RNG.uniform(0, 4, rows).astype(np.float32)
    (out,) = session(path).run(None, inputs)
    quantized = apply(model, exported_sites(table, "float"))
    expected = []
    for row in range(rows):
        one = {name: values[row : row + 1] for name, values in inputs.items()}
        expected.append(support.reference_step(
            quantized, card.sampling, one["x"].astype(np.float64), int(step[row]), one["class_labels"],
            float(one["guidance_scale"][0]) if guided else None, one["noise"],
        ))  # fmt: skip
    support.assert_agrees(out, np.concatenate(expected))


def test_a_boundary_timestep_uses_the_later_scale(tmp_path):
    """Groups end at multiples of 100: timesteps 99 and 100 take different scales, 100 and 101 the same."""
    model = support.tiny_model()
    table = make_table(model, Kind(groups=10, everywhere=True))
    path = tmp_path / "model.onnx"
    write(path, *support.exported(ExportConfig(graph="denoiser", attention="float"), table=table))
    selects = [node for node in onnx.load(path).graph.node if node.op_type == "TimeGroupSelect"]
    assert selects
    x = np.repeat(RNG.standard_normal((1, 4, 8, 8), np.float32), 3, axis=0)
    inputs = {"x": x, "timestep": np.array([99, 100, 101]), "class_labels": np.zeros(3, np.int64)}
    (out,) = session(path).run(None, inputs)
    expected = apply(model, exported_sites(table, "float"))(inputs)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KINDS["W8A8"], KINDS["W4A8 10 softmax groups"]])
def test_weight_codes_are_the_tables_or_rounded_to_nearest(tmp_path, kind):
    model = support.tiny_model()
    table = make_table(model, kind)
    shifted = []
    for site in table.sites:  # one site with codes of its own
        if site.name == "blocks.0.mlp.fc1.weight":
            codes, _ = weight_codes(model.network.get_submodule(site.module).weight, site)
            stored = np.clip(codes.numpy() + 1, -(2 ** (kind.weight_bits - 1)), 2 ** (kind.weight_bits - 1) - 1)
            site = type(site)(site.module, site.role, site.quantizer, stored.astype(np.int8))
        shifted.append(site)
    table = ScaleTable(table.model, table.fingerprint, table.boundaries, tuple(shifted), 0, 1.5)
    path = tmp_path / "model.onnx"
    write(path, *support.exported(ExportConfig(graph="denoiser"), table=table))
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    checked = 0
    for site in table.sites:
        if site.role != "weight":
            continue
        assert isinstance(site.quantizer, Symmetric)
        codes = stored[f"{site.name}.codes"]
        assert codes.dtype == np.int8
        weight = model.network.get_submodule(site.module).weight.numpy()
        q = 2 ** (kind.weight_bits - 1)
        column = site.quantizer.scale.reshape(-1, *[1] * (weight.ndim - 1))
        expected = site.codes if site.codes is not None else np.clip(np.round(weight / column), -q, q - 1)
        np.testing.assert_array_equal(codes.T.reshape(weight.shape), expected)
        np.testing.assert_array_equal(stored[f"{site.name}.scale"], site.quantizer.scale)
        checked += 1
    assert checked == len({site.module for site in table.sites if site.role == "weight"})


def test_no_float_weight_survives_beside_its_integers(tmp_path):
    model = support.tiny_model()
    path = tmp_path / "model.onnx"
    write(path, *support.exported(ExportConfig(graph="denoiser"), table=make_table(model, Kind())))
    largest_float = max(
        (int(np.prod(t.dims)) for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.FLOAT
         and t.name not in ("pos_embed", "y_embedder.embedding_table.weight")), default=0,
    )  # fmt: skip
    assert largest_float <= 256  # biases, scales, timestep frequencies


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_inlining_the_bodies_changes_nothing(tmp_path, form):
    model = support.tiny_model()
    table = make_table(model, KINDS["W6A6 10 groups everywhere"])
    path = tmp_path / "model.onnx"
    write(path, *support.exported(ExportConfig("step", attention=form), table=table))
    inlined = onnx.inliner.inline_local_functions(onnx.load(path))
    assert not inlined.functions
    assert {node.domain for node in inlined.graph.node} == {""}
    onnx.save(inlined, tmp_path / "inlined.onnx")
    inputs = {"x": RNG.standard_normal((4, 4, 8, 8), np.float32), "step": np.array([0, 5, 11, 19]),
              "class_labels": np.arange(4), "guidance_scale": np.full(4, 2, np.float32),
              "noise": RNG.standard_normal((4, 4, 8, 8), np.float32)}  # fmt: skip
    np.testing.assert_array_equal(
        session(tmp_path / "inlined.onnx").run(None, inputs)[0], session(path).run(None, inputs)[0]
    )


@pytest.mark.slow
def test_two_exports_give_the_same_bytes(tmp_path):
    """Of a step graph, which holds a denoiser graph; one of the traces may be another process's."""
    model, config = support.tiny_model(), ExportConfig("step", attention="integer")
    table = make_table(model, KINDS["W4A8 everything"])
    write(tmp_path / "a.onnx", *support.exported(config, table=table))
    write(tmp_path / "b.onnx", *finish_graph(trace_graph(model, config, table), model, config, table))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_names_follow_the_module_tree_and_hold_nothing_of_this_machine(tmp_path):
    model = support.tiny_model()
    path = tmp_path / "model.onnx"
    write(path, *support.exported(table=make_table(model, Kind(groups=10))))
    graph = onnx.load(path).graph
    names = {node.name for node in graph.node}
    assert len(names) == len(graph.node)
    for expected in ("blocks.0.attn.qkv/QuantizeLinear", "blocks.1.mlp.fc2/MatMul_2", "final_layer.linear/MatMul",
                     "blocks.0.attn.softmax/MultiRegionSoftmax", "blocks.1.attn.softmax/TimeGroupSelect"):  # fmt: skip
        assert expected in names
    assert "blocks.0.attn.qkv.weight.codes" in {tensor.name for tensor in graph.initializer}
    assert b"/site-packages/" not in path.read_bytes()
    assert b".py" not in path.read_bytes()


@pytest.mark.slow
def test_the_card_says_what_was_quantized(tmp_path):
    model = support.tiny_model()
    path = tmp_path / "model.onnx"
    write(path, *support.exported(table=make_table(model, Kind(4, 8, groups=5))))
    card = read_card(path).quantization
    assert card is not None
    assert (card.weight_bits, card.activation_bits, card.attention) == (4, 8, "integer")
    assert card.boundaries == (200, 400, 600, 800)
    assert card.products["blocks.0.attn.qkv"] == "integer"
    assert card.products["blocks.0.attn.value_product"] == "integer"
    assert card.products["blocks.0.adaLN_modulation.1"] == "weight-only"


@pytest.mark.slow
def test_a_table_of_another_model_is_refused():
    table = make_table(support.tiny_model(seed=1), Kind())
    with pytest.raises(UsageError, match=r"calibrated for model 'tiny'.*Calibrate this model"):
        export_graph(support.tiny_model(seed=0), ExportConfig(), table)


@pytest.mark.parametrize(
    ("module", "role", "kept", "message"),
    [
        ("blocks.7.attn.qkv", "weight", None, "names 'blocks.7.attn.qkv', which the network lacks"),
        (
            "blocks.0.attn.scores",
            "left",
            "left",
            "quantizes left of 'blocks.0.attn.scores'; an export needs left and right",
        ),
        ("blocks.0.mlp.fc1", "input", "input", "quantizes input of 'blocks.0.mlp.fc1'; an export needs weight"),
    ],
)
def test_a_table_that_does_not_fit_the_network_is_refused(module, role, kept, message):
    table = make_table(support.tiny_model(), Kind())
    sites = [site for site in table.sites if site.module != module or site.role == kept]
    if kept is None:
        sites.append(Site(module, role, Symmetric(8, PerTensor(), np.float32(1).reshape(()))))
    broken = ScaleTable(table.model, table.fingerprint, table.boundaries, tuple(sites), 0, 1.5)
    with pytest.raises(UsageError, match=re.escape(message)):
        support.exported(table=broken)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["simulated", "integer"])
def test_all_optimisations_of_onnxruntime_compute_the_same(tmp_path, form):
    """With the session options of our engine (`session_options` says why), in which products run as integers."""
    model = support.tiny_model()
    path = tmp_path / "model.onnx"
    write(
        path,
        *support.exported(ExportConfig(graph="denoiser", attention=form), table=make_table(model, Kind(groups=10))),
    )
    inputs = random_rows(model.signature, 48, last=999)
    options, settings = session_options(ort)
    (out,) = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"], **settings).run(None, inputs)
    (expected,) = session(path).run(None, inputs)
    support.assert_agrees(out, expected)


@pytest.mark.slow
@pytest.mark.parametrize("opset", support.few([21, 23], 23))
def test_later_opsets_compute_the_same(tmp_path, opset):
    model = support.tiny_model()
    table = make_table(model, Kind(groups=10))
    outs = []
    inputs = random_rows(model.signature, 8)
    for version in (20, opset):
        path = tmp_path / f"{version}.onnx"
        write(path, *support.exported(ExportConfig("denoiser", opset=version), table=table))
        onnx.checker.check_model(str(path), full_check=True)
        assert {entry.version for entry in onnx.load(path).opset_import if not entry.domain} == {version}
        outs.append(session(path).run(None, inputs)[0])
    support.assert_agrees(*outs)
