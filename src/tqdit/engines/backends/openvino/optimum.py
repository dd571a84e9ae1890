"""The transformer of a bundle in the layout of optimum-intel's pipelines: DIR/transformer/openvino_model.xml.

Such a pipeline (OVDiffusionPipeline) feeds the transformer by the names that diffusers gives its arguments, and reads
config.json. Arguments that are constants of our graph are inputs that nothing uses. Source of the layout:
optimum-intel, optimum/intel/openvino/modeling_diffusion.py.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from tqdit.card import GraphCard
from tqdit.engines.backends.openvino.build import GRAPH_FILE
from tqdit.engines.backends.openvino.library import core_of, load_library
from tqdit.errors import UsageError
from tqdit.files import check_only, whole_folder
from tqdit.sampling.forecasts import RESIDUAL
from tqdit.version import __version__

FOLDER, MODEL, CONFIG = "transformer", "openvino_model.xml", "config.json"
WRITTEN_BY = "_tqdit_version"  # in the configuration: the folder is ours
ALWAYS = ("hidden_states", "timestep", "encoder_hidden_states")
# What a pipeline feeds besides, if its family has it, and the shape of each; None: free.
OPTIONAL: dict[str, tuple[int | None, ...]] = {
    "pooled_projections": (None, None), "guidance": (None,), "encoder_attention_mask": (None, None),
    "img_ids": (None, 3), "txt_ids": (None, 3), "height": (), "width": (), "num_frames": (),
    "rope_interpolation_scale": (None,),
}  # fmt: skip


def check_optimum(card: GraphCard, folder: Path) -> None:
    """Raise UsageError for a graph that optimum-intel does not feed, OutputError for a place that is taken."""
    names = card.signature.names
    missing = [name for name in ALWAYS if name not in names]
    foreign = [name for name in names if name not in (*ALWAYS, *OPTIONAL)]
    if card.graph != "denoiser" or missing or foreign:
        raise UsageError(
            f"--optimum: the {card.graph} graph takes {', '.join(card.inputs)}; optimum-intel's pipelines feed "
            f"{', '.join(ALWAYS)} and of others only {', '.join(OPTIONAL)}. Use the drop-in."
        )
    if card.rows is not None:
        raise UsageError(f"--optimum: the graph takes {card.rows} row a call, optimum-intel's pipelines pass more.")
    _check_place(folder / FOLDER)


def write_optimum(bundle: Path, card: GraphCard, folder: Path) -> Path:
    """Write FOLDER/transformer of an OpenVINO bundle, whole or not at all; its path."""
    ov = load_library()
    target = folder / FOLDER
    with whole_folder(target, _check_place) as temporary:
        model = core_of(ov).read_model(bundle / GRAPH_FILE)
        for name in card.constants:
            if name in OPTIONAL:
                shape = [-1 if size is None else size for size in OPTIONAL[name]]
                port = ov.opset13.parameter(ov.PartialShape(shape), ov.Type.f32, name=name)
                port.output(0).set_names({name})
                model.add_parameters([port])
        for result in model.get_results():
            if RESIDUAL in result.input_value(0).get_names():  # of forecasts, which its pipelines do not make
                model.remove_result(result)
        # the pipeline compiles the file with its own settings; this one it can bring along
        model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        ov.save_model(model, temporary / MODEL, compress_to_fp16=False)
        config = {"_class_name": card.signature.family, WRITTEN_BY: __version__, **card.config}
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return target


def _check_place(target: Path) -> None:
    ours = False
    with suppress(OSError, ValueError, TypeError):
        ours = WRITTEN_BY in json.loads((target / CONFIG).read_text(encoding="utf-8"))
    names = {MODEL, str(Path(MODEL).with_suffix(".bin")), CONFIG} if ours else set()
    check_only(target, names.__contains__, "a transformer that tqdit-build wrote")
