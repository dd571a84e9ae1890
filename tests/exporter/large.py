"""Export or calibrate a transformer's directory; prints the memory that it added to the process at its peak, as JSON.

Run by test_large.py in a process of its own, so that its memory can be measured.
"""

import json
import resource
import sys
from pathlib import Path

import tqdit
from tqdit import onnx_file
from tqdit.exporter.graph import ExportConfig, export_graph
from tqdit.exporter.onnx_writer import write
from tqdit.models.dit import DiT, DiTConfig, randomize
from tqdit.models.families import published
from tqdit.models.weights import return_freed_memory


def main(folder: Path, form: str) -> None:
    onnx_file.EXTERNAL_DATA_BYTES = 0  # weights beside the file, as those of a network of a gigabyte
    return_freed_memory()  # as the commands do
    warm(folder)
    before = peak()
    scales = folder / "scales.safetensors"
    transformer, rows = str(folder / "transformer"), {"rows": folder / "calls.safetensors"}
    if form == "calibrate":
        tqdit.calibrate(transformer, preset="min-max", groups=1, rows_per_group=2, token_share=0.1, **rows)
    else:
        tqdit.export(transformer, folder / "model.onnx", **({"scales": scales} if form == "int8" else rows))
    print(json.dumps({"added_bytes": peak() - before}))


def warm(folder: Path) -> None:
    """What is imported and cached by any export."""
    config = DiTConfig(
        input_size=8, patch_size=2, in_channels=4, out_channels=8, hidden_size=16, depth=1, mlp_hidden_size=32,
        num_classes=3, num_heads=2,
    )  # fmt: skip
    model = published.describe(randomize(DiT(config)).eval().requires_grad_(False), "tiny")
    write(folder / "warm.onnx", *export_graph(model, ExportConfig()))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
