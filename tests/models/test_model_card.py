"""Model cards: what they tell, what is assumed without one, and what they refuse."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import support
from tables import Kind, make_table
from tqdit.card import Latents
from tqdit.errors import CheckpointError, TqditWarning
from tqdit.exporter.graph import ExportConfig
from tqdit.models.dit import DiT, randomize
from tqdit.models.load import load_model
from tqdit.models.model_card import ModelCard, card_path
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.process import Diffusion, Flow
from tqdit.sampling.schedule import SamplingSpec


@pytest.fixture
def save(tmp_path):
    """save(card, **config) -> path of a tiny checkpoint in the published layout, with a card if there is one."""

    def write(card=None, **config):
        network = randomize(DiT(replace(support.TINY, **config)), scale=0.3)
        torch.save(network.state_dict(), tmp_path / "own.pt")
        if card is not None:
            text = card if isinstance(card, str) else json.dumps({"heads": 2, **card})
            (tmp_path / "own.json").write_text(text)
        return tmp_path / "own.pt"

    return write


def refusal(path):
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("source", "card"),
    [
        ("dit.pt", "dit.json"),
        ("a.b.safetensors", "a.b.json"),
        ("model.safetensors.index.json", "model.json"),
        ("dit.index.json", "dit.json"),
    ],
)
def test_the_card_of_a_file_has_its_name(source, card):
    assert card_path(Path("x", source)) == Path("x", card)


def test_the_card_of_a_directory_lies_in_it(diffusers_folder):
    (diffusers_folder / "model.json").write_text('{"latent_scale": 0.5, "guidance_scale": 2, "steps": 9}')
    model = load_model(diffusers_folder)
    assert (model.latents, model.guidance, model.sampling.steps) == (Latents(0.5), Guidance(2.0), 9)
    assert model.sampling.process.spacing == "leading"  # as its family has it


def test_a_class_table_of_unusual_size_is_taken_for_one_with_a_null_row_and_this_is_said(save):
    with pytest.warns(TqditWarning, match=r"own\.pt: the last of the 6 rows.*null class.*'num_classes'.*own\.json"):
        model = load_model(save(), heads=2)
    assert (model.signature.label.null, model.signature.label.choices, model.guidance.scale) == (5, 5, 1.5)


def test_a_card_tells_that_the_last_row_is_the_null_class(save):
    model = load_model(save({"num_classes": 5}))
    assert (model.signature.label.null, model.signature.label.choices, model.guidance.channels) == (5, 5, 3)


@pytest.mark.slow
def test_without_a_null_row_every_class_is_a_class_and_nothing_is_guided(save):
    path = save({"num_classes": 6})
    model = load_model(path)
    assert (model.signature.label.null, model.signature.label.choices, model.guidance) == (None, 6, None)
    names = ["a", "b", "c", "d", "e", "f"]
    path.with_suffix(".json").write_text(json.dumps({"heads": 2, "class_names": names}))
    assert (load_model(path).guidance, load_model(path).class_names) == (None, tuple(names))


@pytest.mark.parametrize("rows", [0, 1])
def test_a_network_without_classes_is_unconditional(save, rows):
    model = load_model(save(num_classes=rows - 1 if rows else None), heads=2)
    assert (model.signature.requests, model.guidance, model.signature.names) == ((), None, ("x", "timestep"))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    prediction = model.call({"x": x, "timestep": t})
    network = model.network
    c = network.t_embedder(t)
    if rows:
        c = c + network.y_embedder.embedding_table.weight[0]
    tokens = network.x_embedder(x) + network.pos_embed
    for block in network.blocks:
        tokens = block(tokens, c)
    assert torch.equal(prediction, network.unpatchify(network.final_layer(tokens, c)))


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "space"), [(1, "pixels"), (3, "pixels"), (16, "latents")])
def test_the_space_of_unusual_channels_is_assumed_and_said_unless_a_card_tells_it(save, channels, space):
    path = save({"num_classes": 5}, in_channels=channels, out_channels=channels)
    with pytest.warns(TqditWarning, match=rf"its {channels} channels are taken for {space}.*'space'"):
        model = load_model(path)
    assert (model.latents is None) == (space == "pixels")
    assert model.guidance == Guidance(1.5)
    for told in ("pixels", "latents"):
        path.with_suffix(".json").write_text(json.dumps({"heads": 2, "num_classes": 5, "space": told}))
        assert load_model(path).latents == (None if told == "pixels" else Latents(0.18215))


@pytest.mark.slow
def test_a_diffusers_transformer_of_three_channels_is_taken_for_pixels_and_this_is_said(tmp_path):
    support.diffusers_dit(3).save_pretrained(tmp_path)
    with pytest.warns(TqditWarning, match=r"its 3 channels are taken for pixels.*'space' in '.*model\.json'"):
        assert load_model(tmp_path).latents is None


@pytest.mark.slow
def test_a_published_checkpoint_and_the_demo_assume_nothing(save):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model("demo")
        load_model(save(num_classes=1000), heads=2)


def test_a_card_tells_how_a_model_is_sampled(save):
    card = {"space": "pixels", "class_names": list("abcde"), "guidance_scale": 3.5, "sampler": "ddim", "steps": 40,
            "process": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}}  # fmt: skip
    model = load_model(save(card))
    process = Diffusion("scaled_linear", 0.00085, 0.012, learned_variance=True)  # as the tensors tell
    assert model.sampling == SamplingSpec(process, "ddim", 40)
    assert (model.latents, model.guidance, model.class_names) == (None, Guidance(3.5), tuple("abcde"))


def test_a_card_proposes_a_chain_beside_that_of_the_model(save):
    card = {"num_classes": 5, "sampler": "ddim", "steps": 40, "proposed": {"sampler": "dpm++2m-sde", "steps": 8}}
    model = load_model(save(card))
    process = Diffusion(learned_variance=True)
    own, quick = SamplingSpec(process, "ddim", 40), SamplingSpec(process, "dpm++2m-sde", 8)
    assert model.sampling == own
    assert model.proposed is not None
    np.testing.assert_equal(vars(model.proposed.schedule), vars(quick.schedule))
    flags = ExportConfig(steps=30)
    assert (ExportConfig().sampling(model), flags.sampling(model).steps) == (model.proposed, 30)
    assert ExportConfig(graph="step").sampling(model) == own
    table = make_table(model, Kind())
    for settings, expected in (({}, model.proposed), ({"steps": 20}, own.choose(20)), ({"sampler": "ddpm"}, own.choose(
        sampler="ddpm"))):  # fmt: skip
        assert ExportConfig().sampling(model, replace(table, settings=settings)) == expected


@pytest.mark.parametrize(
    ("proposed", "message"),
    [
        ({"sampler": "euler", "steps": 8}, "sampler 'euler' is unknown, or not one for this model"),
        ({"sampler": "ddim", "steps": 0}, "0"),
        ({"sampler": "ddim"}, "steps"),
    ],
)
def test_a_proposal_that_does_not_fit_is_one_line(save, proposed, message):
    assert message in refusal(save({"num_classes": 5, "proposed": proposed}))


def test_a_card_may_say_that_other_channels_hold_no_variance(save):
    model = load_model(save({"num_classes": 5, "process": {"learned_variance": False}}))
    assert model.sampling.process == Diffusion()
    assert model.signature.output_shape == (8, 8, 8)


def test_a_card_of_rectified_flow_gives_float_times_and_its_own_sampler(save):
    model = load_model(save({"num_classes": 5, "process": {"type": "flow", "shift": 3}}))
    assert model.sampling == SamplingSpec(Flow(1000.0, 3.0), "euler", 250)
    assert model.signature.time.dtype == "float32"
    assert torch.isfinite(model.call({"x": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([0.5, 1000.0]),
                                      "class_labels": torch.tensor([0, 5])})).all()  # fmt: skip


def test_more_guided_channels_than_there_are_is_one_line(save):
    with pytest.raises(CheckpointError, match=r"'guidance_channels' is 9, the model has 4\. Correct the card\."):
        load_model(save({"num_classes": 5, "guidance_channels": 9}))


@pytest.mark.slow
def test_guidance_of_chosen_channels_or_none(save):
    assert load_model(save({"num_classes": 5, "guidance_channels": 4})).guidance == Guidance(1.5, 4)
    model = load_model(save({"num_classes": 5, "guidance_scale": None}))
    assert (model.guidance, model.signature.label.choices) == (None, 5)


@pytest.mark.slow
def test_what_the_caller_says_goes_before_the_card_and_the_card_before_the_file_beside_it(save):
    path = save({"num_classes": 5})
    assert load_model(path, heads=4).network.config.num_heads == 4
    card = ModelCard(heads=1, num_classes=6)
    assert load_model(path, card=card).network.config.num_heads == 1
    assert load_model(path, card=card).signature.label.choices == 6


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ('{"num_heads": 2}', "unknown field `num_heads`"),
        ('{"heads": "2"}', "Expected `int | null`, got `str`"),
        ('{"heads": 0}', "`int` >= 1"),
        ('{"space": "pixel"}', "Invalid enum value 'pixel'"),
        ('{"num_classes": 5.5}', "got `float`"),
        ('{"class_names": ["a"], "num_classes": 5}', "'class_names' are 1, 'num_classes' is 5"),
        ('{"space": "pixels", "latent_scale": 1.0}', "belong to latents"),
        ("[1]", "not a JSON object"),
        ('{"heads": 2', "not a model card (Input data was truncated)"),
        ('{"process":' * 100000, "not a model card"),
    ],
)
def test_a_card_of_unknown_fields_or_values_is_one_line_that_names_it(save, card, found):
    path = save(card)
    text = refusal(path)
    assert text.startswith(f"{path.with_suffix('.json')}: ")
    assert found in text
    assert text.endswith("own-checkpoint.md), or rename it if another program wrote it.")


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ({"num_classes": 4}, "4 classes, the class table has 6 rows, expected 5 (the last row is the null class) or 6"),
        ({"class_names": ["a"]}, "1 classes, the class table has 6 rows"),
        ({"num_classes": 6, "guidance_scale": 2.0}, "no null class to guide with"),
        ({"process": {"beta": 1}}, "unknown field `beta`"),
        ({"process": {"type": "edm"}}, "Invalid value 'edm'"),
        ({"process": {"type": "flow", "beta_start": 0.1}}, "unknown field `beta_start`"),
        ({"process": {"beta_start": "0.1"}}, "Expected `float`, got `str`"),
        ({"process": {"beta_schedule": "cosine"}}, "unknown beta schedule 'cosine'"),
        ({"sampler": "euler"}, "sampler 'euler' is unknown, or not one for this model"),
        ({"steps": 0}, "a whole number from 1 to 1000"),
        ({"latent_scale": 0.0}, "latents of scale 0.0"),
    ],
)
def test_a_card_that_does_not_fit_its_model_is_one_line(save, card, found):
    path = save({"num_classes": 5} | card if "class_names" not in card else card)
    text = refusal(path)
    assert text.startswith(f"{path}: its model card does not fit: ")
    assert found in text


def test_a_card_too_large_to_be_one_is_not_read(save, monkeypatch):
    monkeypatch.setattr("tqdit.models.state.MOST_JSON_BYTES", 10)
    assert "more than 10 bytes" in refusal(save({"num_classes": 5}))


def test_a_card_behind_a_link_out_of_the_folder_is_refused(save, tmp_path):
    path = save({"num_classes": 5})
    secret = path.with_suffix(".json").rename(tmp_path.parent / f"{tmp_path.name}-secret")
    path.with_suffix(".json").symlink_to(secret)
    assert "own.json: a link to" in refusal(path)


def test_the_guide_names_every_field_and_its_cards_are_cards():
    page = (Path(__file__).parents[2] / "docs/guides/own-checkpoint.md").read_text("utf-8")
    rows = [row.split("|")[1] for row in page.splitlines() if row.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(ModelCard.__struct_fields__)
    cards = [msgspec.json.decode(text, type=ModelCard) for text in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    assert [card.classes for card in cards] == [3, 10]
