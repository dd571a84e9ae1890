"""Custom ops of exported graphs, domain `tqdit`, version 1: one folder per op (docs/ops.md is the spec).

`reference.py` is the op in ten lines of NumPy, `schema.py` its signature and its body in standard ops. The body travels
inside every file that uses the op, so a file runs without a kernel.
"""

DOMAIN = "tqdit"
VERSION = 1
