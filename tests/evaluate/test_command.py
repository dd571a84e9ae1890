"""`tqdit-evaluate` as a user meets it: an engine, files of images, references, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tqdit
from evaluate.commands import evaluate, refused
from tqdit.cli.main import run
from tqdit.console import Console
from tqdit.demo.glyphs import draw
from tqdit.engines.bundle import read_manifest
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.shards import describe_job
from tqdit.evaluate.bootstrap import number
from tqdit.evaluate.calls import measure_calls
from tqdit.evaluate.extractors import Features, JudgeExtractor
from tqdit.evaluate.judges import JUDGES
from tqdit.evaluate.paired import relative_errors
from tqdit.evaluate.statistics import Gaussian, frechet_to
from tqdit.evaluate.tables import fewest_calls, summary
from tqdit.quantization.table import PlacedSteps, read_scale_table
from tqdit.sampling.placement import dense
from tqdit.sampling.process import Diffusion

pytestmark = pytest.mark.slow

COUNT = 64
NAMES = ("latents", "damaged", "half", "large", "picture")


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """64 other drawings, as tqdit-sample writes its samples."""
    path = tmp_path / "samples.npz"
    pixels, labels = draw(COUNT, 2)
    np.savez(path, arr_0=pixels, arr_1=labels)
    return path


def test_every_number_comes_with_its_noise(done):
    _, facts = done
    assert set(facts["sets"]) == {"subject", "float", "float, seed 1"}
    for found in facts["sets"].values():
        assert set(found) == {"frechet_distance", "inception_score", "precision", "recall", "accuracy"}
        for measure in found.values():
            assert measure["low"] <= measure["value"] <= measure["high"]
            assert measure["count"] in (COUNT, 200)
    assert facts["not_computed"].keys() == {"spatial_frechet_distance"}
    assert facts["seed_noise"]["seeds"] == 2
    assert "Frechet distance" in facts["verdict"]


def test_paired_errors_are_those_of_the_two_engines(done):
    """Against chains that are sampled here: the same latents, the same error."""
    flow, facts = done
    labels = np.arange(COUNT) % 16
    with Sampler.open(flow / "model.engine") as a, Sampler.open(flow / "float.engine") as b:
        x, y = (sampler.sample_latents(labels).astype(np.float64) for sampler in (a, b))
    errors = np.square(x - y).reshape(COUNT, -1).sum(1) / np.square(y).reshape(COUNT, -1).sum(1)
    assert facts["paired"]["final_error"]["value"] == pytest.approx(errors.mean(), rel=1e-6)
    assert facts["paired"]["final_error_median"]["value"] == pytest.approx(np.median(errors), rel=1e-6)
    assert facts["steps"][0] == pytest.approx(errors.mean(), rel=1e-6)
    assert len(facts["steps"]) == 5
    assert [group["group"] for group in facts["groups"]] == [0, 1]


def test_the_distance_above_float_is_the_difference_with_less_noise(done):
    """Pairs share most of what moves a distance, so the interval is narrower than those of the two would give."""
    _, facts = done
    a, b, excess = (
        facts["sets"]["subject"]["frechet_distance"], facts["sets"]["float"]["frechet_distance"],
        facts["paired"]["frechet_excess"],
    )  # fmt: skip
    assert excess["value"] == pytest.approx(a["value"] - b["value"], rel=1e-6)
    assert excess["low"] < excess["value"] < excess["high"]
    assert excess["standard_error"] < np.hypot(a["standard_error"], b["standard_error"])


def test_the_distance_is_that_of_the_library(done, reference):
    """Sampled and measured again by hand."""
    flow, facts = done
    extractor = JudgeExtractor()
    with Sampler.open(flow / "model.engine") as sampler:
        pixels = sampler.sample(np.arange(COUNT) % 16)
    with np.load(reference) as content:
        target = Gaussian.of(extractor(content["arr_0"]).pooled)
    expected = frechet_to(target)(Gaussian.of(extractor(pixels).pooled))
    assert facts["sets"]["subject"]["frechet_distance"]["value"] == pytest.approx(expected, rel=1e-6)


def test_the_diagnosis_ranks_what_costs_most_and_the_calibration_takes_its_advice(done, tmp_path, capsys):
    flow, facts = done
    diagnosis = json.loads((flow / "diagnosis.json").read_text())
    assert diagnosis == facts["diagnosis"]
    work = flow / "scales.safetensors.work"
    assert [file.name.split("-")[0] for file in work.iterdir()] == ["rows"]  # as the calibration left it
    gains = [site["gain"] for site in diagnosis["sites"]]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 0
    values = [remedy["gain_per_cost"] for remedy in diagnosis["remedies"]]
    assert values == sorted(values, reverse=True)
    capsys.readouterr()
    assert run("calibrate", ["--from-diagnosis", str(flow / "diagnosis.json"), "--print"]) == 0
    printed = capsys.readouterr().out
    assert "weight-bits          6" in printed
    for entry in diagnosis["advice"]:
        assert entry["layer"] in printed


def test_samples_as_npz_and_as_a_folder_give_the_same_numbers(samples, reference, tmp_path):
    one = evaluate(tmp_path, samples, "--reference", reference)
    folder = tmp_path / "pictures"
    folder.mkdir()
    with np.load(samples) as content:
        for index, image in enumerate(content["arr_0"]):
            Image.fromarray(image).save(folder / f"{index:03}.png")
        (folder / "samples.json").write_text(json.dumps({"classes": content["arr_1"].tolist()}))
    other = evaluate(tmp_path, folder, "--reference", reference)
    assert other["sets"] == one["sets"]
    assert one["sets"]["samples"]["accuracy"]["value"] == 1


def test_grey_images_are_measured_like_the_same_in_rgb(samples, reference, tmp_path):
    with np.load(samples) as content:
        grey, labels = content["arr_0"][..., :1], content["arr_1"]
    np.savez(tmp_path / "grey.npz", arr_0=grey, arr_1=labels)
    np.savez(tmp_path / "rgb.npz", arr_0=np.repeat(grey, 3, axis=-1), arr_1=labels)
    one, other = (evaluate(tmp_path, tmp_path / name, "--reference", reference) for name in ("grey.npz", "rgb.npz"))
    assert one["sets"] == other["sets"]


def test_a_written_reference_gives_the_distance_of_the_samples_it_was_made_of(samples, reference, tmp_path):
    stored = tmp_path / "stored.npz"
    evaluate(tmp_path, reference, "--reference", reference, "--write-reference", stored)
    direct = evaluate(tmp_path, samples, "--reference", reference)["sets"]["samples"]
    through = evaluate(tmp_path, samples, "--reference", stored)
    assert through["sets"]["samples"]["frechet_distance"] == pytest.approx(direct["frechet_distance"])
    assert "holds statistics alone" in through["not_computed"]["precision"]


def test_the_reference_itself_is_at_distance_zero(reference, tmp_path):
    found = evaluate(tmp_path, reference, "--reference", reference)["sets"]["samples"]
    assert found["frechet_distance"]["value"] == pytest.approx(0, abs=1e-6)
    assert (found["precision"]["value"], found["recall"]["value"]) == (1, 1)


def test_a_reference_of_another_extractor_is_refused(samples, tmp_path, capsys):
    named, sized = tmp_path / "named.npz", tmp_path / "sized.npz"
    np.savez(named, mu=np.zeros(128), sigma=np.eye(128), extractor=np.array("inception 0123456789ab"))
    np.savez(sized, mu=np.zeros(2048), sigma=np.eye(2048))
    line = refused(capsys, samples, "--reference", named)
    assert "holds statistics of the extractor 'inception 0123456789ab', these samples are measured with 'judge" in line
    line = refused(capsys, samples, "--reference", sized)
    assert "holds statistics of 2048 features, the extractor 'judge' has 128" in line


def test_too_few_samples_are_an_error_where_the_metric_was_asked_for_and_a_remark_where_not(
    samples, reference, tmp_path, capsys
):
    line = refused(capsys, samples, "-n", 20, "--reference", reference, "--metrics", "frechet_distance")
    assert "frechet_distance needs more than 49 samples" in line
    assert "got 20" in line
    facts = evaluate(tmp_path, samples, "-n", 20, "--reference", reference)
    assert "needs more than 49 samples" in facts["not_computed"]["frechet_distance"]
    assert "accuracy" in facts["sets"]["samples"]
    assert "got 3" in refused(capsys, samples, "-n", 3, "--reference", reference, "--metrics", "recall")
    assert "over 16 classes" in refused(capsys, samples, "-n", 3, "--metrics", "inception_score")
    assert "holds 64 images, -n asks for 65" in refused(capsys, samples, "-n", 65)


def test_mixed_image_sizes_are_refused_by_name(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, size in enumerate((16, 16, 20)):
        Image.new("RGB", (size, size)).save(folder / f"{index}.png")
    line = refused(capsys, folder)
    assert "2.png: 20x20 pixels, the images before it have 16x16" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"PK nothing", "not a PyTorch checkpoint"),
        ({"fc.weight": torch.zeros(2, 2)}, "torch-fidelity"),
        ([1, 2], "expected a state dict of tensors"),
    ],
)
def test_missing_or_wrong_weights_are_refused(samples, tmp_path, capsys, content, message):
    """The third is a state dict of another network; where torch-fidelity is absent, its absence is the message."""
    weights = tmp_path / "inception.pth"
    if isinstance(content, bytes):
        weights.write_bytes(content)
    elif content is not None:
        torch.save(content, weights)
    assert message in refused(capsys, samples, "--inception-weights", weights)


class Dangerous:
    def __reduce__(self):
        return print, ("this file runs code",)


def test_weights_that_would_run_code_are_refused(samples, tmp_path, capsys):
    weights = tmp_path / "inception.pth"
    torch.save({"a": Dangerous()}, weights)
    assert "it holds pickled code" in refused(capsys, samples, "--inception-weights", weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.npz"], "missing.npz: no such engine"),
        (["{samples}", "--layers"], "--layers needs an engine"),
        (["{samples}", "--against", "x"], "--against needs an engine"),
        (["{samples}", "--steps", "5"], "--steps needs an engine"),
        (["-n", "0"], "-n is 0"),
        (["--alone", "--against", "x"], "exclude each other"),
        (["{latents}"], "holds latents, expected images"),
        (["{damaged}"], "damaged.npz: damaged or truncated"),
        (["{picture}"], "picture.npz: not an .npz of arrays"),
        (["{samples}", "--reference", "{latents}"], "expected samples (arr_0) or statistics"),
        (["{samples}", "--reference", "{half}"], "holds mu without its partner"),
        (["{large}"], "32x32 images need an extractor"),
        (["{large}", "--metrics", "recall"], "need Inception"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(samples, tmp_path, capsys, arguments, message):
    files = {name: tmp_path / f"{name}.npz" for name in NAMES} | {"samples": samples}
    np.savez(files["latents"], latents=np.zeros((2, 4, 8, 8)))
    np.savez(files["half"], mu=np.zeros(128))
    np.savez(files["large"], arr_0=np.zeros((4, 32, 32, 3), np.uint8))
    files["damaged"].write_bytes(b"PK\x03\x04 no")
    files["picture"].write_bytes(b"\x89PNG")
    assert message in refused(capsys, *(argument.format(**files) for argument in arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reference", "missing.npz"], "missing.npz: no such file or folder"),
        (["--inception-weights", "missing.pth"], "missing.pth: no such file"),
        (["--inception-weights", "evil.pth"], "evil.pth: not a PyTorch checkpoint"),
        (["--lpips-weights", "evil.pth", "evil.pth"], "evil.pth: not a PyTorch checkpoint"),
        (["--reference", "evil.npz"], "evil.npz: not an .npz of arrays"),
        (["--reference", "stored.npz"], "holds statistics of 3 features, the extractor 'judge' has 128"),
        (["--reference", "few.npz", "--metrics", "spatial_frechet_distance"], "needs spatial features"),
        (["--reference", "few.npz", "--metrics", "precision", "-n", "3"], "needs more than 3 images on each side"),
        (
            ["--reference", "few.npz", "--metrics", "inception_score", "-n", "15"],
            "over 16 classes needs as many samples",
        ),
        (["--guidance-scale", "nan"], "guidance scale is nan"),
        (["-n", str(10**12)], "sets of 1000000000000 images: "),
        (["--float-seeds", str(10**12)], "--float-seeds is 1000000000000; expected a whole number from 0 to 1000"),
        (["--bootstrap", str(10**12)], "--bootstrap is 1000000000000"),
        (["--batch", str(10**12)], "--batch is 1000000000000"),
        (["--threads", str(10**12)], "threads is 1000000000000"),
        ([], "needs matplotlib, which is not installed. Run: pip install "),
    ],
)
def test_what_an_evaluation_lacks_is_said_before_anything_is_sampled(
    flow, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    for name in ("evil.pth", "evil.npz"):
        Path(name).write_text("evil" * 10)
    np.savez("stored.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez("few.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8), arr_1=np.arange(4))

    def sample(*_: object, **__: object) -> None:
        raise AssertionError("sampled although the evaluation cannot end")

    monkeypatch.setattr("tqdit.evaluate.chains.run", sample)
    monkeypatch.setattr("tqdit.evaluate.chains.run_pair", sample)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert message in refused(capsys, flow / "model.engine", *arguments)


def test_steps_and_sampler_are_chosen_for_both_engines(flow, tmp_path, capsys):
    arguments = ["--against", flow / "float.engine", "-n", 4, "--batch", 2, "--float-seeds", 0, "--steps", 3]
    facts = evaluate(tmp_path, flow / "model.engine", *arguments, "--sampler", "ddim", "--guidance-scale", 2)
    assert facts["subject"]["steps"] == 3
    assert facts["subject"]["sampler"] == "ddim"
    assert facts["subject"]["chain"] == "3 steps of ddim"
    assert facts["timesteps"] == [0, 500, 999]
    labels = np.arange(4)
    with Sampler.open(flow / "model.engine") as a, Sampler.open(flow / "float.engine") as b:
        x, y = (s.sample_latents(labels, 2, steps=3, sampler="ddim").astype(np.float64) for s in (a, b))
    errors = np.square(x - y).reshape(4, -1).sum(1) / np.square(y).reshape(4, -1).sum(1)
    assert facts["paired"]["final_error"]["value"] == pytest.approx(errors.mean(), rel=1e-6)


def test_samplers_and_spacings_are_compared_at_equal_calls(flow, tmp_path, monkeypatch, capsys):
    """Each point is what the engine samples with these timesteps, against a long chain of the float engine."""
    monkeypatch.setattr("tqdit.evaluate.calls.CONVERGED", ("dpm++2m", 12))
    monkeypatch.setattr("tqdit.evaluate.calls.LONG", ("dpm++2m", 12))
    report = tmp_path / "report.html"
    engines = [flow / "model.engine", "--against", flow / "float.engine", "--report", report]
    facts = evaluate(tmp_path, *engines, "-n", 2, "--float-seeds", 0, "--calls", "3,2", "--metrics", "accuracy")
    points = facts["calls"]
    methods = {(point["sampler"], point["spacing"]) for point in points}
    assert {("ddim", "uniform"), ("heun", "uniform"), ("unipc", "placed"), ("dpm++2m", "karras")} <= methods
    assert {point["calls"] for point in points} == {2, 3}
    assert len(points) == 2 * len(methods)
    labels = np.arange(2)
    process = Diffusion(learned_variance=True)
    with Sampler.open(flow / "model.engine") as engine, Sampler.open(flow / "float.engine") as floating:
        end = floating.sample_latents(labels, sampler="dpm++2m", timesteps=dense(process, 12))
        for point in points[:3] + points[-3:]:
            chain = {"steps": point["calls"], "sampler": point["sampler"], "timesteps": point["timesteps"]}
            errors = relative_errors(end, engine.sample_latents(labels, **chain))
            assert point["error"]["value"] == pytest.approx(errors.mean(), rel=1e-5)
            assert point["seconds"] > 0
    page = report.read_text()
    assert "unipc, placed" in page
    assert f'data-key="calls.{len(points) - 1}.error.value"' in page


def test_a_step_outside_the_guidance_interval_counts_as_half_a_call(flow, monkeypatch):
    monkeypatch.setattr("tqdit.evaluate.calls.CONVERGED", ("dpm++2m", 12))
    monkeypatch.setattr("tqdit.evaluate.calls.LONG", ("dpm++2m", 12))
    bundle, interval = flow / "model.engine", (200, 700)
    job = describe_job(bundle, read_manifest(bundle), [1, 2], 0, 2, guidance_interval=interval)
    with Sampler.open(bundle) as engine, Sampler.open(flow / "float.engine") as floating:
        points = measure_calls(engine, floating, job, (4, 5), Console(quiet=True), samplers=("ddim",))
        guided = [np.count_nonzero((t >= 200) & (t <= 700)) for t in
                  (engine.choose(steps=n, sampler="ddim").schedule.timesteps for n in (4, 5))]  # fmt: skip
        end = floating.sample_latents([1, 2], sampler="dpm++2m", timesteps=dense(Diffusion(learned_variance=True), 12),
                                      guidance_interval=interval)  # fmt: skip
        found = engine.sample_latents([1, 2], steps=4, sampler="ddim", guidance_interval=interval)
    assert [point.calls for point in points] == [(4 + guided[0]) / 2, (5 + guided[1]) / 2]
    assert all(point.calls < steps for point, steps in zip(points, (4, 5), strict=True))
    assert points[0].error.value == pytest.approx(relative_errors(end, found).mean(), rel=1e-5)


def test_samplers_that_add_noise_are_compared_by_their_distance(flow, reference, tmp_path, monkeypatch, capsys):
    """They end with other images than the converged chain, so they have no error; the fewest calls are named."""
    monkeypatch.setattr("tqdit.evaluate.calls.CONVERGED", ("dpm++2m", 6))
    monkeypatch.setattr("tqdit.evaluate.calls.LONG", ("dpm++2m", 6))
    monkeypatch.setattr("tqdit.evaluate.subjects.samplers_of", lambda _: ("ddim", "ddpm", "dpm++2m-sde"))
    report = tmp_path / "report.html"
    engines = [flow / "model.engine", "--against", flow / "float.engine", "--reference", reference, "--report", report]
    facts = evaluate(tmp_path, *engines, "-n", COUNT, "--steps", 2, "--calls", 2, "--metrics", "frechet_distance")
    points = {(point["sampler"], point["spacing"]): point for point in facts["calls"]}
    for name in ("ddpm", "dpm++2m-sde"):
        assert points[name, "uniform"]["error"] is None
        assert points[name, "uniform"]["error_median"] is None
    # the subject of the evaluation is the same chain: 2 steps of ddpm from the same noise
    distance = facts["sets"]["subject"]["frechet_distance"]["value"]
    assert points["ddpm", "uniform"]["frechet_distance"]["value"] == pytest.approx(distance, rel=1e-6)
    assert f"ddpm, uniform: Frechet distance {number(distance)}" in summary(facts)
    high = facts["seed_noise"]["high"]
    least = min(point["frechet_distance"]["value"] for point in facts["calls"])
    nearest = min(facts["calls"], key=lambda point: point["frechet_distance"]["value"])
    assert fewest_calls(facts) == (nearest if least <= high else None)
    near = {**facts, "seed_noise": {**facts["seed_noise"], "high": least}}
    assert f"(at most {number(least)}): 2 of {nearest['sampler']}, {nearest['spacing']}" in summary(near)
    far = {**facts, "seed_noise": {**facts["seed_noise"], "high": least / 2}}
    assert fewest_calls(far) is None
    assert "none of these" in summary(far)
    assert "ddpm, uniform" in report.read_text()


@pytest.mark.slow
def test_forecasts_are_compared_at_equal_full_calls(flow, tmp_path, monkeypatch, capsys):
    """Twice as many steps, every second one a forecast, beside chains of full calls alone and the engine's own."""
    monkeypatch.setattr("tqdit.evaluate.calls.CONVERGED", ("dpm++2m", 12))
    monkeypatch.setattr("tqdit.evaluate.calls.LONG", ("dpm++2m", 12))
    monkeypatch.setattr("tqdit.evaluate.calls.deterministic", lambda _: ("dpm++2m", "unipc"))
    file, bundle = tmp_path / "model.onnx", tmp_path / "model.engine"
    own = PlacedSteps("unipc", (0.0, 100.0, 400.0, 800.0, 999.0), {}, 1, (0, 2, 3, 4))
    tqdit.export("demo", file, scales=replace(read_scale_table(flow / "scales.safetensors"), placed=own))
    tqdit.build(file, bundle, backend="onnxruntime")
    facts = evaluate(tmp_path, bundle, "--against", flow / "float.engine", "-n", 2, "--float-seeds", 0, "--calls",
                     "3,6", "--metrics", "accuracy")  # fmt: skip
    with Sampler.open(bundle) as engine, Sampler.open(flow / "float.engine") as floating:
        # the float engine, which has no forecasts, computes every call
        end = floating.sample_latents(np.arange(2), sampler="unipc", timesteps=own.timesteps)
        error = relative_errors(end, engine.sample_latents(np.arange(2))).mean()
    assert facts["paired"]["final_error"]["value"] == pytest.approx(error, rel=1e-5)
    assert facts["subject"]["chain"] == "5 placed steps of unipc, 4 of them with full calls"
    points = {(point["sampler"], point["spacing"], point["calls"]): point for point in facts["calls"]}
    assert {key for key in points if "forecasts" in key[1]} == {
        (sampler, f"{spacing}, forecasts", 3)
        for sampler in ("dpm++2m", "unipc")
        for spacing in ("uniform", "karras", "log-snr", "placed")
    }
    with Sampler.open(bundle) as engine, Sampler.open(flow / "float.engine") as floating:
        end = floating.sample_latents(
            np.arange(2), sampler="dpm++2m", timesteps=dense(Diffusion(learned_variance=True), 12)
        )
        found = engine.sample_latents(np.arange(2))
        assert points["unipc", "engine's own", 4]["timesteps"] == list(own.timesteps)
        assert points["unipc", "engine's own", 4]["error"]["value"] == pytest.approx(
            relative_errors(end, found).mean(), rel=1e-5
        )
        for name in ("karras", "placed"):
            point = points["unipc", f"{name}, forecasts", 3]
            assert point["timesteps"] == points["unipc", name, 6]["timesteps"]
            found = engine.sample_latents(
                np.arange(2), steps=6, sampler="unipc", timesteps=point["timesteps"], full_calls=3
            )
            assert point["error"]["value"] == pytest.approx(relative_errors(end, found).mean(), rel=1e-5)


