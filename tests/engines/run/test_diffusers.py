"""The denoiser engine by itself, and as the transformer of diffusers' DiT pipeline."""

import copy
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import support
from tqdit.engines.build.engine import build_engine
from tqdit.engines.bundle import read_manifest
from tqdit.engines.run.denoiser import Denoiser
from tqdit.engines.run.drop_in import DropIn
from tqdit.errors import BackendError, UsageError
from tqdit.exporter.graph import ExportConfig, export_graph
from tqdit.exporter.onnx_writer import write
from tqdit.models.dit import randomize
from tqdit.models.load import load_model
from tqdit.ports import Port, Signature
from tqdit.sampling.process import Flow
from tqdit.sampling.schedule import SamplingSpec

# diffusers' schedulers hand NumPy objects of torch whose __array__ is of before NumPy 2.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers.*"),
]

STEPS = 8
CLASSES = 1000  # the pipeline has the null class 1000 written into it


@pytest.fixture(scope="module")
def theirs():
    """A tiny DiT of diffusers with random non-zero weights and 1000 classes."""
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=CLASSES,
    )  # fmt: skip
    return randomize(model, scale=0.2).eval()


@pytest.fixture(scope="module")
def pipeline(theirs):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4).eval()
    return DiTPipeline(theirs, vae, DDIMScheduler())


@pytest.fixture(scope="module")
def engine(theirs, tmp_path_factory):
    """The same model as a float bundle for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("dit")
    theirs.save_pretrained(folder / "dit")
    write(folder / "model.onnx", *export_graph(load_model(str(folder / "dit")), ExportConfig()))
    build_engine(folder / "model.onnx", folder / "model.engine")
    return folder / "model.engine"


@pytest.fixture
def ours(engine):
    transformer = DropIn.open(engine)
    yield transformer
    transformer.close()


def draw(pipeline, scheduler, scale=4.0):
    """float32 images (3, H, W, 3) in 0..1, of the same noise each time."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler
    torch.manual_seed(4)  # for what a scheduler draws in its steps
    generator = torch.Generator().manual_seed(3)
    return pipeline(
        [1, 207, 999], guidance_scale=scale, num_inference_steps=STEPS, output_type="np", generator=generator
    ).images


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(),
        DPMSolverMultistepScheduler(),
        DDPMScheduler(),  # draws noise in each step
        EulerDiscreteScheduler(timestep_spacing="leading"),  # float timesteps, scaled inputs
        PNDMScheduler(),
        UniPCMultistepScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.parametrize("scale", [4.0, 1.0], ids=["guided", "unguided"])
def test_a_pipeline_draws_the_same_images_on_our_engine(pipeline, theirs, ours, scheduler, scale):
    """8 steps, float32 in another order than PyTorch's: 1e-4 of images in 0..1."""
    expected = draw(pipeline, scheduler, scale)
    pipeline.transformer = ours
    try:
        images = draw(pipeline, scheduler, scale)
    finally:
        pipeline.transformer = theirs
    assert images.shape == (3, 8, 8, 3)
    assert np.ptp(expected) > 0.2
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def forecasting(theirs, tmp_path_factory):
    """The same model as a float bundle with forecasts."""
    folder = tmp_path_factory.mktemp("forecasting")
    theirs.save_pretrained(folder / "dit")
    write(folder / "model.onnx", *export_graph(load_model(str(folder / "dit")), ExportConfig(forecast=True)))
    build_engine(folder / "model.onnx", folder / "model.engine")
    return folder / "model.engine"


@pytest.fixture
def forecaster(pipeline, theirs, forecasting):
    """In the pipeline, with its own transformer there afterwards."""
    pipeline.transformer = DropIn.open(forecasting)
    yield pipeline.transformer
    pipeline.transformer.close()
    pipeline.transformer = theirs


