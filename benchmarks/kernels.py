"""The plugins' Triton kernels on a CUDA GPU against PyTorch, eager and compiled, and against attention that does not
round: flash attention, cuDNN's, and TensorRT's own where tensorrt is installed.

    python benchmarks/kernels.py [--json kernels.json]
    python benchmarks/kernels.py --sweep [--int8]    # every block shape of the fused attention, to choose the defaults
    python benchmarks/kernels.py --dry-run           # tiny shapes in Triton's CPU interpreter; its times mean nothing

Shapes of DiT-XL/2: 16 heads of 72, float16, 256 and 1,024 tokens; an image with guidance is two rows, so batch 8 is 16
rows. Each time is that of one call inside a CUDA graph of many calls, which go round input sets that together exceed
the L2 cache; the median over replays, and the spread from the 10th to the 90th percentile.

Every kernel is compared with a float64 reference before it is timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

DRY_RUN = "--dry-run" in sys.argv
if DRY_RUN:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton decides when it is imported

import torch
import triton
from tensorrt_attention import tensorrt_attention
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tqdit.plugins import kernels
from tqdit.plugins.multi_region_attention import launch as attention_launch
from tqdit.plugins.multi_region_integer_attention import launch as integer_launch
from tqdit.plugins.multi_region_softmax import launch as softmax_launch
from tqdit.plugins.time_group_select import launch as select_launch

DEVICE = "cpu" if DRY_RUN else "cuda"
HEADS, HEAD, BITS = (2 if DRY_RUN else 16), 72, 8
TOP = kernels.top_code(BITS)
HIGH_STEP = 1 / TOP
BATCHES, TOKENS = ((1,), (40, 150)) if DRY_RUN else ((1, 8, 32), (256, 1024))
SEED = 0
OUT_STEP = 0.5  # of int8 results, whose values of attention are a few units of v's codes
SETS_BYTES = 200e6  # of all input sets together: several times the L2 cache of current chips


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    kernel: str
    variant: str
    batch: int
    tokens: int
    median_us: float
    p10_us: float
    p90_us: float
    bytes: int  # the fewest that a call must move
    flops: int  # of its products, 0 where it has none


Call = Callable[..., Tensor]


def time_call(call: Call, sets: list[tuple[Tensor, ...]], replays: int = 40) -> tuple[float, float, float]:
    """(median, 10th, 90th percentile) in microseconds per call of replays of a CUDA graph."""
    if DRY_RUN:
        start = time.perf_counter()
        call(*sets[0])
        return ((time.perf_counter() - start) * 1e6,) * 3
    calls = max(8, len(sets))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in sets[:2]:
            call(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(*sets[i % len(sets)])
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    tenths = statistics.quantiles(times, n=10)
    return statistics.median(times), tenths[0], tenths[-1]


def input_sets(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    first = make()
    size = sum(each.nbytes for each in first)
    count = 1 if DRY_RUN else min(40, math.ceil(SETS_BYTES / size))
    return [first] + [make() for _ in range(count - 1)]


def compiled(call: Call) -> Call:
    return call if DRY_RUN else torch.compile(call, dynamic=False)


def quantize(scores: Tensor, low_scale: Tensor, numerators: bool = False) -> Tensor:
    """What the op computes, as PyTorch operations; also the float64 reference."""
    p = torch.softmax(scores.float() if scores.dtype != torch.float64 else scores, -1)
    if numerators:
        largest = p.amax(-1, keepdim=True)
        return round_in_regions(p / largest, low_scale) * largest
    return round_in_regions(p, low_scale)


def round_in_regions(p: Tensor, low_scale: Tensor) -> Tensor:
    s1 = low_scale.to(p.dtype).view(-1, 1, 1, 1)
    low = torch.round(p / s1)
    return torch.where(low <= TOP, low * s1, torch.clamp(torch.round(p / HIGH_STEP), max=TOP) * HIGH_STEP)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, low_scale: Tensor, scale: float) -> Tensor:
    return quantize(q @ k.mT * scale, low_scale).to(v.dtype) @ v


def low_scales(rows: int) -> Tensor:
    """One of the method's candidates per row."""
    return (HIGH_STEP * 2.0 ** -torch.randint(0, BITS, (rows,), device=DEVICE)).float()


