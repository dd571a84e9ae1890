"""What `tqdit-doctor` says. No GPU is here: the driver is tests/fake_gpu.py, and engines are proved on the CPU."""

import ctypes
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import kernel_device
from fake_gpu import FakeCuda
from tqdit.cli import main as cli
from tqdit.engines import cuda, doctor
from tqdit.engines.build import proof
from tqdit.errors import BackendError
from tqdit.plugins import aot
from tqdit.plugins.multi_region_attention import launch as attention
from tqdit.plugins.multi_region_integer_attention import launch as integer_attention

CPU_BACKENDS = {"onnxruntime", "openvino"}


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(cuda, "core", lambda: fake)
    monkeypatch.setattr(cuda, "driver", lambda: fake)
    return fake


@pytest.fixture
def kernels(gpu, monkeypatch):
    """Every case's kernel as a function that checks its inputs and writes the right result; changed by `spoil`."""
    cases = list(proof.kernel_cases())
    names = {}

    def compiled(kernel, capability):
        name = names.setdefault(kernel, f"{kernel.function}_{len(names)}")
        return aot.CompiledKernel(name, f".visible .entry {name}(", 32 * kernel.num_warps, 1024, capability)

    def run(case):
        def kernel(*values):
            count, scalars = len(case.inputs), len(case.launch.scalars)
            for address, array in zip(values, case.inputs, strict=False):
                assert np.array_equal(at(address, array), array)
            assert values[count : count + scalars] == tuple(case.launch.scalars)
            for address, array in zip(values[count + scalars :], case.expected, strict=True):
                at(address, array)[...] = array * gpu.spoil.get(case.what, 1)

        return kernel

    monkeypatch.setattr(aot, "compile_kernel", compiled)
    gpu.spoil = {}
    gpu.kernels = {compiled(case.kernel, (8, 9)).name: run(case) for case in cases}
    return cases


def at(address, like):
    raw = (ctypes.c_byte * like.nbytes).from_address(address)
    return np.frombuffer(raw, like.dtype).reshape(like.shape)


def test_every_plugin_is_run_in_every_tactic(gpu, kernels):
    checks = list(proof.prove_kernels())
    assert {check.outcome for check in checks} == {"ok"}, checks
    whats = [check.what for check in checks]
    assert len(set(whats)) == len(whats)
    tactics = sum(len(attention.candidates("fp16", proof.HEAD, tokens)) for tokens in (proof.SHORT, proof.LONG))
    assert len([what for what in whats if what.startswith("MultiRegionAttention")]) == tactics
    integer = sum(len(integer_attention.candidates(proof.HEAD, tokens)) for tokens in (proof.SHORT, proof.LONG))
    assert len(whats) == 3 + 2 * tactics + 2 * integer
    assert gpu.memory == {}
    assert gpu.streams == set()


