"""Text encoders that stay in their files: the same graphs as from memory, and when diffusers loads them instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support import few
from tqdit.errors import CheckpointError
from tqdit.exporter import text as exporter
from tqdit.models import directories, encoders, weights
from tqdit.models.recorded import recorded_model
from tqdit.models.recorder import Recorder
from zoo.test_texts import latents, record
from zoo.texts import OTHERS, TEXTS, flux_with_clip, pixart_with_t5, sd3_with_clip

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

TABLE, TIED = "shared.weight", "encoder.embed_tokens.weight"  # of T5; published files have one of them or both
FIRST = "encoder.block.0.layer.0.SelfAttention.q.weight"


@pytest.fixture(autouse=True)
def streamed(monkeypatch):
    monkeypatch.setattr(weights, "LARGE", 64)


def saved(family, folder, dtype=torch.bfloat16):
    """A pipeline as it is in its directory, and its arguments; text encoders in shards of this type."""
    pipeline, arguments = family()
    encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part]
    for encoder in encoders:
        encoder.to(dtype)
    pipeline.save_pretrained(folder, max_shard_size="20KB")
    whole = directories.open_pipeline(str(folder))
    whole.tokenizer_max_length = getattr(pipeline, "tokenizer_max_length", None)
    return whole, arguments


@pytest.fixture
def pixart(tmp_path):
    saved(pixart_with_t5, tmp_path)
    return tmp_path


def opened(folder):
    """The encoder of a directory and where its weights lie."""
    pipeline, values = directories.open_texts(str(folder))
    return pipeline.text_encoder, values


def rewrite(folder, change, name="model.safetensors"):
    """One file in place of the shards, with other tensors."""
    tensors = {}
    for file in (folder / "text_encoder").glob("model*"):
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        file.unlink()
    change(tensors)
    save_file(tensors, folder / "text_encoder" / name, {"format": "pt"})


@pytest.mark.parametrize("name", few([*TEXTS, *OTHERS], "pixart-sigma", "sd3"))
def test_the_graph_is_that_of_encoders_in_memory(name, tmp_path, monkeypatch):
    """Of shards in bfloat16 or float16, with float32 and with int8 weights. With int8 weights alone where there are
    three encoders, since their small weights stay float32."""
    monkeypatch.setattr("tqdit.exporter.passes.weight_only.LEAST", 256)
    monkeypatch.setattr(exporter, "INT8_TOLERANCE", 1.0)  # saturated attention
    folder, dtype = tmp_path / "dir", torch.float16 if name == "sd3" else torch.bfloat16
    whole, arguments = saved({**TEXTS, **OTHERS}[name], folder, dtype)
    model = recorded_model(whole.transformer, record(whole, arguments).interface)
    lent, values = directories.open_texts(str(folder))
    assert len(values.made) > 10
    assert all(parameter in values or parameter.numel() < 64 for parameter in lent.text_encoder.parameters())
    lent.tokenizer_max_length = whole.tokenizer_max_length
    for int8 in (True,) if name == "sd3" else (False, True):
        content = []
        for number, (each, given) in enumerate([(lent, values), (whole, weights.IN_MEMORY)]):
            place = tmp_path / f"{int8}{number}"
            place.mkdir()
            exporter.trace_text(each, model, "x", int8, given).write(place, "x")
            content.append({file.name: file.read_bytes() for file in place.iterdir()})
        assert content[0] == content[1]
        assert not any(b".py" in each for each in content[0].values())  # source lines of the exporting machine


def test_a_large_pipeline_is_recorded_from_its_files_as_from_memory(tmp_path, monkeypatch):
    whole, arguments = saved(sd3_with_clip, tmp_path / "dir")
    assert directories.open_for_prompts(str(tmp_path / "dir"))[1] is weights.IN_MEMORY
    monkeypatch.setattr(directories, "MOST_LOADED", 0)
    lent, values = directories.open_for_prompts(str(tmp_path / "dir"))
    lent.tokenizer_max_length = whole.tokenizer_max_length
    for network in (lent.transformer, lent.text_encoder, lent.text_encoder_2, lent.text_encoder_3):
        assert all(parameter in values for parameter in network.parameters() if parameter.numel() >= 64)
    content = []
    for pipeline, given in ((whole, weights.IN_MEMORY), (lent, values)):
        with Recorder(pipeline) as recorder, given.lent():
            latents(pipeline, arguments, "a word", generator=torch.Generator().manual_seed(0))
        content.append(recorder.recording().save(tmp_path / "calls.safetensors").read_bytes())
    assert content[0] == content[1]


def test_a_pipeline_with_encoders_of_other_types_is_opened_in_float32(tmp_path):
    """The type that their configuration names does not fit the transformer's."""
    pipeline, _ = saved(flux_with_clip, tmp_path)
    assert json.loads((tmp_path / "text_encoder" / "config.json").read_text())["dtype"] == "bfloat16"
    for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


