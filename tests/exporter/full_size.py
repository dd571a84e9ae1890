"""Export a DiT of XL/2's width with a W8A8 table; prints seconds, peak memory and bytes as JSON. Weights are random.

    full_size.py FOLDER BLOCKS [ATTENTION]      # a form of attention, or none: a float file

Run by test_full_size.py and scripts/tensorrt_full_size.py in a process of its own, so that its memory can be measured.
"""

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tables import Kind, make_table
from tqdit.exporter.graph import ExportConfig, export_graph
from tqdit.exporter.onnx_writer import write
from tqdit.models.dit import DiT as Network
from tqdit.models.dit import DiTConfig, randomize
from tqdit.models.families import published

XL = DiTConfig(
    input_size=32, patch_size=2, in_channels=4, out_channels=8, hidden_size=1152, depth=28, mlp_hidden_size=4608,
    num_classes=1000, num_heads=16,
)  # fmt: skip


def peak_bytes() -> int:
    """Of resident memory since this program began; getrusage would begin with that of the process before exec."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main(folder: Path, blocks: int, attention: str = "simulated") -> None:
    network = randomize(Network(replace(XL, depth=blocks))).eval().requires_grad_(False)
    model = published.describe(network, "xl")
    ranges = {product.name: (np.float32([-3, 3]),) * 2 for product in model.products}
    table = make_table(model, Kind(groups=10), operands=ranges)
    started = time.perf_counter()
    quantized = attention != "none"
    config = ExportConfig(attention=attention) if quantized else ExportConfig()
    graph, card = export_graph(model, config, table if quantized else None)
    write(folder / "model.onnx", graph, card)
    print(json.dumps({
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak_bytes(),
        "file_bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "float32_bytes": 4 * sum(parameter.numel() for parameter in network.parameters()),
        "products": card.quantization and card.quantization.summary,
    }))  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