class Reference(DropIn):
    """Forecasts in ten lines: calls are counted, residuals extrapolated in float64. FULL: steps, 0 being the last."""

    FULL = (0, 3, 6, 7)

    def forward(self, x, timestep, class_labels):
        if not hasattr(self, "known"):
            self.calls, self.known = 0, []
        inputs = {"hidden_states": x.numpy(), "timestep": timestep.long().numpy(), "class_labels": class_labels.numpy()}
        time, self.calls = float(timestep[0]), self.calls + 1
        if STEPS - self.calls in self.FULL:
            prediction, residual = self._denoiser.full(inputs)
            self.known = [*self.known[-1:], (time, residual.astype(np.float64))]
        else:
            (t0, d0), (t1, d1) = self.known
            residual = (d1 + (time - t1) / (t1 - t0) * (d1 - d0)).astype(np.float32)
            prediction = self._denoiser.forecast({**inputs, "residual": residual})
        return SimpleNamespace(sample=torch.from_numpy(prediction))


FORECASTABLE = [DDIMScheduler(), DPMSolverMultistepScheduler(), EulerDiscreteScheduler(timestep_spacing="leading")]


@pytest.mark.parametrize("scheduler", FORECASTABLE, ids=lambda scheduler: type(scheduler).__name__)
def test_a_pipeline_forecasts_calls(pipeline, forecasting, forecaster, scheduler):
    """8 steps, float32 against float64 in what is extrapolated: 1e-4 of images in 0..1. DDIM counts no steps."""
    without = draw(pipeline, scheduler)
    forecaster.forecast(scheduler, Reference.FULL)
    found = draw(pipeline, scheduler)
    pipeline.transformer = Reference.open(forecasting)
    np.testing.assert_allclose(found, draw(pipeline, scheduler), rtol=0, atol=1e-4)
    assert np.abs(found - without).max() > 1e-3
    pipeline.transformer = forecaster
    forecaster.forecast(scheduler, full_calls=())
    np.testing.assert_array_equal(draw(pipeline, scheduler), without)


@pytest.mark.parametrize("scheduler", FORECASTABLE[:2], ids=lambda scheduler: type(scheduler).__name__)
def test_a_chain_that_was_broken_off_changes_no_later_picture(pipeline, forecaster, scheduler, monkeypatch):
    """Bit for bit, after chains of other steps, rows and noise that ended early."""
    forecaster.forecast(scheduler, 4)
    expected = draw(pipeline, scheduler)
    step = scheduler.step
    for steps, labels, until in ((8, [1, 2, 3], 1), (8, [4, 5, 6], 5), (6, [7], 4), (20, [8, 9, 10, 11], 2)):
        left = iter(range(until))

        def stops(*args, left=left, **kwargs):
            if next(left, None) is None:
                raise InterruptedError
            return step(*args, **kwargs)

        monkeypatch.setattr(scheduler, "step", stops)
        with pytest.raises(InterruptedError):
            pipeline(labels, num_inference_steps=steps, output_type="np")
        monkeypatch.undo()
        np.testing.assert_array_equal(draw(pipeline, scheduler), expected)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler"])
def test_a_scheduler_that_visits_a_timestep_twice_has_no_forecasts(pipeline, forecaster, name):
    scheduler = getattr(diffusers, name)(timestep_spacing="leading")
    forecaster.forecast(scheduler, 4)
    with pytest.raises(UsageError, match=f"{name} visits a timestep twice"):
        draw(pipeline, scheduler)


def test_the_scheduler_of_another_pipeline_is_told_from_the_own_one(pipeline, forecaster):
    forecaster.forecast(DDIMScheduler(), 4)  # never told its steps: a chain of 1000
    with pytest.raises(UsageError, match=r"timestep \d+, which is none of the 1000 of DDIMScheduler|expected 99\d or"):
        draw(pipeline, DPMSolverMultistepScheduler())


