"""`tqdit-build --trtexec`: the file and the command for NVIDIA's own compiler, which is not here. TensorRT-RTX's parser
and builder, which take the same file, are.
"""

import os
import shlex
import subprocess

import numpy as np
import onnx
import pytest

import support
from tables import Kind, make_table
from tqdit.cli import main as cli
from tqdit.engines.backends.tensorrt.library import TENSORRT_RTX
from tqdit.engines.build.trtexec import write_trtexec
from tqdit.engines.config import BatchRange, BuildConfig
from tqdit.errors import OutputError
from tqdit.exporter.graph import ExportConfig
from tqdit.exporter.onnx_writer import write


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    write(path, *support.exported(ExportConfig(), table=make_table(support.tiny_model(), Kind(groups=10))))
    return path


def test_the_file_has_no_functions_and_the_types_that_tensorrt_gets(source, tmp_path):
    write_trtexec(source, tmp_path / "out")
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    found = {tensor.data_type for tensor in model.graph.initializer if np.prod(tensor.dims) > 64}
    assert onnx.TensorProto.FLOAT16 in found  # float parts
    assert onnx.TensorProto.INT8 in found
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["build.sh", "model.onnx"]


def test_the_script_runs_the_command_with_the_shapes_of_the_file(source, tmp_path, capsys):
    config = ["--batch", "1,2,4", "--workspace", "512", "--refit", "--optimization-level", "4"]
    assert cli.run("build", [str(source), "--trtexec", str(tmp_path / "out"), *config]) == 0
    script = tmp_path / "out" / "build.sh"
    assert capsys.readouterr().out.strip() == str(script)
    tool = tmp_path / "bin" / "trtexec"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n')
    tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([script, "--verbose"], capture_output=True, text=True, env=environment, check=True)
    place, *given = done.stdout.splitlines()
    assert place == str(tmp_path / "out")
    inputs = onnx.load(tmp_path / "out" / "model.onnx").graph.input
    for name, rows in (("min", 2), ("opt", 4), ("max", 8)):  # two rows an image
        shapes = [(each.name, [d.dim_value for d in each.type.tensor_type.shape.dim[1:]]) for each in inputs]
        wanted = ",".join(f"{port}:{'x'.join(map(str, (rows, *rest)))}" for port, rest in shapes)
        assert f"--{name}Shapes={wanted}" in given
    assert {"--onnx=model.onnx", "--saveEngine=model.plan", "--stronglyTyped", "--memPoolSize=workspace:512", "--refit",
            "--builderOptimizationLevel=4", "--verbose"} <= set(given)  # fmt: skip


def test_every_input_of_a_step_graph_has_its_shape(tmp_path):
    path = tmp_path / "step.onnx"
    write(path, *support.exported(ExportConfig(graph="step")))
    given = shlex.split(write_trtexec(path, tmp_path / "out", BuildConfig(batch=BatchRange(1, 4, 8))))
    inputs = onnx.load(tmp_path / "out" / "step.onnx").graph.input
    for name, rows in (("min", 1), ("opt", 4), ("max", 8)):
        (shapes,) = (each.partition("=")[2] for each in given if each.startswith(f"--{name}Shapes="))
        found = dict(each.split(":") for each in shapes.split(","))
        assert found.keys() == {each.name for each in inputs}
        assert {size.split("x")[0] for size in found.values()} == {str(rows)}


def test_float_files_are_written_in_the_float_type(source, tmp_path):
    write_trtexec(source, tmp_path / "out", BuildConfig(precision="fp16", batch=BatchRange(1, 1, 1)))
    model = onnx.load(tmp_path / "out" / "model.onnx")
    kinds = {node.op_type for node in model.graph.node}
    assert "MatMul" in kinds
    assert not kinds & {"QuantizeLinear", "DequantizeLinear"}


def test_what_is_of_others_stays(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        write_trtexec(source, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    write_trtexec(source, tmp_path / "out")
    (tmp_path / "out" / "model.plan").write_bytes(b"compiled")
    assert "trtexec" in shlex.split(write_trtexec(source, tmp_path / "out"))
    (tmp_path / "out" / "other.onnx").write_bytes(b"put there by somebody")
    with pytest.raises(OutputError, match=r"other\.onnx"):
        write_trtexec(source, tmp_path / "out")


@pytest.mark.parametrize("script", [None, "", "#!/bin/sh\nmake\n", '#!/bin/sh\n# written by tqdit-build: ["'])
def test_a_folder_with_the_file_itself_stays(source, tmp_path, script):
    exported = tmp_path / "model.onnx"
    exported.write_bytes(source.read_bytes())
    if script is not None:
        (tmp_path / "build.sh").write_text(script)
    with pytest.raises(OutputError, match="tqdit removes only what it wrote"):
        write_trtexec(exported, tmp_path)
    assert exported.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", ["my model.onnx", "modèle 'ß'.onnx", "-x $HOME.onnx"])
def test_any_name_reaches_trtexec_as_it_is(source, tmp_path, name):
    file = tmp_path / name
    file.write_bytes(source.read_bytes())
    for _ in range(2):  # the second replaces what the first wrote
        given = shlex.split(write_trtexec(file, tmp_path / "out"))
    assert given[1:3] == [f"--onnx={name}", f"--saveEngine={file.stem}.plan"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name, "build.sh"}
    assert subprocess.run(["sh", "-n", tmp_path / "out" / "build.sh"], check=False).returncode == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-o", "a.engine"], "-o"),
        (["--backend", "openvino"], "--backend openvino"),
        (["--target", "8.9"], "--target has no meaning for tensorrt"),
        (["--triton", "repository"], "--triton"),
        (["--exclude-lean-runtime"], "--exclude-lean-runtime goes with --version-compatible"),
        (["--refit", "--version-compatible"], "--refit does not go with --version-compatible"),
    ],
)
def test_what_does_not_go_with_it_is_refused(source, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert cli.run("build", [str(source), "--trtexec", "out", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.skipif(not TENSORRT_RTX.installed, reason="tensorrt_rtx is not installed")
def test_tensorrt_rtxs_parser_takes_the_file(source, tmp_path):
    import tensorrt_rtx as trt

    write_trtexec(source, tmp_path / "out")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(tmp_path / "out" / "model.onnx")), parser.get_error(0)
