"""Engine bundles of tiny models, built once."""

import pytest

import support
from tables import make_table
from tqdit.engines import build_engine
from tqdit.export import ExportConfig, write


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory):
    """bundle_of(origin, pixels=..., sampler=..., ...) -> folder of an ONNX Runtime bundle."""
    made = {}

    def build(origin="published", pixels=True, kind=None, **config):
        key = (origin, pixels, kind, *sorted(config.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("bundle")
            table = None if kind is None else make_table(support.tiny_model(origin, pixels=pixels), kind)
            write(folder / "model.onnx", *support.exported(ExportConfig(**config), origin, pixels=pixels, table=table))
            build_engine(folder / "model.onnx", folder / "model.engine")
            made[key] = folder / "model.engine"
        return made[key]

    return build


@pytest.fixture(scope="session")
def bundle(bundle_of):
    """A pixel model of the published kind: DDPM, 20 steps, guided."""
    return bundle_of()
