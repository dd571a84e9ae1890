"""The two extractors behind their one interface, and LPIPS.

Inception's real weights cannot be had here. A small network with torch-fidelity's names stands in for its class, so
that loading, the spatial hook, the order of its values and the batches are tested; docs/evaluation.md says how the real
class was checked.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tqdit.demo.glyphs import draw
from tqdit.errors import CheckpointError, MissingLibraryError, UsageError
from tqdit.evaluate.extractors import InceptionExtractor, JudgeExtractor
from tqdit.evaluate.lpips import STAGES, Lpips


class FakeInception(nn.Module):
    """torch-fidelity's interface: uint8 (N, 3, H, W) to a tuple of the features that were asked for."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 192, 1)
        self.fc = nn.Linear(192, 1008)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spatial = self.Mixed_6d.branch1x1(nn.functional.interpolate(x.float() / 128 - 1, size=(17, 17)))
        pooled = spatial.mean(dim=(2, 3))
        return pooled.repeat(1, 11)[:, :2048], pooled @ self.fc.weight.T


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package, module = (
        types.ModuleType("torch_fidelity"),
        types.ModuleType("torch_fidelity.feature_extractor_inceptionv3"),
    )
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = tmp_path / "inception.pth"
    torch.save(
        {
            "Mixed_6d.branch1x1.weight": torch.randn(192, 3, 1, 1), "Mixed_6d.branch1x1.bias": torch.randn(192),
            "fc.weight": torch.randn(1008, 192), "fc.bias": torch.randn(1008),
        },
        path,
    )  # fmt: skip
    return path


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 20, 20, 3), dtype=np.uint8)


def test_inception_gives_the_features_that_adm_takes(weights):
    extractor = InceptionExtractor(weights)
    images = pictures(5)
    found = extractor(images)
    assert found.pooled.shape == (5, 2048)
    assert found.spatial.shape == (5, 17 * 17 * 7)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-5)
    state = torch.load(weights, weights_only=True)
    x = nn.functional.interpolate(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 128 - 1, size=(17, 17))
    spatial = nn.functional.conv2d(x, state["Mixed_6d.branch1x1.weight"], state["Mixed_6d.branch1x1.bias"])
    expected = spatial[:, :7].permute(0, 2, 3, 1).reshape(5, -1)  # height, width, channel
    np.testing.assert_allclose(found.spatial, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", ["inception", "judge"])
def test_features_do_not_depend_on_how_the_images_come(weights, make):
    extractor = InceptionExtractor(weights) if make == "inception" else JudgeExtractor()
    images = pictures(70) if make == "inception" else draw(70, 0)[0]
    whole, parts = extractor(images), [extractor(images[:1]), extractor(images[1:])]
    for name in ("pooled", "probabilities", "spatial"):
        if getattr(whole, name) is not None:
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_allclose(joined, getattr(whole, name), rtol=1e-4, atol=1e-5)


def test_other_weights_have_another_digest(weights, tmp_path):
    one = InceptionExtractor(weights).digest
    state = torch.load(weights, weights_only=True)
    state["fc.bias"][3] += 1
    torch.save(state, tmp_path / "other.pth")
    assert InceptionExtractor(tmp_path / "other.pth").digest != one
    assert InceptionExtractor(weights).digest == one


def test_weights_of_another_network_are_refused_by_name(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    del state["fc.weight"]
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"3 tensors that are not those of FID's InceptionV3.*fc\.weight"):
        InceptionExtractor(tmp_path / "bad.pth")


def test_without_torch_fidelity_the_pip_command_is_the_answer(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MissingLibraryError, match="pip install torch-fidelity"):
        InceptionExtractor(weights)


def test_the_judge_refuses_images_of_another_size():
    with pytest.raises(UsageError, match="the judge knows images of 16x16, these are 20x20"):
        JudgeExtractor()(pictures(2))


@pytest.fixture
def lpips_files(tmp_path: Path) -> tuple[Path, Path]:
    """Random weights in torchvision's and LPIPS' layouts, at a sixteenth of the width."""
    vgg, width = {}, 3
    for stage, layers in enumerate(STAGES):
        for layer in layers:
            out = (4, 8, 16, 32, 32)[stage]
            vgg[f"features.{layer}.weight"] = torch.randn(out, width, 3, 3) / (3 * width**0.5)
            vgg[f"features.{layer}.bias"] = torch.zeros(out)
            width = out
    linear = {f"lin{i}.model.1.weight": torch.rand(1, out, 1, 1) for i, out in enumerate((4, 8, 16, 32, 32))}
    torch.save(vgg, tmp_path / "vgg.pth")
    torch.save(linear, tmp_path / "lin.pth")
    return tmp_path / "vgg.pth", tmp_path / "lin.pth"


def test_lpips_is_zero_for_equal_images_symmetric_and_grows_with_the_change(lpips_files):
    lpips = Lpips(*lpips_files)
    a = pictures(3)
    np.testing.assert_array_equal(lpips(a, a), 0)
    noise = np.random.default_rng(1).normal(0, 1, a.shape)
    near, far = (np.clip(a + size * noise, 0, 255).astype(np.uint8) for size in (4, 60))
    assert (lpips(a, near) > 0).all()
    assert (lpips(a, near) < lpips(a, far)).all()
    np.testing.assert_allclose(lpips(a, far), lpips(far, a), rtol=1e-5)


def test_lpips_is_the_sum_over_stages_of_weighted_distances_of_unit_channels(lpips_files):
    """The first stage by hand: with the other stages' weights at zero it is all there is."""
    vgg, linear = (torch.load(path, weights_only=True) for path in lpips_files)
    for index in range(1, 5):
        linear[f"lin{index}.model.1.weight"].zero_()
    torch.save(linear, lpips_files[1])
    a, b = pictures(1), pictures(2)[1:]

    def unit(image: np.ndarray) -> Tensor:
        x = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        for layer in (0, 2):
            x = torch.relu(nn.functional.conv2d(x, vgg[f"features.{layer}.weight"], padding=1))
        return x / (x.norm(dim=1, keepdim=True) + 1e-10)

    difference = (unit(a) - unit(b)) ** 2
    expected = (difference * linear["lin0.model.1.weight"]).sum(dim=1).mean()
    assert Lpips(*lpips_files)(a, b)[0] == pytest.approx(float(expected), rel=1e-4)


def test_lpips_files_in_the_wrong_order_are_refused(lpips_files):
    with pytest.raises(CheckpointError, match=r"holds no 'features\.0\.weight'"):
        Lpips(lpips_files[1], lpips_files[0])
