"""A program: launches every kernel at awkward sizes, for compute-sanitizer (see test_device.py)."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import kernel_device
from tqdit.plugins.multi_region_attention.launch import candidates
from tqdit.plugins.multi_region_integer_attention import launch as integer_attention


def main():
    rng = np.random.default_rng(0)
    low = np.array([1 / 127, 1 / 127 / 8], np.float32)
    kernel_device.run_select(np.arange(131) * 7, np.array([100, 500]), rng.random((3, 5), np.float32))
    for columns in (1, 33, 300, 4097):
        for run in (kernel_device.run_softmax, kernel_device.run_numerator):
            run(rng.random((2, 3, 7, columns), np.float32), low, 8, 1 / 127, "fp16")
    for tokens, head in ((33, 72), (197, 72), (300, 88)):
        q, k, v = (rng.integers(-99, 99, (2, 1, tokens, head)).astype(np.float32) for _ in range(3))
        mask = rng.normal(0, 1, (2, 1, tokens, tokens)).astype(np.float32)
        for blocks in candidates("fp16", head, tokens):
            for numerators in (False, True):
                kernel_device.run_attention(q, k, v, mask, low, 8, 1 / 127, 1e-4, "fp16", blocks, numerators)
        inputs = {"q": q, "k": k, "v": v.swapaxes(-1, -2), "mask": mask, "scale": low / 100, "low_scale": low,
                  "out_scale": low * 100, "out_shift": low}  # fmt: skip
        for blocks in integer_attention.candidates(head, tokens):
            for numerators in (False, True):
                kernel_device.run_integer_attention(inputs, 8, 1 / 127, "i8", blocks, numerators)


if __name__ == "__main__":
    main()