def attention_inputs(rows: int, tokens: int) -> tuple[Tensor, ...]:
    """Integer codes, as the exporter hands them over; scores of standard deviation 3."""
    shape = (rows, HEADS, tokens, HEAD)
    q, k, v = ((torch.randn(shape, device=DEVICE) * 40).round().clamp(-128, 127).half() for _ in range(3))
    return q, k, v, low_scales(rows)


SCALE = 3 / (40 * 40 * math.sqrt(HEAD))


def fused_attention(tokens: int, blocks: attention_launch.Blocks | None = None, numerators: bool = False) -> Call:
    kernel = attention_launch.kernel("fp16", tokens, tokens, HEAD, BITS, HIGH_STEP, blocks, numerators=numerators)
    no_mask = torch.zeros((1, 1, 1, 1), device=DEVICE)

    def call(q: Tensor, k: Tensor, v: Tensor, low_scale: Tensor) -> Tensor:
        launch = attention_launch.launch(kernel, len(q), HEADS, len(low_scale), SCALE)
        return kernels.run(kernel, launch, (q, k, v, no_mask, low_scale), torch.empty_like(q))

    return call


def as_int8(q: Tensor, k: Tensor, v: Tensor, low_scale: Tensor) -> tuple[Tensor, ...]:
    """The same inputs as integer attention takes them: v as columns."""
    return q.to(torch.int8), k.to(torch.int8), v.mT.contiguous().to(torch.int8), low_scale


def integer_attention(
    tokens: int, out: str = "fp16", blocks: attention_launch.Blocks | None = None, numerators: bool = False
) -> Call:
    """out: 'fp16', or 'i8' in steps of OUT_STEP."""
    kernel = integer_launch.kernel(out, tokens, tokens, HEAD, BITS, HIGH_STEP, blocks, numerators=numerators)
    no_mask = torch.zeros((1, 1, 1, 1), device=DEVICE)
    scale, out_scale, out_shift = (
        torch.tensor([number], device=DEVICE) for number in (SCALE, 1 / OUT_STEP if out == "i8" else 1.0, 0.0)
    )

    def call(q: Tensor, k: Tensor, v: Tensor, low_scale: Tensor) -> Tensor:
        launch = integer_launch.launch(kernel, len(q), HEADS, 1, 1, len(low_scale), 1, 1)
        result = torch.empty(q.shape, dtype=torch.int8 if out == "i8" else torch.float16, device=DEVICE)
        return kernels.run(kernel, launch, (q, k, v, no_mask, scale, low_scale, out_scale, out_shift), result)

    return call


def check_attention(call: Call, tokens: int, numerators: bool = False, int8: bool = False, step: float = 1.0) -> float:
    """Relative L2 error against float64; the rounding of the output to float16 alone is about 2e-4.

    int8: the call takes int8. step: of an int8 result, whose rounding is then allowed for.
    """
    q, k, v, low_scale = attention_inputs(2, tokens)
    expected = quantize(q.double() @ k.double().mT * SCALE, low_scale, numerators) @ v.double()
    out = call(*(as_int8(q, k, v, low_scale) if int8 else (q, k, v, low_scale)))
    allowed = 3e-3
    if out.dtype == torch.int8:
        expected = expected.clamp(-128 * step, 127 * step)
        allowed += step / 2 * math.sqrt(expected.numel()) / float(expected.norm())
    error = float((out.double() * step - expected).norm() / expected.norm())
    if not error < allowed:
        raise SystemExit(f"fused attention over {tokens} tokens: relative error {error:.2e}, expected below "
                         f"{allowed:.0e}")  # fmt: skip
    return error