def test_an_engine_without_forecasts_refuses_them_by_name(pipeline, ours, forecaster):
    with pytest.raises(UsageError, match=r"DiTTransformer2DModel: this engine computes every call in full.*exported"):
        ours.forecast(DDIMScheduler(), 4)
    with pytest.raises(UsageError, match=r"found a DiTPipeline, expected a scheduler.*pipeline\.scheduler"):
        forecaster.forecast(pipeline, 4)
    with pytest.raises(UsageError, match="full calls many"):
        forecaster.forecast(DDIMScheduler(), "many")
    forecaster.forecast(DDIMScheduler(), 4)
    x, y = torch.zeros(2, 4, 8, 8), torch.tensor([0, 1])
    with pytest.raises(UsageError, match="'timestep' differs from row to row"):
        forecaster(x, torch.tensor([999, 998]), y)
    with pytest.raises(UsageError, match="expected a non-empty array"):
        forecaster(x[:0], torch.tensor([], dtype=torch.int64), y[:0])


def test_a_denoiser_gives_residuals_and_takes_them(forecasting, engine):
    """In one call and in several. The tolerance is that of a difference and a sum in float32."""
    rng = np.random.default_rng(0)
    inputs = {
        "hidden_states": rng.standard_normal((5, 4, 8, 8)).astype(np.float32), "timestep": np.arange(5) * 100,
        "class_labels": np.arange(5),
    }  # fmt: skip
    with Denoiser.open(forecasting) as denoise:
        parts = Denoiser(denoise.card, denoise._engine, 2, denoise._forecast)
        prediction, residual = denoise.full(inputs)
        np.testing.assert_array_equal(denoise(inputs), prediction)
        np.testing.assert_allclose(denoise.forecast({**inputs, "residual": residual}), prediction, rtol=0, atol=1e-4)
        for found, expected in zip(parts.full(inputs), (prediction, residual), strict=True):
            np.testing.assert_array_equal(found, expected)
        given = {**inputs, "residual": 2 * residual}
        np.testing.assert_array_equal(parts.forecast(given), denoise.forecast(given))
        for wrong, message in (
            (residual[:3], "'residual' has 3 rows, the ports have 5"), (residual[:, 1:], "'residual' is float32"),
            (None, "'residual' is"),
        ):  # fmt: skip
            with pytest.raises(UsageError, match=message):
                denoise.forecast({**inputs, "residual": wrong})
        with pytest.raises(UsageError, match="'timestep' 1000 is out of range"):
            denoise.full({**inputs, "timestep": np.full(5, 1000)})
    with pytest.raises(UsageError, match="this denoiser is closed"):
        denoise.forecast(given)
    with Denoiser.open(engine) as denoise:
        assert not denoise.forecasts
        for refused in (lambda: denoise.full(inputs), lambda: denoise.forecast(given)):
            with pytest.raises(UsageError, match=r"computes every call in full.*exported with forecasts"):
                refused()


def test_a_saved_pipeline_is_loaded_with_our_engine_in_it(pipeline, ours, tmp_path):
    expected = draw(pipeline, DDIMScheduler())
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = DiTPipeline.from_pretrained(tmp_path / "pipeline", transformer=ours)
    assert loaded.transformer is ours
    np.testing.assert_allclose(draw(loaded, DDIMScheduler()), expected, rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match="not saved with a pipeline"):
        loaded.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-4), (torch.bfloat16, 0.03)])
def test_a_pipeline_moves_it_to_another_dtype(pipeline, ours, dtype, limit):
    """The engine computes in float32; in bfloat16 (8 bits) the network beside it rounds more; the VAE is the same."""
    their_pipeline = copy.deepcopy(pipeline).to("cpu", dtype)
    expected = draw(their_pipeline, DDIMScheduler())
    our_pipeline = DiTPipeline(ours, copy.deepcopy(pipeline.vae), DDIMScheduler()).to("cpu", dtype)
    assert ours.dtype == our_pipeline.dtype == our_pipeline.vae.dtype == dtype
    assert ours.device == torch.device("cpu")
    assert np.abs(draw(our_pipeline, DDIMScheduler()) - expected).mean() <= limit


