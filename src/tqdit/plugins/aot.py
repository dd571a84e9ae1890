"""Kernels compiled ahead of time: Triton source to PTX on a machine with or without a GPU, kept in a cache on disk.

A compilation runs in a fresh process: whether Triton interprets or compiles is decided when it is imported, and the
caller's process may have decided for the interpreter.

Triton gives an entry one or two parameters more than its source shows, pointers to scratch memory. None of our kernels
uses them (checked here), and TensorRT passes none, so they are taken out of the PTX.

An entry is named after its content: TensorRT knows kernels by name alone, and all tactics of a plugin would otherwise
share the PTX that was registered last, each with its own launch (pytorch/TensorRT pull request 4147).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import msgspec

from tqdit.errors import BackendError
from tqdit.extras import missing
from tqdit.files import cache_folder, whole_file
from tqdit.plugins.kernels import Kernel

# PTX of a capability runs on every later one, whose driver compiles it. That of 9.0 names features of its own chip
# alone ('sm_90a'), so it runs there and nowhere else.
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
PORTABLE = (8, 0)
ONLY_THERE = (9, 0)
# The oldest version of PTX that has the target, which the most drivers and releases of TensorRT read: 8.0 is CUDA 12.0
# (driver R525), 8.7 is CUDA 12.8 (R570). Triton's own choice is that of its assembler.
PTX_VERSION, PTX_VERSION_OF_BLACKWELL = 80, 87
FORMAT = 2  # of the cached files
MAX_SCRATCH_PARAMETERS = 2


@dataclass(frozen=True)
class CompiledKernel:
    """An entry whose parameters are exactly its kernel's."""

    name: str
    ptx: str
    threads: int  # of a block
    shared_bytes: int  # of dynamic shared memory
    capability: tuple[int, int]


def compile_kernel(kernel: Kernel, capability: tuple[int, int] = PORTABLE) -> CompiledKernel:
    """PTX of one kernel for a compute capability, from the cache if it is there.

    Raises MissingLibraryError without Triton, BackendError if the compiler fails.
    """
    path = cache_folder("kernels") / f"{kernel.function}-{_key(kernel, capability)}.json"
    cached = _read(path)
    if cached is None:
        cached = _compile_in_fresh_process(kernel, capability)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_bytes(msgspec.json.encode(cached))
    return cached


def best_capability(device: tuple[int, int] | None) -> tuple[int, int]:
    """What to compile for, given the capability of the device (None: unknown): its own, or what it runs."""
    if device is None or device == ONLY_THERE:
        return device or PORTABLE
    return max((each for each in CAPABILITIES if each <= device and each != ONLY_THERE), default=PORTABLE)


def strip_scratch(ptx: str, entry: str, visible: int) -> str:
    """Take the hidden trailing parameters out of an entry of `visible` parameters.

    Raises BackendError if there are more than Triton is known to add, or if the code reads one.
    """
    match = re.search(rf"(\.visible \.entry {re.escape(entry)}\()(.*?)(\n?\))", ptx, re.DOTALL)
    parameters = match.group(2).split(",") if match else []
    hidden = [parameter.split()[-1] for parameter in parameters[visible:]]
    body = ptx[match.end() :] if match else ""
    used = [name for name in hidden if re.search(rf"\b{re.escape(name)}\b", body)]
    if len(parameters) < visible or len(hidden) > MAX_SCRATCH_PARAMETERS or used:
        raise BackendError(
            f"the PTX of '{entry}' has {len(parameters)} parameters, {len(used)} hidden ones in use; expected "
            f"{visible} and at most {MAX_SCRATCH_PARAMETERS} unused ones. This Triton is not known to tqdit: install "
            "another one, or use --no-plugins."
        )
    assert match is not None
    return ptx[: match.start(2)] + ",".join(parameters[:visible]) + ptx[match.end(2) :]


