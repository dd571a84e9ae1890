"""Calls of a network alone: what is learned of them, and what an engine made from them does."""

from contextlib import nullcontext

import diffusers
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tqdit
from tqdit.errors import UsageError
from tqdit.models.recording import Recording

KNOBS = {"preset": "min-max", "groups": 2, "rows_per_group": 4, "token_share": 1.0}


class Toy(nn.Module):
    """Its prediction has other channels than its state, so no chain could use it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.time, self.fc1, self.fc2 = nn.Linear(1, 8), nn.Linear(8, 16), nn.Linear(16, 6)

    def forward(self, text, x, timestep, ids=None, factor=1.0, return_dict=True):
        hidden = x + factor * self.time(timestep[:, None] * 0.01)[:, None] + text.mean(1, keepdim=True)
        return (self.fc2(F.gelu(self.fc1(hidden if ids is None else hidden + ids))),)


def rows(count=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, generator=draw), torch.randn(count, 5, 8, generator=draw), torch.arange(count) + 1.0


def record(network, calls):
    with tqdit.record(network) as recorder:
        for args, kwargs in calls:
            network(*args, **kwargs)
    return recorder


def test_arguments_become_ports_and_constants():
    ids = torch.arange(5.0)[:, None]
    (text, x, time), more = rows(), rows(3, seed=1)
    calls = [((text, x, time), {"ids": ids, "factor": 2.0}), (more, {"ids": ids, "factor": 2.0})]
    recording = record(Toy(), calls).recording()
    signature = recording.interface.signature
    assert [(port.name, port.kind, port.shape) for port in signature.ports] == [
        ("text", "state", (None, 3, 8)), ("x", "request", (None, 5, 8)), ("timestep", "time", (None,)),
    ]  # fmt: skip
    assert (signature.output, signature.family) == ((None, 5, 6), "Toy")
    assert len(recording) == 5
    np.testing.assert_array_equal(recording.states[:, 0], torch.cat([text, more[0]]))
    np.testing.assert_array_equal(recording.requests["timestep"], [1, 2, 1, 2, 3])
    np.testing.assert_array_equal(recording.interface.constants["ids"], ids)
    assert recording.interface.constants["factor"] == 2.0


def test_one_timestep_stands_for_all_rows_of_a_call():
    text, x, _ = rows(3)
    recording = record(Toy(), [((text, x, torch.tensor([7])), {})]).recording()
    np.testing.assert_array_equal(recording.requests["timestep"], [7, 7, 7])
    assert recording.requests["timestep"].dtype == np.float32


@pytest.mark.parametrize(
    ("calls", "found"),
    [
        ([], "no call of the Toy"),
        ([(rows(), {"factor": 1.0}), (rows(), {"factor": 2.0})], "'factor' has no rows and changes"),
        ([(rows(), {}), (rows(), {"factor": 2.0})], "'factor' has no rows and changes"),
        ([(rows(), {}), ((torch.zeros(2, 4, 8), *rows()[1:]), {})], "different shapes"),
        ([((*rows()[:2], torch.zeros(3)), {})], "expected timesteps for each row"),
    ],
)
def test_calls_that_differ_in_more_than_their_rows_are_refused(calls, found):
    class Loose(Toy):
        def forward(self, text, x, timestep, **kwargs):
            return super().forward(text, x, timestep[: len(x)], **kwargs)

    Loose.__name__ = "Toy"
    with pytest.raises(UsageError, match=found):
        record(Loose(), calls).recording()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """The folder of a toy's engine, its network and its calls."""
    folder, network = tmp_path_factory.mktemp("calls"), Toy()
    calls = record(network, [(rows(4, seed), {}) for seed in range(2)])
    calls.recording().save(folder / "calls.safetensors")
    tqdit.calibrate(network, rows=folder / "calls.safetensors", output=folder / "scales.safetensors", **KNOBS)
    tqdit.export(network, folder / "model.onnx", scales=folder / "scales.safetensors")
    tqdit.build(folder / "model.onnx", backend="onnxruntime")
    return folder / "model.engine", network, calls


