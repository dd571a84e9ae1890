"""Export and calibrate a transformer of random weights from its directory; prints the memory that each stage added at
its peak, as JSON.

Run by test_large.py in a process of its own. Each stage is a child of a process that has imported everything, so that
imports are paid once and count for none.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import diffusers
import layouts

import tqdit
from tqdit import onnx_file
from tqdit.exporter.graph import ExportConfig, export_graph
from tqdit.exporter.onnx_writer import write
from tqdit.models.dit import DiT, DiTConfig, randomize
from tqdit.models.families import published
from tqdit.models.weights import return_freed_memory


def main(folder: Path, heads: int, stages: list[str]) -> None:
    """Flux with two blocks of each kind, of so many heads."""
    onnx_file.EXTERNAL_DATA_BYTES = 0  # weights beside the file, as those of a network of a gigabyte
    return_freed_memory()  # as the commands do
    assert diffusers.FluxTransformer2DModel
    warm(folder)
    flux = folder / "flux"
    apart(lambda: layouts.prepare(flux, "flux", (2, 2), heads, 64, 16))
    apart(lambda: layouts.write_scales(flux))
    facts = {"file": sum(file.stat().st_size for file in (flux / "transformer").iterdir())}
    for stage in stages:
        apart(lambda stage=stage: added(flux, stage))
        facts[stage] = int((flux / f"{stage}.bytes").read_text())
    print(json.dumps(facts))


def apart(work: Callable[[], None]) -> None:
    """In a child, whose peak begins with what this process holds."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        sys.exit("a stage failed")


def added(folder: Path, stage: str) -> None:
    before = peak()
    transformer, rows = str(folder / "transformer"), {"rows": folder / "calls.safetensors"}
    if stage == "calibrate":
        tqdit.calibrate(transformer, preset="min-max", groups=1, rows_per_group=2, token_share=0.1, **rows)
    else:
        given = {"scales": folder / "scales.safetensors"} if stage == "int8" else rows
        tqdit.export(transformer, folder / f"{stage}.onnx", **given)
    (folder / f"{stage}.bytes").write_text(str(peak() - before))


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
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