def name_by_content(ptx: str, entry: str) -> tuple[str, str]:
    """(name, PTX) with the entry and its parameters named after the text."""
    name = f"{entry}_{hashlib.sha256(ptx.encode()).hexdigest()[:16]}"
    return name, re.sub(rf"\b{re.escape(entry)}(?=\b|_param_)", name, ptx)


def _key(kernel: Kernel, capability: tuple[int, int]) -> str:
    """Of everything that decides the PTX: the specialisation, the sources, and the compiler's version."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError as error:
        raise missing("triton", "triton", "compiling kernels") from error
    digest = hashlib.sha256(msgspec.json.encode((FORMAT, kernel, capability, version)))
    for module in (kernel.module, "tqdit.plugins.triton_math", "tqdit.plugins.aot"):
        digest.update(Path(__file__).parents[2].joinpath(*module.split(".")).with_suffix(".py").read_bytes())
    return digest.hexdigest()[:32]


def _read(path: Path) -> CompiledKernel | None:
    """A cached kernel; a damaged file counts as none and is written anew."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=CompiledKernel)
    except (OSError, msgspec.MsgspecError, UnicodeError):
        return None


def _compile_in_fresh_process(kernel: Kernel, capability: tuple[int, int]) -> CompiledKernel:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    # No paths of this machine in the PTX, which ends up in engines.
    environment["TRITON_DISABLE_LINE_INFO"] = "1"
    request = msgspec.json.encode((kernel, capability)).decode()
    command = [sys.executable, "-m", "tqdit.plugins.aot"]
    done = subprocess.run(command, input=request, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BackendError(f"Triton cannot compile '{kernel.function}' for compute capability "
                           f"{capability[0]}.{capability[1]}: {reason}. Use --no-plugins.")  # fmt: skip
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=CompiledKernel)


def _compile(kernel: Kernel, capability: tuple[int, int]) -> CompiledKernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _key_by_version(triton)
    # TensorRT aligns its tensors far beyond the 16 bytes that wide loads need.
    aligned = {(i,): [["tt.divisibility", 16]] for i, (_, kind) in enumerate(kernel.parameters) if kind[0] == "*"}
    source = ASTSource(
        fn=kernel.load(),
        # Triton wants every argument of the function in its order; ours end with the constants.
        signature={**dict(kernel.parameters), **{name: "constexpr" for name, _ in kernel.constants}},
        constexprs=dict(kernel.constants),
        attrs=aligned,
    )
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    version = PTX_VERSION if capability < (10, 0) else PTX_VERSION_OF_BLACKWELL
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "ptx_version": version}
    compiled = triton.compile(source, target=target, options=options)
    facts = compiled.metadata
    assert facts.global_scratch_size == 0, "a kernel of ours asks for scratch memory, which TensorRT does not give"
    ptx = strip_scratch(compiled.asm["ptx"], facts.name, len(kernel.parameters))
    if capability != ONLY_THERE:  # Triton says 'sm_120a', of which our kernels use nothing
        ptx = re.sub(r"^(\.target sm_\d+)a\b", r"\1", ptx, flags=re.MULTILINE)
    name, ptx = name_by_content(ptx, facts.name)
    return CompiledKernel(name, ptx, facts.num_warps * 32, facts.shared, capability)


def _key_by_version(triton: ModuleType) -> None:
    """Triton hashes its own libraries, half a gigabyte, to key its cache by them: most of the time that a small kernel
    takes. Its version is enough, as for our cache.
    """
    for module in (triton.runtime.cache, triton.compiler.compiler):  # the release decides which of them has it
        if hasattr(module, "triton_key"):
            module.triton_key = lambda: f"tqdit, triton {triton.__version__}"


def _main() -> None:
    compiled = _compile(*msgspec.json.decode(sys.stdin.read(), type=tuple[Kernel, tuple[int, int]]))
    sys.stdout.write(msgspec.json.encode(compiled).decode() + "\n")


if __name__ == "__main__":
    _main()