@pytest.mark.slow
def test_an_engine_of_recorded_calls_computes_the_network(engine):
    path, network, _ = engine
    text, x, time = rows(3, seed=9)
    with tqdit.Denoiser.open(path) as denoise:
        found = denoise(text=text, x=x, timestep=time)
    expected = network(text, x, time)[0].detach().numpy()
    assert np.square(found - expected).sum() < 1e-2 * np.square(expected).sum()  # 2e-3: other rows than the scales have


def test_nothing_samples_an_engine_of_recorded_calls(engine):
    with pytest.raises(UsageError, match="recorded without a pipeline"):
        tqdit.Sampler.open(engine[0])


def test_rows_of_calls_are_grouped_by_their_timesteps(engine):
    _, network, calls = engine
    table = tqdit.calibrate(network, rows=calls, **KNOBS)
    assert table.boundaries.tolist() == [2.5]  # half way between the middle ones of 1, 2, 3, 4
    with pytest.raises(UsageError, match="--groups is 5; there are 4 timesteps"):
        tqdit.calibrate(network, rows=calls, **KNOBS | {"groups": 5})


def test_calls_of_a_network_are_read_as_they_were_written(engine):
    path = engine[0].with_name("calls.safetensors")
    again = Recording.load(path).save(path.with_name("again.safetensors"))
    assert again.read_bytes() == path.read_bytes()


class Loop:
    """A pipeline of two rows per image: 4 steps of flow matching, guided, with a text of 50 numbers."""

    def __init__(self, change=0.0):
        self.transformer = Denoise()
        self.scheduler, self.change = diffusers.FlowMatchEulerDiscreteScheduler(), change

    def __call__(self, seed, images=1, text=None, guidance_scale=3, first=0):
        self.scheduler.set_timesteps(4)
        draw = torch.Generator().manual_seed(seed)
        x, drawn = torch.randn(images, 3, 8, generator=draw), torch.randn(2 * images, 50, generator=draw)
        text = drawn if text is None else text
        for t in self.scheduler.timesteps[first:]:
            out = self.transformer(torch.cat([x, x]), t.expand(2 * images), text + self.change * t)
            c, u = out.chunk(2)
            x = self.scheduler.step(u + guidance_scale * (c - u), t, x, return_dict=False)[0]