def not_rounded(backend: SDPBackend) -> Call:
    """PyTorch's attention by one backend; the interpreter's machine has cuDNN's in name alone."""

    def call(q: Tensor, k: Tensor, v: Tensor, low_scale: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH if DRY_RUN else backend):
            return F.scaled_dot_product_attention(q, k, v, scale=SCALE)

    return call


flash_attention = not_rounded(SDPBackend.FLASH_ATTENTION)


def runs(name: str, call: Call, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a variant of a library takes these inputs; one that does not is named."""
    try:
        call(*inputs)
    except RuntimeError as error:
        print(f"no row '{name}': {str(error).splitlines()[0]}")
        return False
    return True


def attention_timings(batch: int, tokens: int) -> list[Timing]:
    rows = 2 * batch
    sets = input_sets(lambda: attention_inputs(rows, tokens))
    elements = rows * HEADS * tokens * HEAD

    def eager(q: Tensor, k: Tensor, v: Tensor, low_scale: Tensor) -> Tensor:
        return eager_attention(q, k, v, low_scale, SCALE)

    variants: dict[str, Call] = {
        "fused": fused_attention(tokens),
        "fused, numerators": fused_attention(tokens, numerators=True),
        "eager": eager,
        "torch.compile": compiled(eager),
        "flash, not rounded": flash_attention,
    }
    cudnn, tensorrt = not_rounded(SDPBackend.CUDNN_ATTENTION), tensorrt_attention(rows, HEADS, tokens, HEAD, SCALE)
    if runs("cuDNN, not rounded", cudnn, sets[0]):
        variants["cuDNN, not rounded"] = cudnn
    if tensorrt is not None:
        print(f"batch {batch}, {tokens} tokens: TensorRT's layers {', '.join(tensorrt.layers)}")
        variants["TensorRT, not rounded"] = tensorrt
    variants["fused, again"] = fused_attention(tokens)
    flops = 4 * rows * HEADS * tokens * tokens * HEAD
    found = [
        Timing("MultiRegionAttention", name, batch, tokens, *time_call(call, sets), 4 * 2 * elements, flops)
        for name, call in variants.items()
    ]
    int8_sets = [as_int8(*each) for each in sets]  # as many: half of the bytes, but still beyond the cache
    for name, out, numerators in (("int8 in", "fp16", False), ("int8 in and out", "i8", False),
                                  ("int8 in and out, numerators", "i8", True)):  # fmt: skip
        timed = time_call(integer_attention(tokens, out, numerators=numerators), int8_sets)
        moved = (4 if out == "i8" else 5) * elements
        found.append(Timing("MultiRegionAttention", f"fused, {name}", batch, tokens, *timed, moved, flops))
    return found


def softmax_timings(batch: int, tokens: int) -> list[Timing]:
    rows = 2 * batch
    shape = (rows, HEADS, tokens, tokens)
    sets = input_sets(lambda: ((torch.randn(shape, device=DEVICE) * 3).half(), low_scales(rows)))
    kernel = softmax_launch.kernel("fp16", tokens, BITS, HIGH_STEP)

    def ours(scores: Tensor, low_scale: Tensor) -> Tensor:
        launch = softmax_launch.launch(kernel, len(scores), HEADS, tokens, len(low_scale))
        return kernels.run(kernel, launch, (scores, low_scale), torch.empty_like(scores))

    scores, low_scale = sets[0][0][:2], sets[0][1][:2]
    expected = quantize(scores.double(), low_scale)
    flips = ((ours(scores, low_scale).double() - expected).abs() > 1e-3 * expected + 1e-7).double().mean()
    if not flips <= 1e-4:
        raise SystemExit(f"MultiRegionSoftmax: {flips:.2e} of the elements differ, expected at most 1e-4")
    eager = lambda scores, low_scale: quantize(scores, low_scale).half()  # noqa: E731
    variants: dict[str, Call] = {
        "kernel": ours,
        "eager": eager,
        "torch.compile": compiled(eager),
        "softmax, not rounded": lambda scores, _: torch.softmax(scores, -1),
    }
    return [
        Timing("MultiRegionSoftmax", name, batch, tokens, *time_call(call, sets), 2 * 2 * math.prod(shape), 0)
        for name, call in variants.items()
    ]


def select_timings(batch: int) -> list[Timing]:
    rows, groups = 2 * batch, 10
    boundaries = torch.arange(100, 1000, 100, device=DEVICE)
    sets = [(torch.randint(0, 1000, (rows,), device=DEVICE), torch.rand(groups, device=DEVICE)) for _ in range(8)]
    kernel = select_launch.kernel("fp32", groups - 1)

    def ours(timestep: Tensor, table: Tensor) -> Tensor:
        launch = select_launch.launch(rows, 1)
        return kernels.run(kernel, launch, (timestep, boundaries, table), torch.empty(rows, device=DEVICE))

    eager = lambda timestep, table: table[(timestep[:, None] >= boundaries[None]).sum(1)]  # noqa: E731
    if not torch.equal(ours(*sets[0]), eager(*sets[0])):
        raise SystemExit("TimeGroupSelect differs from its reference")
    variants: dict[str, Call] = {"kernel": ours, "eager": eager, "torch.compile": compiled(eager)}
    return [
        Timing("TimeGroupSelect", name, batch, 0, *time_call(call, sets), rows * 12, 0)
        for name, call in variants.items()
    ]


def ceilings() -> tuple[float, float]:
    """(bytes per second of a large copy, reads and writes counted; float16 FLOP per second of a large product)."""
    big = torch.randn(2**20 if DRY_RUN else 2**30, device=DEVICE)
    target = torch.empty_like(big)
    copy_us = time_call(lambda a, b: b.copy_(a), [(big, target)], 10)[0]
    n = 64 if DRY_RUN else 8192
    a, b = (torch.randn(n, n, device=DEVICE).half() for _ in range(2))
    product_us = time_call(torch.mm, [(a, b)], 10)[0]
    return 2 * big.nbytes / copy_us * 1e6, 2 * n**3 / product_us * 1e6


def usable(tokens: int, blocks: attention_launch.Blocks, int8: bool) -> bool:
    """Compile it and compare it with the reference; a shape that does not fit the chip is named."""
    try:
        check_attention(swept(tokens, blocks, int8), tokens, int8=int8, step=OUT_STEP if int8 else 1.0)
    except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
        print(f"{tokens} tokens, {blocks}: {str(error).splitlines()[0]}")
        return False
    return True


def swept(tokens: int, blocks: attention_launch.Blocks, int8: bool) -> Call:
    return integer_attention(tokens, "i8", blocks) if int8 else fused_attention(tokens, blocks)


def sweep(tokens: list[int], batches: list[int], int8: bool) -> list[dict[str, object]]:
    """Times of every block shape, of the kernel whose inputs and result are int8 or float16."""
    found: list[dict[str, object]] = []
    for count in tokens:
        shapes = [
            attention_launch.Blocks(*shape)
            for shape in itertools.product((64, 128), (32, 64, 128, 256), (4, 8), (1, 2, 3, 4))
            if shape[1] <= count and (2 * shape[1] < count or shape[3] == 1)  # tiles are in flight in a loop alone
        ]
        start = time.time()
        shapes = [blocks for blocks in shapes if usable(count, blocks, int8)]
        print(f"{count} tokens: {len(shapes)} block shapes compiled in {time.time() - start:.0f} s")
        for batch in batches:
            sets = input_sets(functools.partial(attention_inputs, 2 * batch, count))
            flash = time_call(flash_attention, sets, 20)[0]
            sets = [as_int8(*each) for each in sets] if int8 else sets
            timed = [(time_call(swept(count, blocks, int8), sets, 20)[0], blocks) for blocks in shapes]
            timed.sort(key=lambda each: each[0])
            print(f"batch {batch}, {count} tokens: flash {flash:.1f} us")
            for us, blocks in timed[:8]:
                print(f"  {us:9.1f} us  {us / flash:5.2f}x  {blocks}")
            found += [{"tokens": count, "batch": batch, "flash_us": flash, "us": us, **asdict(blocks)}
                      for us, blocks in timed]  # fmt: skip
    return found


def report(timings: list[Timing], copy_rate: float, product_rate: float) -> None:
    print(f"\ncopy {copy_rate / 1e12:.2f} TB/s, float16 product {product_rate / 1e12:.0f} TFLOP/s")
    print(f"{'kernel':<21} {'variant':<34} {'batch':>5} {'tokens':>6} {'median us':>10} {'p10':>9} {'p90':>9} "
          f"{'roofline':>8}")  # fmt: skip
    for t in timings:
        floor = max(t.bytes / copy_rate, t.flops / product_rate) * 1e6
        print(f"{t.kernel:<21} {t.variant:<34} {t.batch:5d} {t.tokens:6d} {t.median_us:10.1f} {t.p10_us:9.1f} "
              f"{t.p90_us:9.1f} {floor / t.median_us:8.1%}")  # fmt: skip
    by_name = {(t.variant, t.batch, t.tokens): t.median_us for t in timings if t.kernel == "MultiRegionAttention"}
    ours = ("fused", "fused, int8 in and out")
    theirs = ("flash, not rounded", "cuDNN, not rounded", "TensorRT, not rounded")
    for batch, tokens, one, other in itertools.product(BATCHES, TOKENS, ours, theirs):
        if (one, batch, tokens) in by_name and (other, batch, tokens) in by_name:
            ratio = by_name[one, batch, tokens] / by_name[other, batch, tokens]
            print(f"'{one}' over '{other}', batch {batch}, {tokens} tokens: {ratio:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--int8", action="store_true", help="sweep the kernel whose inputs and result are int8")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not DRY_RUN and not torch.cuda.is_available():
        raise SystemExit("benchmarks/kernels.py needs a CUDA GPU, or --dry-run")
    torch.manual_seed(SEED)
    facts: dict[str, object] = {
        "machine": "interpreter" if DRY_RUN else torch.cuda.get_device_name(), "python": platform.python_version(),
        "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda, "seed": SEED,
        "heads": HEADS, "head": HEAD, "bits": BITS, "type": "float16",
    }  # fmt: skip
    if args.sweep:
        facts["sweep"] = sweep(args.tokens, args.batches, args.int8)
    else:
        errors = {tokens: check_attention(fused_attention(tokens), tokens) for tokens in args.tokens}
        for tokens in args.tokens:
            check_attention(fused_attention(tokens, numerators=True), tokens, numerators=True)
            check_attention(integer_attention(tokens), tokens, int8=True)
            for numerators in (False, True):
                check_attention(integer_attention(tokens, "i8", numerators=numerators), tokens, numerators, True,
                                OUT_STEP)  # fmt: skip
        print("relative error of the fused attention against float64:", errors)
        copy_rate, product_rate = ceilings()
        timings = [t for batch in args.batches for t in select_timings(batch)]
        for batch, tokens in itertools.product(args.batches, args.tokens):
            timings += softmax_timings(batch, tokens) + attention_timings(batch, tokens)
            if not DRY_RUN:
                torch.cuda.empty_cache()
        report(timings, copy_rate, product_rate)
        facts |= {"copy_bytes_per_s": copy_rate, "product_flop_per_s": product_rate, "relative_error": errors,
                  "timings": [asdict(t) for t in timings]}  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
