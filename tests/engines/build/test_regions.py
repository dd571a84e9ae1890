"""Integer products of two regions as sums of saturating codes: the same values, without ops of ours."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import support
from tables import Kind, make_table, random_rows
from tqdit.engines.build import regions
from tqdit.engines.build.engine import build_engine
from tqdit.engines.build.regions import has_regions, sum_regions
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write
from tqdit.quantization.schemes.two_region_softmax import TwoRegionSoftmax
from tqdit.quantization.table import ScaleTable

pytestmark = pytest.mark.slow

KINDS = {
    "one group": Kind(),
    "10 groups": Kind(groups=10),
    "numerators": Kind(groups=10, numerators=True),
    "W6A6": Kind(6, 6, groups=10),
    "W6A6 numerators": Kind(6, 6, numerators=True),
}


def file_of(folder, kind, change=None, attention="integer"):
    """An export of the tiny model, whose softmaxes have every low scale that a calibration tries; and its rows."""
    model = support.tiny_model(pixels=True)
    table = make_table(model, kind)
    table = spread(table) if change is None else change(table)
    write(folder / "model.onnx", *support.exported(ExportConfig(attention=attention), pixels=True, table=table))
    return onnx.load(folder / "model.onnx"), random_rows(model.signature, 8)


def spread(table: ScaleTable, **changes) -> ScaleTable:
    """Low scales s2 2^-i of all i, over groups and modules; `changes` of each quantizer."""

    def low_scale(quantizer, number):
        powers = (np.arange(quantizer.low_scale.size) + 3 * number) % quantizer.bits
        return (quantizer.high_scale * 2.0**-powers).astype(np.float32).reshape(quantizer.low_scale.shape)

    softmaxes = [site for site in table.sites if isinstance(site.quantizer, TwoRegionSoftmax)]
    assert len(softmaxes) == 2
    changed = {
        id(site): replace(
            site, quantizer=replace(site.quantizer, **{"low_scale": low_scale(site.quantizer, number), **changes})
        )
        for number, site in enumerate(softmaxes)
    }
    return replace(table, sites=tuple(changed.get(id(site), site) for site in table.sites))


def run(model, rows):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, rows)[0]


@pytest.mark.parametrize("chains", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_values_stay(tmp_path, kind, chains):
    """Float rounding in other places (1e-7 of a probability) moves a code seldom: here none."""
    model, rows = file_of(tmp_path, KINDS[kind])
    assert has_regions(model)
    expected = run(model, rows)
    sum_regions(model, chains)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model, rows), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    types = [node.op_type for node in model.graph.node]
    assert not {"MultiRegionSoftmax", "MultiRegionNumerator", "LessOrEqual", "Where"} & {*types}
    assert types.count("Softmax") == 2


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_backends_that_multiply_bytes_build_it_whole(tmp_path, backend):
    """Nothing of two regions is left but their products, which are integer; the file itself stays as it was."""
    file_of(tmp_path, KINDS["numerators"])
    before = (tmp_path / "model.onnx").read_bytes()
    manifest = build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", backend)
    assert manifest.audit.fallen_back == ()
    assert manifest.audit.simulated == 0
    assert (tmp_path / "model.onnx").read_bytes() == before
    graph = (tmp_path / "model.engine" / manifest.entry).read_bytes()
    assert b"LessOrEqual" in before
    assert b"LessOrEqual" not in graph
    assert b"LessEqual" not in graph


@pytest.mark.parametrize(
    "change",
    [
        lambda table: spread(table, low_scale=np.array(0.003, np.float32)),  # no power of two below the high scale
        lambda table: spread(  # the paper's, which clips its top code
            table, high_scale=np.array(1 / 128, np.float32), low_scale=np.array(1 / 256, np.float32)
        ),
    ],
)
def test_scales_on_no_common_grid_keep_their_form(tmp_path, change):
    model, _ = file_of(tmp_path, KINDS["one group"], change)
    before = model.SerializeToString(deterministic=True)
    sum_regions(model)
    assert model.SerializeToString(deterministic=True) == before


def test_a_file_without_such_products_has_nothing_to_sum(tmp_path):
    model, _ = file_of(tmp_path, KINDS["10 groups"], attention="simulated")
    assert not has_regions(model)


def test_the_sum_is_the_value_of_two_regions():
    """All probabilities on a fine grid, and both sides of each boundary, at 8 bits with each low scale."""
    high = np.float32(1 / 127)
    for power in range(8):
        low = np.float32(high * 2.0**-power)
        joint = regions._joint(np.array([low * np.float32(127.5)], np.float32), 8, high)
        assert joint == 128 * low
        edges = np.concatenate([low * (np.arange(129) + 0.5), high * (np.arange(127) + 0.5)]).astype(np.float32)
        near = [edges * np.float32(1 - 1e-5), edges * np.float32(1 + 1e-5)]
        p = np.clip(np.concatenate([np.linspace(0, 1, 100_002, dtype=np.float32), *near]), 0, 1)
        summed = low * np.round(np.minimum(p, joint) / low) + high * np.maximum(np.round((p - joint) / high), 0)
        code = np.round(p / low)
        expected = np.where(code <= 127, low * code, high * np.round(p / high))
        np.testing.assert_allclose(summed, expected, rtol=0, atol=2e-7)
