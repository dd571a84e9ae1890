#!/usr/bin/env python
"""Commands of tqdit in one process, one a line of standard input: PyTorch and diffusers are imported once for all.

    echo "tqdit-export model.onnx" | python scripts/commands.py

Each is shown and does what it does alone; the first one that fails ends the process with its exit code.
"""

from __future__ import annotations

import shlex
import sys

from tqdit.cli.main import run


def main() -> None:
    for line in sys.stdin:
        words = shlex.split(line, comments=True)
        if not words:
            continue
        print("\n$", line.strip(), file=sys.stderr, flush=True)
        code = run(words[0].removeprefix("tqdit-"), words[1:])
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
