"""`tqdit-build` and `tqdit-sample` as a user meets them, and what the runtime imports."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

import support
from tables import Kind
from tqdit.cli.main import run
from tqdit.engines.bundle import read_manifest, write_manifest
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.shards import read_shards
from tqdit.exporter.onnx_writer import write
from tqdit.ports import Port

HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "diffusers", "safetensors", "matplotlib")


def python(code, *args, **options):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, **options)


def test_importing_the_runtime_loads_no_torch_onnx_or_diffusers():
    code = f"import sys, tqdit.engines; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code).stdout.strip() == "[]"


@pytest.mark.slow
def test_a_whole_sampling_run_loads_no_torch_onnx_or_diffusers(bundle, tmp_path):
    code = (
        "import sys; from tqdit.cli.main import run\n"
        "code = run('sample', [sys.argv[1], '-n', '3', '-o', sys.argv[2], '-q'])\n"
        f"print(code, [m for m in {HEAVY} if m in sys.modules])"
    )
    result = python(code, bundle, tmp_path / "s.png")
    assert result.stdout.splitlines() == [str(tmp_path / "s.png"), "0 []"]
    assert result.stderr == ""


@pytest.mark.slow
def test_build_then_sample_by_command(tmp_path, capsys, monkeypatch):
    """The default names chain: model.onnx -> model.engine -> samples.png, with no arguments."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "model.onnx", *support.exported(pixels=True))
    assert run("build", []) == 0
    assert run("sample", []) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["model.engine", "samples.png"]
    assert "16 images in" in err
    assert "per image" in err
    assert "per step" in err
    assert support.read_picture("samples.png").shape == (4 * 64 + 6, 4 * 64 + 6, 3)


def test_classes_are_cycled_and_images_counted_in_all(bundle, tmp_path, capsys):
    output = tmp_path / "s.npz"
    assert run("sample", [str(bundle), "-n", "5", "--classes", "3,1", "--batch", "2", "-o", str(output)]) == 0
    with np.load(output) as content:
        assert content["arr_0"].shape == (5, 8, 8, 3)
        assert content["arr_1"].tolist() == [3, 1, 3, 1, 3]


def test_steps_and_sampler_are_chosen_by_flags(bundle, tmp_path):
    arguments = ["-n", "3", "--steps", "7", "--sampler", "ddim", "--seed", "4"]
    assert run("sample", [str(bundle), *arguments, "-o", str(tmp_path / "s.npz")]) == 0
    assert run("sample", [str(bundle), *arguments, "-o", str(tmp_path / "folder")]) == 0
    with Sampler.open(bundle) as sampler, np.load(tmp_path / "s.npz") as content:
        np.testing.assert_array_equal(content["arr_0"], sampler.sample([0, 1, 2], seed=4, steps=7, sampler="ddim"))
    notes = json.loads((tmp_path / "folder" / "samples.json").read_text())
    assert (notes["steps"], notes["sampler"], notes["seed"]) == (7, "ddim", 4)


def joined(shards):
    return np.concatenate([part["arr_0"] for part in read_shards(shards)])


def test_a_placed_chain_is_the_default_and_the_published_one_is_a_flag_away(bundle, tmp_path):
    """In every kind of output; a folder of shards of one chain is not continued with the other."""
    timesteps, placed = (30.0, 400.0, 999.0), tmp_path / "placed.engine"
    shutil.copytree(bundle, placed)
    manifest = read_manifest(bundle)
    own = manifest.card.sampling
    chain = own.choose(sampler="ddim", timesteps=timesteps)
    write_manifest(placed, replace(manifest, card=replace(manifest.card, sampling=chain, published=own)))

    def sample(name, *flags):
        assert run("sample", [str(placed), "-n", "3", "-q", *flags, "-o", str(tmp_path / name)]) == 0

    sample("default.npz")
    sample("published.npz", "--as-published")
    sample("folder")
    sample("shards", "--shard-size", "2")
    with Sampler.open(bundle) as sampler:
        expected = sampler.sample([0, 1, 2], sampler="ddim", timesteps=timesteps)
        published = sampler.sample([0, 1, 2])
    with np.load(tmp_path / "default.npz") as content:
        np.testing.assert_array_equal(content["arr_0"], expected)
    with np.load(tmp_path / "published.npz") as content:
        np.testing.assert_array_equal(content["arr_0"], published)
    notes = json.loads((tmp_path / "folder" / "samples.json").read_text())
    assert (notes["steps"], notes["sampler"], notes["timesteps"]) == (3, "ddim", list(timesteps))
    np.testing.assert_array_equal(
        np.concatenate([part["arr_0"] for part in read_shards(tmp_path / "shards")]), expected
    )
    assert run("sample", [str(placed), "-n", "3", "--as-published", "--format", "npz", "-o",
                          str(tmp_path / "shards")]) == 1  # fmt: skip