def test_a_weight_is_read_when_it_is_needed_and_not_kept(pixart, monkeypatch):
    reads = []
    read = weights._of_file
    monkeypatch.setattr(weights, "_of_file", lambda path, name: reads.append(name) or read(path, name))
    network, values = opened(pixart)
    assert not [name for name in reads if name.endswith("q.weight")]
    with torch.no_grad(), values.lent():
        network(input_ids=torch.ones(1, 4, dtype=torch.int64))
    assert reads.count(FIRST) == 1
    assert reads.count(TABLE) == 1
    assert not any(parameter.any() for parameter in network.parameters() if parameter in values)


@pytest.mark.parametrize("both", [True, False])
def test_a_table_that_the_file_holds_under_both_names_is_one_parameter(pixart, both):
    def change(tensors):
        table = tensors.pop(TABLE)
        tensors |= {TIED: table} | ({TABLE: table.clone()} if both else {})

    table = directories.open_pipeline(str(pixart)).text_encoder.shared.weight
    rewrite(pixart, change)
    network, values = opened(pixart)
    assert network.shared.weight in values
    assert network.encoder.embed_tokens.weight.data_ptr() == network.shared.weight.data_ptr()
    assert torch.equal(values.read(network.shared.weight), table)


def test_the_names_of_published_clip_files_are_known(tmp_path):
    """With the prefix of older versions, and a table of positions that is no parameter."""
    pipeline, _ = saved(flux_with_clip, tmp_path)
    expected = dict(pipeline.text_encoder.named_parameters())

    def change(tensors):
        names = {name: name if name.startswith("text_model.") else f"text_model.{name}" for name in tensors}
        for name, other in names.items():
            tensors[other] = tensors.pop(name)
        tensors["text_model.embeddings.position_ids"] = torch.arange(12)[None]

    rewrite(tmp_path, change)
    network, values = opened(tmp_path)
    for name, parameter in network.named_parameters():
        assert torch.equal(values.read(parameter), expected[name])
    assert any(parameter in values for parameter in network.parameters())


@pytest.mark.parametrize("size", ["20KB", "5GB"])
def test_the_variant_of_the_transformer_is_taken(tmp_path, size):
    """In shards, and in one file; of an encoder that does not have it, the weights without one."""
    pipeline, _ = pixart_with_t5()
    folder = tmp_path / "dir"
    pipeline.save_pretrained(folder, variant="fp16", max_shard_size=size)
    assert any("fp16" in file.name for file in (folder / "text_encoder").iterdir())
    pipeline.text_encoder.requires_grad_(False).shared.weight.mul_(2)
    pipeline.text_encoder.save_pretrained(tmp_path / "plain", max_shard_size=size)
    shutil.copytree(tmp_path / "plain", folder / "text_encoder", dirs_exist_ok=True)
    network, values = opened(folder)
    assert torch.equal(2 * values.read(network.shared.weight), pipeline.text_encoder.shared.weight)
    for file in (folder / "text_encoder").glob("*fp16*"):
        file.unlink()
    network, values = opened(folder)
    assert torch.equal(values.read(network.shared.weight), pipeline.text_encoder.shared.weight)


def test_encoders_that_transformers_makes_otherwise_are_loaded_whole(pixart):
    """Two tables that differ, a type that is no float, or a quantized network: diffusers says what comes of it."""
    path = pixart / "text_encoder" / "config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "quantization_config": {}}))
    assert weightless(pixart) is None
    path.write_text(before)
    assert weightless(pixart) is not None

    def change(tensors):
        tensors[TIED] = -tensors[TABLE]

    rewrite(pixart, change)
    assert weightless(pixart) is None


def test_a_part_whose_name_leads_elsewhere_is_not_opened(pixart):
    told = ["transformers", "T5EncoderModel"]
    assert encoders.open_encoders(pixart, {"text_encoder": told}, None)[0]
    assert not encoders.open_encoders(pixart, {"text_encoder/../text_encoder": told}, None)[0]
    assert not encoders.open_encoders(pixart, {"text_encoder": ["transformers", "NoSuchModel"]}, None)[0]


def weightless(folder):
    return encoders._open("T5EncoderModel", Path(folder) / "text_encoder", None)


@pytest.mark.parametrize("change", [
    lambda tensors: tensors.pop(FIRST),
    lambda tensors: tensors.update({FIRST: tensors[FIRST][:-1].clone()}),
])  # fmt: skip
def test_a_file_with_another_layout_is_left_to_diffusers(pixart, change):
    rewrite(pixart, change)
    assert weightless(pixart) is None


def test_a_pickled_encoder_is_left_to_diffusers(pixart):
    for file in (pixart / "text_encoder").glob("model*"):
        file.rename(file.with_suffix(".bin"))
    assert weightless(pixart) is None


def test_a_value_that_is_no_number_is_named_with_its_file(pixart):
    rewrite(pixart, lambda tensors: tensors[FIRST].fill_(torch.nan))
    network, values = opened(pixart)
    with (
        pytest.raises(CheckpointError, match=rf"model.safetensors: '{FIRST}' holds NaN"),
        torch.no_grad(),
        values.lent(),
    ):
        network(input_ids=torch.ones(1, 4, dtype=torch.int64))
