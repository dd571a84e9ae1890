"""The lint as a whole: order, backends, speed, and the command."""

import time

import onnx
import onnx_ir as ir
import pytest

from lint_graphs import CONSTANTS, FUNCTION, QUANTIZED, graph, weight
from support import exported
from tqdit.cli import main as cli
from tqdit.errors import FileFormatError, UsageError
from tqdit.lint import BACKENDS, lint, program

BAD = "[float] f = QuantizeLinear(w, ws, zero)" + QUANTIZED.replace("(w, ws)", "(f, ws)").replace("(x, s", "(x, r")
RUNNING = {"inputs": "float[2, 64] x, float r"}


def bad():
    import numpy as np

    return graph(BAD, weights=(weight("w", (64, 32), np.float32),), **RUNNING)


def test_errors_come_first_and_the_order_never_changes():
    findings = lint(bad())
    assert [finding.severity for finding in findings] == ["error", "warning"]
    assert lint(bad()) == findings


def test_the_model_is_left_as_it_was():
    model = bad()
    before = model.SerializeToString(deterministic=True)
    lint(model)
    assert model.SerializeToString(deterministic=True) == before


def test_a_graph_that_onnx_does_not_allow_is_refused_in_one_line(tmp_path, capsys):
    model = bad()
    model.graph.node[1].output[0] = model.graph.node[0].output[0]  # two nodes write one value
    with pytest.raises(FileFormatError, match="the ONNX graph is damaged"):
        lint(model)
    onnx.save(model, tmp_path / "m.onnx")
    assert cli.run("inspect", ["--lint", str(tmp_path / "m.onnx")]) == 1
    err = capsys.readouterr().err
    assert "m.onnx: the ONNX graph is damaged" in err
    assert err.count("\n") == 1


def test_a_node_that_makes_no_sense_leaves_the_other_findings():
    model = bad()
    nonsense = onnx.helper.make_node("Reshape", ["x"], ["nothing"], name="odd", axis="text")
    model.graph.node.insert(0, nonsense)
    assert [finding.node for finding in lint(model)] == ["q", "float"]


def test_an_unknown_backend_is_a_usage_error():
    with pytest.raises(UsageError, match="unknown backend 'cuda'; the lint knows onnxruntime, openvino"):
        lint(bad(), "cuda")


def test_what_we_export_in_float_has_no_findings():
    model, _ = exported()
    assert lint(ir.to_proto(model)) == ()


@pytest.mark.slow
def test_five_thousand_nodes_take_a_second():
    chain = "".join(
        f"a{i} = QuantizeLinear(x{i}, s, zero) b{i} = DequantizeLinear(a{i}, s, zero) c{i} = DequantizeLinear(w, ws) "
        f"p{i} = MatMul(b{i}, c{i}) x{i + 1} = tqdit.twice(p{i})\n"
        for i in range(1000)
    )
    model = graph(chain.replace("x0", "x").replace("x1000", "y"), functions=FUNCTION, weights=(weight("w", (64, 64)),))
    start = time.process_time()
    assert lint(model, "tensorrt-rtx") == ()
    assert time.process_time() - start < 10  # 0.5 s alone; the time must not grow with the square


def test_functions_that_double_thirty_times_end(monkeypatch):
    monkeypatch.setattr(program, "MAX_NODES", 5000)
    levels = "".join(
        f'<domain: "tqdit", opset_import: ["" : 20, "tqdit" : 1]> f{i} (a) => (b) {{ c = tqdit.f{i + 1}(a) '
        f"b = tqdit.f{i + 1}(c) }}\n"
        for i in range(30)
    )
    last = FUNCTION.replace("twice", "f30")
    model = graph("y = tqdit.f0(x)", outputs="float[2, 64] y", functions=levels + last)
    assert len(lint(model, "tensorrt-rtx")) == 30


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_a_clean_graph_is_clean_for_every_backend(backend):
    assert lint(graph(QUANTIZED), backend) == ()


def test_the_command_prints_findings_then_a_count_and_fails(tmp_path, capsys):
    onnx.save(bad(), tmp_path / "m.onnx")
    assert cli.run("inspect", ["--lint", str(tmp_path / "m.onnx")]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("error: q: its scale 'r' is computed at run time.")
    assert lines[1].startswith("    remedy: Make the scale a constant")
    assert lines[-1] == "1 error, 1 warning"
    assert len(err.splitlines()) == 1


def test_the_command_succeeds_where_there_are_only_warnings(tmp_path, capsys):
    onnx.save(graph("y = tqdit.twice(x)", CONSTANTS, outputs="float[2, 64] y", functions=FUNCTION), tmp_path / "m.onnx")
    assert cli.run("inspect", ["--lint", str(tmp_path / "m.onnx")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 errors, 1 warning"


def test_the_command_refuses_what_is_no_onnx_file(tmp_path, capsys):
    (tmp_path / "m.onnx").write_bytes(b"\xff" * 100)
    assert cli.run("inspect", ["--lint", str(tmp_path / "m.onnx")]) == 1
    assert "not an ONNX file" in capsys.readouterr().err
    assert cli.run("inspect", ["--lint", str(tmp_path)]) == 2