def test_a_guidance_interval_is_a_flag(bundle, tmp_path):
    flags = ["-n", "3", "--steps", "6", "--sampler", "ddim", "--guidance-interval", "300,700", "-q"]
    assert run("sample", [str(bundle), *flags, "-o", str(tmp_path / "s.npz")]) == 0
    assert run("sample", [str(bundle), *flags, "--shard-size", "2", "-o", str(tmp_path / "shards")]) == 0
    with Sampler.open(bundle) as sampler, np.load(tmp_path / "s.npz") as content:
        expected = sampler.sample([0, 1, 2], steps=6, sampler="ddim", guidance_interval=(300, 700))
        np.testing.assert_array_equal(content["arr_0"], expected)
    np.testing.assert_array_equal(
        np.concatenate([part["arr_0"] for part in read_shards(tmp_path / "shards")]), expected
    )


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--as-published", "--steps", "5"], 2, "--as-published.*--steps"),
        (["--as-published", "--full-calls", "5"], 2, "--as-published.*--full-calls"),
        (["--guidance-interval", "700,300"], 2, "interval.*700.*300"),
        (["--guidance-interval", "3,7", "--save-noise", "n.safetensors"], 2, "--guidance-interval"),
    ],
)
def test_chains_that_cannot_be_are_refused(bundle, tmp_path, monkeypatch, capsys, flags, code, message):
    monkeypatch.chdir(tmp_path)
    assert run("sample", [str(bundle), *flags, "-o", "s.npz"]) == code
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_another_chain_than_the_scales_were_found_for_gets_a_remark(bundle, bundle_of, tmp_path, capsys):
    output, quantized = ["-n", "1", "-o", str(tmp_path / "s.npz")], str(bundle_of(kind=Kind()))
    for engine, flags, lines in [
        (quantized, ["--steps", "7"], ["the scales were found for 20 steps of ddpm; sampling 7 steps of ddpm"]),
        (quantized, ["--sampler", "ddim"], ["sampling 20 steps of ddim"]),
        (quantized, ["--steps", "20", "--sampler", "ddpm"], []),
        (str(bundle), ["--steps", "7"], []),
    ]:
        assert run("sample", [engine, *output, *flags]) == 0
        remarks = [line for line in capsys.readouterr().err.splitlines() if "scales" in line]
        assert len(remarks) == len(lines)
        assert all(line in remark for line, remark in zip(lines, remarks, strict=True))


@pytest.fixture
def changed(bundle, tmp_path):
    """changed(request ports) -> a copy of the bundle whose manifest says that the model takes these."""

    def change(*requests):
        shutil.copytree(bundle, tmp_path / "changed.engine")
        manifest = read_manifest(bundle)
        kept = [port for port in manifest.card.signature.ports if port.kind != "request"]
        signature = replace(manifest.card.signature, ports=(*kept, *requests))
        write_manifest(tmp_path / "changed.engine", replace(manifest, card=replace(manifest.card, signature=signature)))
        return str(tmp_path / "changed.engine")

    return change


def test_an_unconditional_model_takes_no_classes(changed, capsys):
    assert run("sample", [changed(), "--classes", "1", "-q"]) == 2
    err = capsys.readouterr().err
    assert "unconditional and takes no --classes" in err
    assert len(err.splitlines()) == 1


def test_a_model_whose_requests_are_arrays_names_how_to_pass_them(changed, capsys):
    engine = changed(Port("text", "request", "float32", (None, 77, 16)))
    assert run("sample", [engine, "-q"]) == 2
    err = capsys.readouterr().err
    assert "'text' [77, 16]" in err
    assert "--embeddings FILE" in err
    assert len(err.splitlines()) == 1


