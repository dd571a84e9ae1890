"""What a CPU can do with integers."""

from pathlib import Path

import pytest

from tqdit.engines import cpu

CASES = {
    "Zen 3": ("x86_64", "flags\t\t: fpu sse avx avx2 fma", True),
    "Skylake server": ("x86_64", "flags\t\t: fpu avx2 avx512f avx512bw", True),
    "Zen 4": ("x86_64", "flags\t\t: fpu avx2 avx512f avx512_vnni", False),
    "Alder Lake": ("x86_64", "flags\t\t: fpu avx2 avx_vnni", False),
    "Sapphire Rapids": ("AMD64", "flags\t\t: avx2 avx512f avx512_vnni amx_int8", False),
    "Neoverse": ("aarch64", "Features\t: fp asimd asimddp i8mm", False),
    "a system that does not tell": ("x86_64", None, False),
}


@pytest.mark.parametrize("name", CASES)
def test_sums_overflow_on_x86_without_vnni(name, monkeypatch):
    machine, line, overflow = CASES[name]

    def read_text(path, **_):
        assert str(path) == "/proc/cpuinfo"
        if line is None:
            raise FileNotFoundError(path)
        return f"processor\t: 0\n{line}\nbugs\t: none\n"

    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert cpu.sums_overflow() is overflow
    wide = {"integers": "VNNI or AMX"} if machine != "aarch64" and not overflow else {}
    assert cpu.target(integers=True) == {"machine": machine} | wide
    assert cpu.target(integers=False) == {"machine": machine}
