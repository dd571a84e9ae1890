# ruff: noqa: ARG005 (the changes below share a signature)
"""The scale table's file: exact bytes, round trip, and one line for every way in which it can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from tqdit.cli.main import main
from tqdit.errors import FileFormatError, UsageError
from tqdit.quantization.granularity import PerChannel, PerTensor, PerTimestepGroup, group_of
from tqdit.quantization.quantizer import factor_scales
from tqdit.quantization.schemes.asymmetric import Asymmetric
from tqdit.quantization.schemes.symmetric import Symmetric
from tqdit.quantization.schemes.two_region_gelu import TwoRegionGelu
from tqdit.quantization.schemes.two_region_softmax import TwoRegionSoftmax
from tqdit.quantization.table import (
    METADATA_KEY,
    ScaleTable,
    Site,
    even_boundaries,
    is_scale_table,
    read_scale_table,
    write_scale_table,
)

GOLDEN = Path(__file__).parents[1] / "data" / "scales.safetensors"
Tensors = dict[str, np.ndarray[Any, Any]]


def f32(*values: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(values if len(values) > 1 else values[0], dtype=np.float32)


def small_table() -> ScaleTable:
    """One site of each scheme, two groups of timesteps."""
    groups = PerTimestepGroup(2)
    sites = (
        Site("fc2", "weight", Symmetric(4, PerChannel(0), f32(0.5, 0.25, 1.0)),
             codes=np.array([[-8, 7], [0, 1], [2, 3]], dtype=np.int8)),
        Site("fc2", "input", TwoRegionGelu(8, PerTensor(), f32(0.00132), f32(0.03125))),
        Site("qkv", "weight", Symmetric(8, PerTensor(), f32(0.0078125))),
        Site("qkv", "input", Asymmetric(8, groups, f32(0.5, 0.125), np.array([3, 250], dtype=np.int32))),
        Site("value_product", "left", TwoRegionSoftmax(8, groups, f32(0.001, 0.002), f32(1 / 127))),
        Site("value_product", "right", Symmetric(8, PerTensor(), f32(0.0625))),
    )  # fmt: skip
    return ScaleTable(
        model="demo", fingerprint="ab" * 32, boundaries=even_boundaries(2), sites=sites, seed=7, guidance_scale=1.5,
        settings={"weight_bits": 4}, versions={"tqdit": "0"}, errors={"fc2": 0.001, "qkv": 0.25},
    )  # fmt: skip


def test_the_file_is_the_golden_one_byte_for_byte() -> None:
    """The golden file is `small_table().to_bytes()`; write it anew only together with a new format version."""
    assert small_table().to_bytes() == GOLDEN.read_bytes()


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_scale_table(tmp_path / "s.safetensors", small_table())
    table = read_scale_table(tmp_path / "s.safetensors")
    assert table == small_table()
    assert table.by_module["qkv"]["input"].quantizer.granularity == PerTimestepGroup(2)
    assert table.errors == {"fc2": 0.001, "qkv": 0.25}
    assert is_scale_table(tmp_path / "s.safetensors")


def test_reading_a_table_needs_neither_torch_nor_onnx() -> None:
    code = (
        "import pathlib, sys; from tqdit.quantization.table import read_scale_table; "
        f"read_scale_table(pathlib.Path({str(GOLDEN)!r})); "
        "sys.exit(bool({'torch', 'onnx', 'onnx_ir'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_divisor_travels_with_its_input(tmp_path: Path) -> None:
    site = Site("qkv", "input", Symmetric(8, PerTensor(), f32(0.5)), divisor=f32(1, 2, 4))
    write_scale_table(tmp_path / "s.safetensors", replace(small_table(), sites=(site,)))
    divisor = read_scale_table(tmp_path / "s.safetensors").sites[0].divisor
    assert divisor is not None
    assert divisor.tolist() == [1, 2, 4]


def test_scales_factor_into_a_reference_and_ratios_of_at_most_one() -> None:
    reference, ratio = factor_scales(f32(0.5, 0.125, 0.25))
    assert reference == 0.5
    assert ratio.tolist() == [1, 0.25, 0.5]
    assert small_table().by_module["qkv"]["input"].quantizer.offset.tolist() == [62.5, -15.25]  # type: ignore[attr-defined]


def test_a_boundary_timestep_belongs_to_the_later_group() -> None:
    assert group_of(small_table().boundaries, np.array([0, 499, 500, 999])).tolist() == [0, 0, 1, 1]
    assert group_of(np.array([0.3, 0.7]), np.array([0.0, 0.299, 0.3, 0.7, 1.0])).tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("groups", "expected"), [(1, []), (3, [334, 667]), (4, [250, 500, 750]), (10, list(range(100, 1000, 100)))]
)
def test_even_groups_begin_at_multiples_of_their_length(groups: int, expected: list[int]) -> None:
    assert even_boundaries(groups).tolist() == expected


def test_even_groups_divide_any_span() -> None:
    assert even_boundaries(4, (0.0, 1.0)).tolist() == [0.25, 0.5, 0.75]
    assert even_boundaries(3, (-1, 9)).tolist() == [3, 6]
    assert even_boundaries(3).dtype == np.float64


@pytest.mark.parametrize("groups", [0, -1, 1001])
def test_a_number_of_groups_outside_the_chain_is_refused(groups: int) -> None:
    with pytest.raises(UsageError, match="1 to 1000 groups"):
        even_boundaries(groups)


def test_a_table_of_another_model_is_refused_by_fingerprint() -> None:
    small_table().check_model("ab" * 32, "demo")
    with pytest.raises(UsageError, match=r"calibrated for model 'demo' .* this is 'other.pt'"):
        small_table().check_model("cd" * 32, "other.pt")


def file_of(tensors: Tensors, header: dict[str, Any]) -> bytes:
    content: bytes = safetensors.numpy.save(tensors, {METADATA_KEY: json.dumps(header)})
    return content


def _set(name: str, *values: float, dtype: str = "float32") -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, header: dict[str, Any]) -> None:
        tensors[name] = np.array(values if len(values) > 1 else values[0], dtype=dtype)

    return change


def _drop(name: str) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, header: (tensors.pop(name), None)[1]


def _header(**entries: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, header: header.update(entries)


def _site(index: int, **entries: Any) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, header: header["sites"][index].update(entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("qkv.weight.scale", float("nan")), r"'qkv.weight.scale' holds NaN or infinite values"),
        (_set("qkv.weight.scale", float("inf")), r"'qkv.weight.scale' holds NaN or infinite values"),
        (_set("fc2.input.negative_scale", -1.0), r"'fc2.input.negative_scale' holds -1, expected scales of at least"),
        (_set("fc2.input.positive_scale", 0.0), r"no zero, negative or denormal"),
        (_set("fc2.input.positive_scale", 1e-40), r"no zero, negative or denormal"),
        (_drop("value_product.left.low_scale"), r"'value_product.left.low_scale' is missing"),
        (_drop("boundaries"), r"'boundaries' is missing"),
        (_set("extra.weight.scale", 1.0), r"'extra.weight.scale' belongs to no site"),
        (_set("qkv.weight.codes2", 1.0), r"'qkv.weight.codes2' belongs to no site"),
        (_set("qkv.input.scale", 0.5, 0.5, 0.5), r"'qkv.input.scale' is float32\[3\], expected float32\[2\]"),
        (_set("qkv.weight.scale", 0.5, 0.5), r"'qkv.weight.scale' is float32\[2\], expected float32\[\]"),
        (_set("qkv.weight.scale", 0.5, dtype="float64"), r"'qkv.weight.scale' is float64\[\], expected float32"),
        (_set("qkv.input.zero_point", 3, 256, dtype="int32"), r"'qkv.input.zero_point' holds values outside 0..255"),
        (_set("value_product.left.low_scale", 0.001, 0.5), r"low_scale' is above its high scale"),
        (_set("fc2.weight.codes", 8, 0, dtype="int8"), r"'fc2.weight.codes' leaves -8..7, the range of 4 bits"),
        (_set("fc2.weight.codes", 7, 0, dtype="int8"), r"its 3 scales do not fit axis 0"),
        (_set("fc2.weight.codes", 7, 0, dtype="int32"), r"'fc2.weight.codes' is int32, expected int8"),
        (_set("fc2.input.divisor", 1, -1, 1), r"'fc2.input.divisor' holds -1, expected"),
        (_set("fc2.input.divisor", 1.0), r"'fc2.input.divisor' is float32\[\], expected float32\['channels'\]"),
        (_set("fc2.weight.divisor", 1, 1), r"'fc2.weight.divisor' belongs to an input, not to a weight"),
        (_set("boundaries", 500, 600, dtype="int64"), r"'boundaries' is int64\[2\], expected float64"),
        (_set("boundaries", 500, dtype="float64"), r"'boundaries' is float64\[\], expected float64"),
        (
            lambda t, h: t.update(boundaries=np.array([0.5, np.nan])),
            r"'boundaries' is \[0.5, nan\], expected increasing",
        ),
        (lambda t, h: t.update(boundaries=np.array([np.inf])), r"'boundaries' is \[inf\], expected increasing"),
        (lambda t, h: t.update(boundaries=np.array([5.0, 5.0])), r"'boundaries' is \[5.0, 5.0\], expected increasing"),
        (lambda t, h: t.update(boundaries=np.array([300.0, 600.0])), r"has 2 groups, the table's boundaries make 3"),
        (_header(format_version=3), r"written in format 3, this tqdit reads format 4"),
        (_header(sites="none"), r"metadata: damaged .*`array`.*\$.sites"),
        (_header(errors={"qkv": -1.0}), r"error of 'qkv' is -1"),
        (_header(errors={"qkv": float("nan")}), r"metadata: damaged"),
        (_header(guidance_scale="much"), r"metadata: damaged .*\$.guidance_scale"),
        (_header(seed="seven"), r"metadata: damaged .*\$.seed"),
        (lambda t, h: h.pop("fingerprint") and None, r"metadata: damaged .*fingerprint"),
        (_site(0, scheme="log"), r"'fc2.weight' has scheme 'log'; known are"),
        (_site(2, bits=9), r"'qkv.weight' has 9 bits, expected 2..8"),
        (_site(2, role="bias"), r"'qkv.bias.scale' is missing"),
        (_site(2, granularity="rows"), r"granularity 'rows' is unknown"),
        (_site(2, granularity="group:2"), r"'qkv.weight' has granularity"),
        (lambda t, h: h["sites"][2].pop("bits") and None, r"metadata: damaged .*bits.*sites"),
        (lambda t, h: h["sites"].append(h["sites"][2]), r"'qkv.weight' is listed twice"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(
    tmp_path: Path, change: Callable[[Tensors, dict[str, Any]], None], message: str
) -> None:
    path = tmp_path / "scales.safetensors"
    tensors: Tensors = safetensors.numpy.load(small_table().to_bytes())
    header = msgspec.to_builtins(small_table()._header())
    change(tensors, header)
    path.write_bytes(file_of(tensors, header))
    with pytest.raises(FileFormatError, match=message) as caught:
        read_scale_table(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_an_edited_table_is_read_as_it_is_now(tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    tensors: Tensors = safetensors.numpy.load(small_table().to_bytes())
    tensors["qkv.weight.scale"] = f32(0.25)
    path.write_bytes(file_of(tensors, msgspec.to_builtins(small_table()._header())))
    assert read_scale_table(path).by_module["qkv"]["weight"].arrays()["scale"] == 0.25


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path, content = tmp_path / "scales.safetensors", small_table().to_bytes()
    for length in [0, 4, 8, 100, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(FileFormatError, match="or truncated"):
            read_scale_table(path)


def test_a_flipped_byte_is_refused_in_one_line_or_gives_valid_values(tmp_path: Path) -> None:
    path, content = tmp_path / "scales.safetensors", small_table().to_bytes()
    messages = []
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            read_scale_table(path)
        except FileFormatError as error:
            messages.append(str(error))
    assert len(messages) > 0.5 * len(range(0, len(content), 7))
    assert not [message for message in messages if "\n" in message]


def test_other_safetensors_files_are_not_taken_for_a_table(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors.numpy.save({"w": np.zeros(2)}))
    assert not is_scale_table(path)
    with pytest.raises(FileFormatError, match="not a scale table"):
        read_scale_table(path)
    with pytest.raises(UsageError, match="no such file"):
        read_scale_table(tmp_path / "missing.safetensors")


def test_a_table_in_memory_is_validated_too() -> None:
    with pytest.raises(FileFormatError, match="error of 'qkv' is nan"):
        replace(small_table(), errors={"qkv": float("nan")})
    with pytest.raises(FileFormatError, match="guidance scale is inf"):
        replace(small_table(), guidance_scale=float("inf"))
    with pytest.raises(FileFormatError, match="listed twice"):
        replace(small_table(), sites=small_table().sites * 2)
    site = Site("a", "weight", Asymmetric(8, PerTensor(), f32(1), np.array(0, dtype=np.int32)))
    with pytest.raises(FileFormatError, match="which its role does not allow"):
        replace(small_table(), sites=(site,))


@pytest.mark.slow
def test_inspecting_a_table_tells_what_is_in_it_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, picture = tmp_path / "s.safetensors", tmp_path / "s.png"
    write_scale_table(path, small_table())
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "6 tensors of 3 layers" in said
    assert "1 x weights 4 bits symmetric" in said
    assert "2, on 2 tensors; boundaries [500]" in said
    assert "2.50e-01  qkv" in said
    assert main(["inspect", str(path), "--plot", str(picture)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_table_without_groups_and_errors_shows_the_scales_of_its_weights(tmp_path: Path) -> None:
    sites = tuple(site for site in small_table().sites if site.role == "weight")
    path, picture = tmp_path / "s.safetensors", tmp_path / "s.svg"
    write_scale_table(path, replace(small_table(), sites=sites, errors={}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's about axes that show nothing
        assert main(["inspect", str(path), "--plot", str(picture)]) == 0
    drawn = picture.read_text()
    assert "scales of each layer's weights" in drawn
    assert "group of timesteps" not in drawn


def test_inspecting_a_table_tells_how_far_its_channels_were_equalised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.safetensors"
    site = Site("qkv", "input", Symmetric(8, PerTensor(), f32(0.5)), divisor=f32(0.25, 2, 4))
    write_scale_table(path, replace(small_table(), sites=(site,)))
    assert main(["inspect", str(path)]) == 0
    assert "inputs of 1 layer(s), by divisors from 0.25 to 4" in capsys.readouterr().out
