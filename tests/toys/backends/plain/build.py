from tqdit.engines.build.backend import Fitness
from tqdit.engines.bundle import Artefact

OPTIONS = frozenset()
CASTS_FLOATS = False


def fitness():
    return Fitness(1, "a toy")


def float_types(config):
    return ("fp16", "fp32")


def place(config):
    return "anywhere"


def build(source, decoder, card, folder, config, progress):
    source.save_copy(source.model, folder)
    (folder / source.path.name).rename(folder / "graph.onnx")
    return Artefact(entry="graph.onnx", decoder=None, versions={}, target={})