def test_calls_that_cannot_be_compared_are_refused(flow, capsys):
    assert "1,8: expected numbers from 2 to 50" in refused(capsys, flow / "model.engine", "--calls", "8,1")


def test_a_chain_that_the_scales_were_not_found_for_is_remarked_upon(flow, tmp_path, capsys):
    output = ["-n", "1", "--alone", "--float-seeds", "0", "--steps", "2", "-o", str(tmp_path / "e.json")]
    assert run("evaluate", [str(flow / "model.engine"), *output]) == 0
    assert "scales were found for 5 steps of ddpm; sampling 2 steps of ddpm" in capsys.readouterr().err


def test_engines_that_are_no_pair_are_refused(flow, tmp_path, capsys):
    other = tmp_path / "other.engine"
    shutil.copytree(flow / "float.engine", other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["card"]["fingerprint"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    line = refused(capsys, flow / "model.engine", "--against", other)
    assert "the two engines differ in their model (fingerprint)" in line


def test_each_set_of_images_is_extracted_once(flow, reference, tmp_path, monkeypatch):
    """The reference, the engine's, the float engine's and its other seed: metrics, pairs and the stored statistics."""
    seen: list[int] = []

    class Counting(JudgeExtractor):
        def __call__(self, images: np.ndarray) -> Features:
            seen.append(len(images))
            return super().__call__(images)

    monkeypatch.setitem(JUDGES, "demo", replace(JUDGES["demo"], extractor=Counting))
    arguments = ["--reference", reference, "-n", COUNT, "--steps", 2, "--write-reference", tmp_path / "stored.npz"]
    facts = evaluate(tmp_path, flow / "model.engine", "--against", flow / "float.engine", *arguments)
    assert "frechet_excess" in facts["paired"]
    assert seen == [200, COUNT, COUNT, COUNT]
