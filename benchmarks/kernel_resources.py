"""What the compiler makes of each kernel in each of its block shapes, with or without a GPU.

    python benchmarks/kernel_resources.py [--kinds attention ...] [--head 72] [--tokens 256 1024] [--json FILE]

Registers and spilled bytes of a thread, shared memory of a block, warps that fit one multiprocessor, and where the
scores of an attention stay on chip (straight-line code, so the static count is what runs) the instructions of one
thread per score. From NVIDIA's assembler and disassembler, which Triton brings along.

Tensors are float16; of integer attention q, k, v and the result are int8. Attention by numerators is compiled in its
default block shape alone, softmaxes also for rows that are too long for the registers. TimeGroupSelect has ten groups
of float32, as in an exported file.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tqdit.extras import missing
from tqdit.plugins import aot
from tqdit.plugins.kernels import Kernel
from tqdit.plugins.multi_region_attention import launch as attention
from tqdit.plugins.multi_region_integer_attention import launch as integer_attention
from tqdit.plugins.multi_region_softmax import launch as softmax
from tqdit.plugins.time_group_select import launch as select

# Shared bytes, warps and blocks of one multiprocessor
# (https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities).
LIMITS = {
    (8, 0): (167936, 64, 32), (8, 6): (102400, 48, 16), (8, 9): (102400, 48, 24), (9, 0): (233472, 64, 32),
    (12, 0): (102400, 48, 24),
}  # fmt: skip
KINDS = (
    "attention", "integer attention", "numerator attention", "numerator integer attention", "softmax", "numerator",
    "select",
)  # fmt: skip
REGISTERS = 65536  # of one multiprocessor
REGISTERS_AT_ONCE = 8  # a thread gets a multiple
SHARED_OF_A_BLOCK = 1024  # what the driver takes for itself
BITS, HIGH_STEP, BOUNDARIES = 8, 1 / 127, 9
LONG_ROW = 2 * softmax.TILE


@dataclass(frozen=True)
class Case:
    """A kernel, what tells it from its neighbours, and the scores of one program if they stay on chip."""

    kernel: Kernel
    facts: dict[str, object]
    scores: int | None = None


def cases(kind: str, head: int, tokens: list[int]) -> Iterator[Case]:
    """Every specialisation of a kind of kernel."""
    if kind == "select":
        yield Case(select.kernel("fp32", BOUNDARIES), {"boundaries": BOUNDARIES})
    elif kind in ("softmax", "numerator"):
        for keys in (*tokens, LONG_ROW):
            kernel = softmax.kernel("fp16", keys, BITS, HIGH_STEP, numerators=kind == "numerator")
            yield Case(kernel, {"tokens": keys, "rows": dict(kernel.constants)["BLOCK_ROWS"]})
    else:
        integer, numerators = "integer" in kind, "numerator" in kind
        side, result = (integer_attention, "i8") if integer else (attention, "fp16")
        for keys in tokens:
            shapes = (
                integer_attention.candidates(head, keys, large=True)
                if integer else attention.candidates("fp16", head, keys, large=True)
            )  # fmt: skip
            for blocks in shapes[:1] if numerators else shapes:
                kernel = side.kernel(result, keys, keys, head, BITS, HIGH_STEP, blocks, numerators=numerators)
                scores = blocks.queries * keys if keys <= 2 * blocks.keys else None
                yield Case(kernel, {"tokens": keys, "head": head, **vars(blocks)}, scores)


def tool(name: str) -> Path:
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        raise SystemExit(str(missing("triton", "triton", "kernel_resources.py")))
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name


def resources(kind: str, case: Case, capability: tuple[int, int]) -> dict[str, object]:
    compiled = aot.compile_kernel(case.kernel, capability)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(compiled.ptx)
        target = re.findall(r"^\.target (\w+)", compiled.ptx, re.MULTILINE)[0]
        assembler = "ptxas-blackwell" if capability >= (10, 0) else "ptxas"
        command: list[str | Path] = [tool(assembler), f"-arch={target}", "-v", source, "-o", binary]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([tool("cuobjdump"), "--dump-sass", binary], capture_output=True, text=True, check=True)
    registers = int(re.findall(r"Used (\d+) registers", log)[0])
    spilled = int((re.findall(r"(\d+) bytes spill stores", log) or ["0"])[0])
    facts: dict[str, object] = {
        "kernel": kind, "capability": capability, **case.facts, "warps": compiled.threads // 32,
        "registers": registers, "spilled_bytes": spilled, "shared_bytes": compiled.shared_bytes,
        "warps_per_sm": warps_of_sm(capability, registers, compiled),
    }  # fmt: skip
    if case.scores is not None:
        names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w+)", sass.stdout, re.MULTILINE)
        counts = Counter(name for name in names if name not in ("NOP", "BRA"))
        of_thread = case.scores / compiled.threads
        facts["instructions_per_score"] = sum(counts.values()) / of_thread
        facts["exponentials_per_score"] = counts["MUFU"] / of_thread
    return facts


def warps_of_sm(capability: tuple[int, int], registers: int, compiled: aot.CompiledKernel) -> int:
    """That fit one multiprocessor at once."""
    shared, warps, blocks = LIMITS[capability]
    given = -(-registers // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    of_block = compiled.threads // 32
    fitting = (REGISTERS // (given * compiled.threads), shared // (compiled.shared_bytes + SHARED_OF_A_BLOCK))
    return min(*fitting, warps // of_block, blocks) * of_block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--head", type=int, default=72)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = []
    for kind in args.kinds:
        for case in cases(kind, args.head, args.tokens):
            for capability in LIMITS:
                found.append(resources(kind, case, capability))
                print(" ".join(f"{key}={value:.1f}" if isinstance(value, float) else f"{key}={value}"
                               for key, value in found[-1].items()))  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