def test_it_answers_in_the_dtype_and_form_that_it_is_asked_for(theirs, ours):
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 999]), torch.tensor([0, 1000])
    with torch.no_grad():
        expected = theirs(x, t, y).sample
    for dtype, limit in [(torch.float32, 1e-4), (torch.bfloat16, 0.05)]:
        out = ours(x.to(dtype), timestep=t, class_labels=y, return_dict=False)
        assert len(out) == 1
        assert out[0].dtype == dtype
        torch.testing.assert_close(out[0].float(), expected, rtol=0, atol=limit * float(expected.abs().max()))
    same = ours(x, t[:1].expand(2), y).sample
    torch.testing.assert_close(ours(x, t[0], y).sample, same, rtol=0, atol=0)
    torch.testing.assert_close(ours(x, 3.0, y).sample, same, rtol=0, atol=0)
    assert ours.config.sample_size == 8
    assert (ours.config.in_channels, ours.config["out_channels"]) == (4, 8)
    assert list(ours.parameters()) == []


def test_two_answers_do_not_share_memory(engine):
    class Reuses:
        out = np.zeros((2, 8, 8, 8), np.float32)

        def __call__(self, inputs):
            self.out += 1
            return self.out

        def close(self):
            pass

    with Denoiser.open(engine) as denoiser:
        transformer = DropIn(Denoiser(denoiser.card, Reuses()))
    x, y = torch.zeros(2, 4, 8, 8), torch.tensor([0, 1])
    first, second = transformer(x, 1, y).sample, transformer(x, 1, y).sample
    assert (float(first.max()), float(second.max())) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"hidden_states": torch.zeros(2, 4, 16, 16)},
            r"'hidden_states' is float32\[2, 4, 16, 16\], expected .*\(N, 4, 8, 8\)",
        ),
        ({"hidden_states": torch.zeros(3, 4, 8, 8)}, "'hidden_states' has 3, 'timestep' has 2"),
        ({"class_labels": torch.tensor([0, 1001])}, r"'class_labels' 1001 is out of range; this model knows 0\.\.999"),
        ({"class_labels": torch.zeros(2)}, "'class_labels' holds float32 numbers, expected whole ones"),
        ({"class_labels": None}, "'class_labels' is missing"),
        (
            {"timestep": torch.tensor([1, 1000])},
            r"'timestep' 1000 is out of range; this model knows timesteps 0\.\.999",
        ),
        ({"timestep": torch.tensor([19.98, 3.0])}, r"timestep 19\.98 is not a whole number"),
        ({"cross_attention_kwargs": {"scale": 1}}, "does not know the argument 'cross_attention_kwargs'"),
    ],
)
def test_what_the_graph_cannot_take_is_refused(ours, arguments, message):
    usual = {
        "hidden_states": torch.zeros(2, 4, 8, 8),
        "timestep": torch.tensor([5, 5]),
        "class_labels": torch.zeros(2).long(),
    }
    with pytest.raises(UsageError, match=message):
        ours(**usual | arguments)


def test_a_fork_of_the_process_is_refused(ours, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 12345)
    with pytest.raises(BackendError, match="in process 12345, a fork of it"):
        ours(torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1).long())
    monkeypatch.undo()


def test_a_step_engine_is_refused(bundle_of):
    with pytest.raises(UsageError, match=r"model\.engine: holds a step graph.*--graph step"):
        DropIn.open(bundle_of(pixels=False, graph="step"))
    card = read_manifest(bundle_of(pixels=False, graph="step")).card
    with pytest.raises(UsageError, match="holds a step graph"):
        Denoiser(card, lambda inputs: inputs["x"])