class Denoise(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.text = nn.Linear(8, 8), nn.Linear(50, 8)

    def forward(self, hidden_states, timestep, text):
        return self.inner(hidden_states) + self.text(text)[:, None] + 0.001 * timestep[:, None, None]


def held_elements(recorder):
    return sum(x.numel() for run in recorder._runs for x in (*run.states, *run.inputs.values()))


def test_a_chain_holds_the_states_of_all_steps_and_its_requests_once():
    pipeline = Loop()
    with tqdit.record(pipeline) as calls:
        pipeline(0)
        assert held_elements(calls) == 4 * 3 * 8 + 2 * 50
        pipeline(1, images=2)
        assert held_elements(calls) == 3 * (4 * 3 * 8 + 2 * 50)
    recording = calls.recording()
    assert recording.states.shape == (3, 4, 3, 8)
    first = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    np.testing.assert_array_equal(recording.states[1:, -1], first)
    np.testing.assert_array_equal(recording.states[0, 2], calls._runs[0].states[1][0])
    assert recording.interface.guidance.scale == 3.0
    assert recording.requests["negative.text"].shape == (3, 50)


@pytest.mark.parametrize("first", [True, False])
def test_a_prompt_that_is_the_negative_one_changes_nothing_for_the_others(first):
    """Its two predictions are alike and tell no guidance; the values of its unconditional row are kept."""
    pipeline, alike = Loop(), torch.ones(2, 50)
    with tqdit.record(pipeline) as calls:
        for text in (alike, None) if first else (None, alike):
            pipeline(0, text=text)
    recording = calls.recording()
    assert recording.interface.guidance.scale == 3.0
    negative = recording.requests["negative.text"][:: 1 if first else -1]
    np.testing.assert_array_equal(negative[0], alike[0])
    assert negative[1].std() > 0.5
    with tqdit.record(pipeline) as calls:
        pipeline(0, text=alike)
    with pytest.raises(UsageError, match="are alike in all steps"):
        calls.recording()


class Mean(Denoise):
    """It takes texts of any length."""

    def forward(self, hidden_states, timestep, text):
        return self.inner(hidden_states) + text.mean(1)[:, None, None] + 0.001 * timestep[:, None, None]


def test_chains_with_texts_of_different_lengths_are_refused():
    pipeline = Loop()
    pipeline.transformer = Mean()
    with tqdit.record(pipeline) as calls:
        for length in (5, 6):
            pipeline(0, text=torch.randn(2, length))
    with pytest.raises(UsageError, match=r"differ in .*shapes.*padded alike"):
        calls.recording()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*")
def test_a_chain_that_begins_with_an_image_is_refused():
    """Pipelines from image to image skip the first steps."""
    from zoo.pipelines import FAMILIES

    pipeline, arguments = FAMILIES["flux"]()
    pipeline = diffusers.FluxImg2ImgPipeline.from_pipe(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(UsageError, match=r"begins at step 3 .*record its network alone"), tqdit.record(pipeline):
        pipeline(image=torch.rand(1, 3, 64, 64), strength=0.6, num_inference_steps=5, **arguments)


def test_chains_of_two_guidance_scales_are_refused_with_both():
    pipeline = Loop()
    with tqdit.record(pipeline) as calls:
        for scale in (3, 7.5):
            pipeline(0, guidance_scale=scale)
    with pytest.raises(UsageError, match=r"guidance scales 3 and 7\.5"):
        calls.recording()


def test_a_chain_of_the_last_steps_alone_is_refused_with_their_number():
    """As pipelines from image to image run it, where the scheduler is not told where they begin."""
    pipeline = Loop()
    with tqdit.record(pipeline) as calls:
        pipeline(0, first=1)
    with pytest.raises(UsageError, match="3 of its 4 steps"):
        calls.recording()


def test_calls_are_taken_once_their_recording_has_ended(tmp_path):
    """Calibration calls the network, too."""
    pipeline = Loop()
    for heard in (pipeline, pipeline.transformer):
        with tqdit.record(heard) as calls:
            pipeline(0)
            with pytest.raises(UsageError, match="still being recorded"):
                tqdit.calibrate(pipeline.transformer, rows=calls)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["recorder", "recording", "file"])
def test_recorded_calls_are_taken_in_each_form(kind, tmp_path):
    pipeline = Loop()
    with tqdit.record(pipeline) as calls:
        pipeline(0)
    recording = calls.recording()
    rows = {"recorder": calls, "recording": recording, "file": recording.save(tmp_path / "calls.safetensors")}[kind]
    knobs = {"preset": "min-max", "groups": 1, "rows_per_group": 2, "token_share": 1.0}
    assert tqdit.calibrate(pipeline.transformer, rows=rows, **knobs).interface is not None
    assert tqdit.export(pipeline.transformer, tmp_path / "m.onnx", rows=rows).exists()


def test_anything_else_as_rows_or_as_the_network_is_one_line(tmp_path):
    pipeline = Loop()
    with tqdit.record(pipeline) as calls:
        pipeline(0)
    for rows in ({"text": 1}, [], 3, torch.nn.Identity()):
        for flow in (tqdit.calibrate, lambda network, rows: tqdit.export(network, tmp_path / "m.onnx", rows=rows)):
            with pytest.raises(UsageError, match=rf"rows are a {type(rows).__name__}, expected"):
                flow(pipeline.transformer, rows=rows)
    with pytest.raises(UsageError, match=r"Loop in memory.*pipeline\.transformer"):
        tqdit.calibrate(pipeline, rows=calls)


def test_calls_of_a_network_are_held_without_their_predictions():
    text, x, time = rows(3)
    recorder = record(Toy(), [((text, x, time), {})] * 2)
    assert all(call.output.is_meta and call.output.shape == (3, 5, 6) for call in recorder._calls)


def test_a_request_that_changes_from_step_to_step_is_named():
    pipeline = Loop(change=1e-3)
    with tqdit.record(pipeline) as calls:
        pipeline(0)
    with pytest.raises(UsageError, match="'text' changes from step to step"):
        calls.recording()


@pytest.mark.parametrize(("left", "refused"), [(10**6, False), (1500, True)])
def test_more_than_fits_into_memory_is_refused_when_a_chain_or_a_call_begins(monkeypatch, left, refused):
    """One chain takes 2 (4 states of 24 numbers and all ports of a step, 150 numbers) of 4 bytes: 1,968."""
    monkeypatch.setattr("tqdit.bounds.memory_left", lambda: left)
    pipeline, network = Loop(), Toy()
    raising = pytest.raises(UsageError, match="of memory are needed") if refused else nullcontext()
    with raising, tqdit.record(pipeline) as calls:
        pipeline(0)
    assert held_elements(calls) == (0 if refused else 196)
    with raising, tqdit.record(network):
        for _ in range(3):
            network(*rows(2))


def test_a_required_argument_that_is_nothing_is_a_constant():
    class Needs(Toy):
        def forward(self, text, x, timestep, image, options, ids=None):
            assert image is None
            assert options == {}
            return super().forward(text, x, timestep, ids)

    calls = record(Needs(), [((*rows(), None, {}), {"ids": None})])
    assert calls.recording().interface.constants == {"image": None, "options": {}}
    table = tqdit.calibrate(Needs(), rows=calls, **KNOBS)
    assert len(table.golden) > 0


class Refuses(Toy):
    """It takes rows only in pairs."""

    def forward(self, text, x, timestep, ids=None):
        if len(x) % 2:
            raise IndexError("an odd number of rows")
        return super().forward(text, x, timestep, ids)


def test_what_a_network_raises_is_one_line_with_its_class():
    calls = record(Refuses(), [(rows(2), {})])
    with pytest.raises(
        UsageError, match=r"Refuses in memory: a call with \d+ rows? failed \(IndexError: an odd number"
    ):
        tqdit.calibrate(Refuses(), rows=calls, **KNOBS | {"rows_per_group": 5, "groups": 1})


class Broken(Toy):
    works = True

    def forward(self, text, x, timestep):
        if not self.works:
            raise NotImplementedError("no kernel")
        return super().forward(text, x, timestep)


def test_a_network_that_cannot_be_observed_is_one_line():
    calls = record(Broken(), [(rows(), {})])
    calls.recording()
    network = Broken()
    network.works = False
    with pytest.raises(UsageError, match=r"observation of one recorded call failed \(NotImplementedError: no kernel"):
        tqdit.calibrate(network, rows=calls, **KNOBS)


class Common(Toy):
    """It computes what is alike for all rows, once."""

    def forward(self, text, x, timestep):
        alike = self.fc1(x.new_ones(1, 3, 8) * x.sum() * 0 + 1).mean()
        return (super().forward(text, x, timestep)[0] + alike,)


def test_a_layer_that_takes_other_rows_than_the_network_is_refused():
    with pytest.raises(UsageError, match=r"takes \[1, 3, 8\] in a call with \d rows, expected values for each row"):
        tqdit.calibrate(Common(), rows=record(Common(), [(rows(), {}), (rows(), {})]), **KNOBS)
