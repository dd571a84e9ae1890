"""Engine bundles of tiny models, built once."""

import pytest

import support
from tqdit.engines import build_engine
from tqdit.export import ExportConfig, write


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory):
    """bundle_of(origin, pixels=..., sampler=..., ...) -> folder of an ONNX Runtime bundle."""
    made = {}

    def build(origin="published", pixels=True, **config):
        key = (origin, pixels, *sorted(config.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("bundle")
            write(folder / "model.onnx", *support.exported(ExportConfig(**config), origin, pixels=pixels))
            build_engine(folder / "model.onnx", folder / "model.engine")
            made[key] = folder / "model.engine"
        return made[key]

    return build


@pytest.fixture(scope="session")
def bundle(bundle_of):
    """A pixel model of the published kind: DDPM, 20 steps, guided."""
    return bundle_of()
