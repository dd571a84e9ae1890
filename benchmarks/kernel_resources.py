"""What the compiler makes of the block shapes of fused attention, of float16 and of int8, with or without a GPU.

    python benchmarks/kernel_resources.py [--kinds fp16 int8] [--head 72] [--tokens 256 1024] [--json resources.json]

Registers and spilled bytes of a thread, shared memory of a block, warps that fit one multiprocessor, and where the
scores stay on chip (straight-line code, so the static count is what runs) the instructions of one thread per score.
Of int8, q, k, v and the result are int8.
From NVIDIA's assembler and disassembler, which Triton brings along.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from tqdit.extras import missing
from tqdit.plugins import aot
from tqdit.plugins.kernels import Kernel
from tqdit.plugins.multi_region_attention import launch as attention
from tqdit.plugins.multi_region_integer_attention import launch as integer_attention

SHARED = {(8, 0): 167936, (8, 9): 102400, (9, 0): 233472, (12, 0): 102400}  # bytes of one multiprocessor
KINDS = ("fp16", "int8")
REGISTERS = 65536  # of one multiprocessor
SHARED_OF_A_BLOCK = 1024  # what the driver takes for itself


def tool(name: str) -> Path:
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise SystemExit(str(missing("triton", "triton", "kernel_resources.py")))
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name


def shapes_of(kind: str, head: int, tokens: int) -> tuple[attention.Blocks, ...]:
    if kind == "int8":
        return integer_attention.candidates(head, tokens, large=True)
    return attention.candidates("fp16", head, tokens, large=True)


def kernel_of(kind: str, head: int, tokens: int, blocks: attention.Blocks) -> Kernel:
    make, type_of_result = (integer_attention.kernel, "i8") if kind == "int8" else (attention.kernel, "fp16")
    return make(type_of_result, tokens, tokens, head, 8, 1 / 127, blocks)


def resources(
    kind: str, capability: tuple[int, int], head: int, tokens: int, blocks: attention.Blocks
) -> dict[str, object]:
    compiled = aot.compile_kernel(kernel_of(kind, head, tokens, blocks), capability)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(compiled.ptx)
        target = re.findall(r"^\.target (\w+)", compiled.ptx, re.MULTILINE)[0]
        assembler = "ptxas-blackwell" if capability >= (10, 0) else "ptxas"
        command = [tool(assembler), f"-arch={target}", "-v", source, "-o", binary]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([tool("cuobjdump"), "--dump-sass", binary], capture_output=True, text=True, check=True)
    registers = int(re.findall(r"Used (\d+) registers", log)[0])
    spilled = int((re.findall(r"(\d+) bytes spill stores", log) or ["0"])[0])
    blocks_of_sm = min(
        REGISTERS // (registers * compiled.threads), SHARED[capability] // (compiled.shared_bytes + SHARED_OF_A_BLOCK)
    )
    facts: dict[str, object] = {
        "kernel": kind, "capability": capability, "tokens": tokens, "head": head, **vars(blocks),
        "registers": registers, "spilled_bytes": spilled, "shared_bytes": compiled.shared_bytes,
        "warps_per_sm": blocks_of_sm * compiled.threads // 32,
    }  # fmt: skip
    if tokens <= 2 * blocks.keys:
        names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w+)", sass.stdout, re.MULTILINE)
        counts = Counter(name for name in names if name not in ("NOP", "BRA"))
        scores = blocks.queries * tokens / compiled.threads
        facts["instructions_per_score"] = sum(counts.values()) / scores
        facts["exponentials_per_score"] = counts["MUFU"] / scores
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--head", type=int, default=72)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = []
    for kind, tokens, capability in itertools.product(args.kinds, args.tokens, SHARED):
        for blocks in shapes_of(kind, args.head, tokens):
            found.append(resources(kind, capability, args.head, tokens, blocks))
            print(" ".join(f"{key}={value:.1f}" if isinstance(value, float) else f"{key}={value}"
                           for key, value in found[-1].items()))  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