def test_a_latent_model_writes_npz_latents_and_refuses_png(bundle_of, tmp_path, capsys):
    folder = bundle_of(pixels=False)
    assert run("sample", [str(folder), "-n", "2", "-o", str(tmp_path / "s.npz")]) == 0
    with np.load(tmp_path / "s.npz") as content:
        assert content["latents"].shape == (2, 4, 8, 8)
    assert run("sample", [str(folder), "-n", "2", "-o", str(tmp_path / "s.png")]) == 1
    assert "has no decoder. Use sample_latents or name a .npz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--classes", "9"], 2, "'class_labels' 9 is out of range; this model knows 0..4"),
        (["--steps", "0"], 2, " steps is 0; expected a whole number from 1 to 1000"),
        (["--sampler", "euler"], 2, "sampler 'euler' is unknown, or not one for this model; known are ddim, ddpm"),
        (["-n", "0"], 2, "-n is 0; expected a whole number of at least 1"),
        (["--batch", "0"], 2, "batch is 0"),
        (["--guidance-scale", "inf"], 2, "inf; expected a finite number"),
        (["--seed", "-1"], 2, "seed is -1"),
        (["-o", "samples.jpeg"], 2, "unknown kind of output '.jpeg'"),
        (["-o", "samples.gif"], 1, "the engine makes pictures, not videos"),
        (["-o", "/dev/null/s.png"], 1, "cannot be written"),
    ],
)
def test_a_bad_request_gets_one_line_and_writes_nothing(
    bundle, tmp_path, monkeypatch, capsys, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    assert run("sample", ["-q", str(bundle), *arguments]) == code
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_loses_nothing(bundle, tmp_path):
    """RLIMIT_FSIZE makes the write fail half way; the earlier samples stay."""
    output = tmp_path / "s.npz"
    output.write_bytes(b"earlier")
    code = (
        "import resource, signal, sys; from tqdit.cli.main import run\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "sys.exit(run('sample', [sys.argv[1], '-n', '20', '-o', sys.argv[2], '-q']))"
    )
    result = python(code, bundle, output)
    assert result.returncode == 1
    assert "s.npz: cannot be written (File too large)" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert output.read_bytes() == b"earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["s.npz"]


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_sampling_writes_nothing(bundle_of, tmp_path):
    output = tmp_path / "s.png"
    folder = bundle_of(steps=1000)
    process = subprocess.Popen(
        [sys.executable, "-m", "tqdit.cli", "sample", str(folder), "-n", "64", "-o", str(output)],
        stderr=subprocess.PIPE, text=True, preexec_fn=support.listen_to_ctrl_c,
    )  # fmt: skip
    assert process.stderr is not None
    seen = ""
    while "steps" not in seen:  # the bar is up, so sampling has begun
        seen += process.stderr.read(1)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; nothing was changed" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_step_graph_is_refused_by_the_sample_command(bundle_of, tmp_path, capsys):
    engine = str(bundle_of(pixels=False, graph="step"))
    assert run("sample", [engine, "-q", "-o", str(tmp_path / "x.npz")]) == 2
    err = capsys.readouterr().err
    assert "holds a step graph" in err
    assert len(err.splitlines()) == 1


def test_build_refuses_what_is_no_export(tmp_path, capsys):
    (tmp_path / "model.onnx").write_text("hello")
    assert run("build", [str(tmp_path / "model.onnx")]) == 1
    assert run("build", [str(tmp_path / "absent.onnx")]) == 1
    err = capsys.readouterr().err
    assert "not an ONNX file" in err
    assert "absent.onnx: no such file. Run tqdit-export absent.onnx first." in err
    assert run("build", [str(tmp_path / "model.onnx"), str(tmp_path / "model.engine")]) == 2
    assert f"-o {tmp_path / 'model.engine'}" in capsys.readouterr().err
    assert run("build", [str(tmp_path)]) == 1
    assert "expected the ONNX file that tqdit-export wrote" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_the_manifest_is_readable_by_others(bundle):
    values = json.loads((bundle / "manifest.json").read_text())
    assert values["card"]["sampling"]["steps"] == 20
    assert values["card"]["graph"] == "denoiser"
    assert set(values["files"]) == {"graph.onnx"}
    assert [port["name"] for port in values["card"]["signature"]["ports"]] == ["x", "timestep", "class_labels"]