@pytest.mark.slow
def test_the_kernels_are_within_the_limit():
    """In Triton's interpreter, or on a GPU if there is one; the first tactic of each."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 and Arm only")
    types = {"float16": "fp16", "float32": "fp32", "int8": "i8"}
    for case in proof.kernel_cases():
        if "tactic" in case.what and not case.what.endswith("tactic 1"):
            continue
        outputs = [(each.shape, types[each.dtype.name]) for each in case.expected]
        inputs = tuple(kernel_device.tensor(each) for each in case.inputs)
        found = kernel_device.launched_with(case.kernel, case.launch, inputs, outputs)
        for one, expected in zip(found, case.expected, strict=True):
            assert proof._error(one, expected) < proof.KERNEL_LIMIT / 3, case.what


@pytest.mark.gpu
@pytest.mark.skipif(kernel_device.DEVICE == "cpu", reason="needs a CUDA GPU")
def test_this_gpu_runs_every_kernel():
    checks = list(proof.prove_kernels())
    assert {check.outcome for check in checks} == {"ok"}, checks


def test_the_driver_has_the_functions_of_its_stand_in():
    real = pytest.importorskip("cuda.bindings.driver", reason="needs the extra cuda")
    used = [name for name in vars(FakeCuda) if name.startswith("cu")]
    assert len(used) > 8
    assert [name for name in used if not hasattr(real, name)] == []


def test_a_kernel_that_computes_something_else_fails_by_name(gpu, kernels):
    gpu.spoil["MultiRegionAttention, 300 tokens, tactic 2"] = 1.1
    (failed,) = [check for check in proof.prove_kernels() if check.outcome != "ok"]
    assert failed.what == "MultiRegionAttention, 300 tokens, tactic 2"
    assert "error against the reference 9.9e-03" in failed.detail


def test_a_kernel_that_does_not_load_fails_and_the_others_run(gpu, kernels):
    del gpu.kernels[next(iter(gpu.kernels))]
    checks = list(proof.prove_kernels())
    assert [check.outcome for check in checks].count("failed") == 1
    assert "cuModuleGetFunction failed" in checks[0].detail
    gpu.fails["cuLaunchKernel"] = "CUDA_ERROR_INVALID_VALUE"
    assert {check.outcome for check in proof.prove_kernels()} == {"failed"}
    assert gpu.memory == {}


def test_without_a_gpu_no_kernel_is_run(monkeypatch):
    monkeypatch.setattr(cuda, "find_device", lambda *_: (_ for _ in ()).throw(BackendError("no usable NVIDIA GPU")))
    (check,) = proof.prove_kernels()
    assert (check.outcome, check.detail) == ("not run", "no usable NVIDIA GPU")


def test_a_machine_with_gpus_is_described(gpu):
    report = doctor.examine()
    assert (report.driver.cuda, report.driver.ptx) == ("12.8", "8.7")
    assert [(one.index, one.name, one.multiprocessors) for one in report.gpus] == [
        (0, "NVIDIA L4", 58), (1, "NVIDIA GeForce RTX 4090", 128),
    ]  # fmt: skip
    assert report.backends["tensorrt"].install.endswith("12") or "cu12" in report.backends["tensorrt"].install


@pytest.mark.parametrize(
    ("release", "version"), [((11, 8), 78), ((12, 0), 80), ((12, 4), 84), ((12, 8), 87), ((13, 0), 90), ((13, 1), 91)]
)
def test_the_ptx_that_a_driver_reads(release, version):
    assert doctor.newest_ptx(release) == version


def advice(monkeypatch, driver, packages=(), distributions=(), capability="8.9"):
    monkeypatch.setattr(doctor, "_distributions", lambda: set(distributions))
    gpus = (doctor.Gpu(0, "a GPU", capability, 10, 10**9),)
    return " ".join(doctor.advise(dict.fromkeys(packages, "1"), driver, gpus))


def test_versions_that_do_not_fit_are_said(monkeypatch):
    old, new = doctor.Driver("12.4", "8.4"), doctor.Driver("13.0", "9.0")
    assert "driver serves CUDA 12.4" in advice(monkeypatch, old, distributions=["tensorrt_cu13_libs"])
    assert "driver serves" not in advice(monkeypatch, new, distributions=["tensorrt_cu13_libs"])
    assert "driver serves" not in advice(monkeypatch, old, distributions=["tensorrt_rtx_cu12"])
    assert "reads PTX 8.4" in advice(monkeypatch, old, capability="12.0")
    assert "reads PTX" not in advice(monkeypatch, old, capability="9.0")
    assert "--precision fp8 or bf16" in advice(monkeypatch, new, capability="10.3")
    assert "overwrite each other" in advice(monkeypatch, new, packages=["onnxruntime", "onnxruntime-gpu"])


def test_a_report_holds_no_path(monkeypatch):
    assert doctor.clean("x: /home/me/secret place/model.onnx, ~/b/c") == "x: .../secret place/model.onnx, .../c"
    monkeypatch.setattr(cuda, "driver", lambda: (_ for _ in ()).throw(OSError(f"{Path.home()}/lib/libcuda.so: bad")))
    text = repr(doctor.examine())
    assert ".../libcuda.so" in text
    for secret in (str(Path.home() / "lib"), sys.prefix, str(Path.cwd())):
        assert secret not in text


def test_the_command_writes_a_report_for_an_issue(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cuda, "driver", lambda: (_ for _ in ()).throw(OSError("no driver")))
    assert cli.run("doctor", ["--report", str(tmp_path / "doctor.json")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == str(tmp_path / "doctor.json")
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["packages"]["numpy"] == metadata.version("numpy")
    assert report["driver"]["missing"] == "no driver"
    assert {name for name, state in report["backends"].items() if state["runs"]} == CPU_BACKENDS
    assert not report["backends"]["tensorrt"]["builds"]
    assert report["backends"]["tensorrt"]["install"].startswith("pip install")


def test_a_machine_on_which_nothing_runs_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_is_installed", lambda _: False)
    assert cli.run("doctor", []) == 1
    out, error = capsys.readouterr()
    assert all(f"{name}" in out for name in CPU_BACKENDS)
    assert "no engine can run here" in error
    assert "pip install" in error


@pytest.mark.slow
def test_it_needs_neither_torch_nor_onnx(tmp_path):
    """And says what building lacks."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'onnx', 'onnx_ir', 'diffusers', 'safetensors', 'triton'));"
        "from tqdit.engines import doctor;"
        "doctor._is_installed = lambda m: m in ('onnxruntime', 'tqdit.engines.build');"
        "from tqdit.cli.main import run; sys.exit(run('doctor', ['--prove']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("onnxruntime ")]
    assert "runs" in line
    assert "builds" not in line
    assert "onnx, onnx_ir" in line


@pytest.mark.slow
def test_an_engine_is_built_verified_and_compared(quantized, gpu, monkeypatch):
    """On the CPU, with the functions that a GPU's engines go through."""
    checks = list(proof.prove_engine(quantized, "openvino"))
    assert [check.outcome for check in checks] == ["ok", "ok"], checks
    assert "14 int8" in checks[0].detail
    assert "difference from ONNX Runtime" in checks[1].detail
    monkeypatch.setattr(proof, "PICTURE_LIMIT", -1.0)
    built, compared = proof.prove_engine(quantized, "openvino")
    assert (built.outcome, compared.outcome) == ("ok", "failed")
    assert str(Path.cwd()) not in compared.detail


@pytest.mark.slow
def test_onnxruntime_is_not_compared_with_itself(quantized):
    built, compared = proof.prove_engine(quantized, "onnxruntime")
    assert (built.outcome, compared.outcome) == ("ok", "ok")
    assert "difference" not in compared.detail


@pytest.mark.slow
def test_a_backend_that_cannot_build_is_one_failed_step(quantized, monkeypatch):
    monkeypatch.setattr(cuda, "find_device", lambda *_: (_ for _ in ()).throw(BackendError("no usable NVIDIA GPU")))
    (check,) = proof.prove_engine(quantized, "tensorrt")
    assert check.outcome == "failed"
    assert "tensorrt" in check.detail


def test_a_failed_step_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(proof, "prove_kernels", lambda _: iter([doctor.Check("a kernel", "failed", "wrong")]))
    assert cli.run("doctor", ["--prove"]) == 1
    out, error = capsys.readouterr()
    assert "failed   a kernel: wrong" in out
    assert "1 of 2 steps" in error
    assert cli.run("doctor", ["model.onnx"]) == 2
    assert cli.run("doctor", ["--prove", "nowhere.onnx"]) == 2
