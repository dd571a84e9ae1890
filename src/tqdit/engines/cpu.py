"""What this CPU can do with integers."""

from __future__ import annotations

import platform
import re
from pathlib import Path

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm")
WIDE_SUMS, INTEGERS = "VNNI or AMX", "integers"  # what adds up integer products in 32 bits; a key of a bundle's target
_WITH_WIDE_SUMS = {"avx512_vnni", "avx_vnni", "amx_int8"}


def features() -> tuple[str, ...]:
    """Those that decide how fast integers are, on Linux; elsewhere none is known."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return tuple(name for name in FEATURES if lines and name in lines[0].split())


def sums_overflow() -> bool:
    """Whether kernels add pairs of products of uint8 by int8 in 16 bits, which have no place for 2 * 255 * 127.

    So do those for x86 CPUs without VNNI, such as AMD's before Zen 4 and Intel's servers before Cascade Lake.
    """
    known = features()
    return _is_x86() and bool(known) and not _WITH_WIDE_SUMS & {*known}


def target(integers: bool) -> dict[str, str]:
    """What a bundle that is built here needs of a CPU; `integers`: it has products of uint8 by int8."""
    wide = integers and _is_x86() and not sums_overflow()
    return {"machine": platform.machine()} | ({INTEGERS: WIDE_SUMS} if wide else {})


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")