def test_a_published_checkpoint_has_other_names_and_serves_too(bundle_of):
    """Its ports are x, timestep, class_labels; the drop-in finds them by their kind."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3, 8, 8)).astype(np.float32), np.array([0, 5])
    with Denoiser.open(bundle_of()) as denoise:
        expected = denoise(x, np.array([7, 7]), y)
        out = DropIn(denoise)(torch.from_numpy(x), 7, torch.from_numpy(y)).sample
    np.testing.assert_array_equal(out.numpy(), expected)


def test_a_closed_denoiser_says_so(engine):
    transformer = DropIn.open(engine, threads=1)
    transformer.close()
    transformer.close()
    with pytest.raises(UsageError, match="this denoiser is closed"):
        transformer(torch.zeros(1, 4, 8, 8), 1, torch.tensor([0]))
    with pytest.raises(UsageError, match=r"DropIn\.open"):
        DropIn.from_pretrained("anything")


def test_a_network_without_settings_is_refused(bundle_of):
    card = replace(read_manifest(bundle_of()).card, config={})
    with pytest.raises(UsageError, match="no settings that a diffusers pipeline reads"):
        DropIn(Denoiser(card, lambda inputs: inputs["x"]))


def test_a_denoiser_is_the_network(bundle_of):
    """float32 in another order than PyTorch's: 1e-4 of the largest value."""
    model = support.tiny_model(pixels=True)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 3, 8, 8)).astype(np.float32)
    t, y = np.array([0, 500, 999]), np.array([0, 4, 5])
    with torch.no_grad():
        expected = model.network(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(y)).numpy()
    with Denoiser.open(bundle_of()) as denoiser:
        out = denoiser(x, t, y)
        np.testing.assert_array_equal(denoiser(x, class_labels=y, timestep=t), out)
        np.testing.assert_array_equal(denoiser(class_labels=y, timestep=t, x=x), out)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_array_equal(denoiser(x[1:2], t[1:2], y[1:2])[0], out[1])
        np.testing.assert_array_equal(denoiser(x.astype(np.float64), t.astype(np.int32), y), out)


@pytest.mark.parametrize(
    ("values", "ports", "message"),
    [
        ([1], {}, r"found 'x'; DiT takes 'x', 'timestep', 'class_labels'"),
        ([1, 2, 3, 4], {}, r"found 4 array\(s\).*expected x, timestep, class_labels, each once"),
        ([1], {"x": 2}, r"found 1 array\(s\) without a name, x; expected x, timestep"),
        ([1, 2], {"labels": 3}, "'labels'; DiT takes"),
    ],
)
def test_a_call_with_other_ports_is_refused(bundle_of, values, ports, message):
    with Denoiser.open(bundle_of()) as denoise, pytest.raises(UsageError, match=message):
        denoise(*values, **ports)


def test_a_fractional_time_port_takes_the_timesteps_of_a_flow():
    ports = Port("z", "state", "float32", (None, 2)), Port("sigma", "time", "float32", (None,))
    model = replace(
        support.tiny_model(), signature=Signature(ports, (None, 2), "Toy"), sampling=SamplingSpec(Flow(), "euler", 4)
    )
    denoise = Denoiser(model.card(), lambda inputs: inputs["z"] + inputs["sigma"][:, None])
    z = np.zeros((2, 2), np.float32)
    assert denoise(z, [0.5, 1000.0]).tolist() == [[0.5, 0.5], [1000, 1000]]
    for bad in (-0.5, 1000.5):
        with pytest.raises(UsageError, match=f"'sigma' {bad} is out of range; this model knows timesteps 0 to 1000"):
            denoise(z, [1.0, bad])


def test_more_rows_than_an_engine_was_built_for_take_several_calls(bundle_of):
    calls = []
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 3, 8, 8)).astype(np.float32)
    t, y = np.arange(5) * 100, np.arange(5)
    with Denoiser.open(bundle_of()) as denoiser:

        def counted(inputs):
            calls.append(len(inputs["x"]))
            return denoiser._engine(inputs)

        np.testing.assert_array_equal(Denoiser(denoiser.card, counted, batch=2)(x, t, y), denoiser(x, t, y))
    assert calls == [2, 2, 1]


def test_the_engines_are_imported_without_torch_and_name_what_the_drop_in_lacks():
    program = (
        "import sys\nsys.modules['diffusers'] = None\nimport tqdit.engines.run.denoiser, tqdit.engines.run.sampler\n"
        "assert 'torch' not in sys.modules and 'onnxruntime' not in sys.modules\n"
        "try:\n    import tqdit.engines.run.drop_in\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "DropIn needs diffusers" in done.stdout
    assert "pip install 'torch>=2.9' 'diffusers>=0.32'" in done.stdout
