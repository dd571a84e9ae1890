"""A network that PyTorch cannot trace: the error names the check and the place; a class that nobody tried costs a child
process at most."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tqdit
from support import wait_until
from tqdit.cli.main import run
from tqdit.errors import UsageError
from tqdit.exporter.trace import trace, trace_any_rows
from tqdit.exporter.watch import PLACE, UntraceableError, export_in_child
from tqdit.models.load import load_model
from tqdit.models.quirks import cogvideox, lumina2
from tqdit.models.recorded import PROVEN
from tqdit.onnx_file import read_card

INPUTS = {"x": torch.ones(3, 4)}


class Part(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Network(nn.Sequential):
    def forward(self, *ports):
        return super().forward(*ports)


def network(function):
    return Network(nn.Linear(4, 4), nn.Sequential(Part(function)), nn.Linear(4, 4))


def test_a_refusal_names_the_check_and_the_module():
    with pytest.raises(UsageError, match=r"torch\.export, module '1\.0', says: .*data-dependent"):
        trace_any_rows(network(lambda x: x * 2 if x.sum() > 0 else x), INPUTS, "y", 20)


@pytest.mark.slow
def test_a_refusal_of_the_onnx_exporter_names_the_node():
    with pytest.raises(UntraceableError, match=r"torch\.onnx, node %lgamma \(\S*lgamma\S*\), says: "):
        trace(network(torch.lgamma), INPUTS, "y")


@pytest.mark.slow
def test_a_child_writes_down_where_its_trace_is(tmp_path, monkeypatch):
    seen, place = [], tmp_path / "place"
    monkeypatch.setenv(PLACE, str(place))
    trace(network(lambda x: (seen.append(place.read_text()), x)[1]), INPUTS, "y")
    assert seen == ["torch.export, module '1.0',"]
    assert place.read_text() == "torch.onnx"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*")
def test_the_classes_that_need_no_child_are_those_of_the_zoo():
    from zoo.pipelines import FAMILIES

    assert {type(make()[0].transformer).__name__ for make in FAMILIES.values()} == set(PROVEN)
    assert {name for name in (*lumina2.CLASSES, *cogvideox.CLASSES) if name in PROVEN}


# What `python` of a child does to the class: it stands in for a network that the exporter cannot take.
SABOTAGE = """
import os, signal, time
import torch
from diffusers.models.transformers import transformer_prx

forward = transformer_prx.PRXBlock.forward

def sabotaged(self, *args, **kwargs):
    if torch.compiler.is_exporting():
        {action}
    return forward(self, *args, **kwargs)

transformer_prx.PRXBlock.forward = sabotaged
"""


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """A folder with a network of a class that the zoo does not have, and its scales."""
    import diffusers

    folder = tmp_path_factory.mktemp("unknown")
    torch.manual_seed(0)
    network = diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=24, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[8, 8]
    ).eval()
    assert "PRXTransformer2DModel" not in PROVEN
    network.save_pretrained(folder / "network")
    with torch.no_grad(), tqdit.record(network) as calls:
        network(torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.randn(2, 6, 24))
    knobs = {"preset": "min-max", "groups": 1, "rows_per_group": 2, "token_share": 1.0}
    tqdit.calibrate(folder / "network", rows=calls, output=folder / "scales.safetensors", **knobs)
    return folder


def export(folder, output, *more):
    return run("export", ["-q", str(output), "--scales", str(folder / "scales.safetensors"), *more])


@pytest.mark.slow
def test_a_class_that_nobody_tried_is_exported_by_a_child(unknown, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "torch.onnx", None)  # this process could not
    assert export(unknown, tmp_path / "model.onnx") == 0
    assert capfd.readouterr().out == f"{tmp_path / 'model.onnx'}\n"
    assert read_card(tmp_path / "model.onnx").signature.family == "PRXTransformer2DModel"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "minutes", "found"),
    [
        pytest.param(
            "os.kill(os.getpid(), signal.SIGSEGV)", "9",
            "PRXTransformer2DModel was ended by signal 11 (SIGSEGV) in torch.export, module 'network.blocks.0'. ",
            marks=pytest.mark.full,
        ),
        ("time.sleep(600)", "0.05", "took longer than 0.05 minutes (--trace-minutes) in "),  # where: as far as it came
    ],
    ids=["crash", "endless"],
)  # fmt: skip
def test_the_end_of_a_child_is_one_line(unknown, tmp_path, monkeypatch, capfd, action, minutes, found):
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE.format(action=action))
    source = str(Path(tqdit.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), source]))
    assert export(unknown, tmp_path / "model.onnx", "--trace-minutes", minutes) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert found in lines[0]
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.slow
def test_a_child_s_own_refusal_is_all_that_is_said(unknown, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tqdit.exporter.watch.export_in_child", lambda *_: 2)
    with pytest.raises(SystemExit) as ended:
        export(unknown, tmp_path / "model.onnx")
    assert ended.value.code == 2
    assert "".join(capsys.readouterr()) == ""


@pytest.mark.slow
def test_a_child_that_fails_before_the_trace_says_so_itself(tmp_path, capfd):
    assert export_in_child(["model.txt"], "Toy", 1.0) == 2
    assert "ends in .onnx" in capfd.readouterr().err


@pytest.mark.slow
def test_a_child_that_a_library_ends_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UsageError, match="the trace of Toy ended with code 7 in loading the network"):
        export_in_child(["model.onnx"], "Toy", 1.0)


@pytest.mark.slow
def test_a_child_ends_with_its_parent(tmp_path):
    """Also if the parent is killed, and cannot end it."""
    sleeping = "import os, time; open('pid', 'w').write(str(os.getpid())); "
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nif 'TQDIT_TRACE_PLACE' in os.environ:\n"
        f"    from tqdit.exporter.watch import end_with_parent\n    end_with_parent()\n    {sleeping}time.sleep(600)\n"
    )
    code = "from tqdit.exporter.watch import export_in_child; export_in_child(['x.onnx'], 'Toy', 5.0)"
    paths = os.pathsep.join([str(tmp_path), str(Path(tqdit.__file__).parents[1])])
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, cwd=tmp_path)
    file = tmp_path / "pid"
    wait_until(lambda: file.is_file() and file.read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: not Path("/proc", file.read_text(), "exe").exists())


@pytest.mark.slow
def test_the_python_api_traces_in_its_own_process(unknown, tmp_path, monkeypatch):
    from tqdit.quantization.table import read_scale_table

    class HereError(Exception):
        pass

    def here(*_):
        raise HereError

    monkeypatch.setattr("tqdit.exporter.graph.trace_graph", here)
    table = read_scale_table(unknown / "scales.safetensors")
    with pytest.raises(HereError):
        tqdit.export(load_model(unknown / "network", interface=table.interface), tmp_path / "model.onnx", scales=table)
