"""Kernels compile to PTX without a GPU, once, with exactly the parameters that TensorRT passes."""

import importlib.util
import itertools
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from support import few
from tqdit.errors import BackendError
from tqdit.plugins import aot
from tqdit.plugins.multi_region_attention import launch as attention
from tqdit.plugins.multi_region_integer_attention import launch as integer_attention
from tqdit.plugins.multi_region_softmax import launch as softmax
from tqdit.plugins.time_group_select import launch as select

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 and Arm only")

SHARED_LIMIT = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376, (9, 0): 232448, (12, 0): 101376}  # bytes of one block


def kernels_of(floats):
    return [
        select.kernel(floats, 9),
        softmax.kernel(floats, 256, 8, 1 / 127),
        attention.kernel(floats, 256, 256, 72, 8, 1 / 127),
        attention.kernel(floats, 1024, 1024, 72, 8, 1 / 127),
        attention.kernel(floats, 32_760, 32_760, 128, 8, 1 / 127, numerators=True),
        softmax.kernel(floats, 32_760, 8, 1 / 127, numerators=True),
        attention.kernel(floats, 256, 256, 72, 8, 1 / 127, mask=(1, 1, 256)),
        integer_attention.kernel(floats, 256, 256, 72, 8, 1 / 127),
        integer_attention.kernel("i8", 1024, 1024, 72, 8, 1 / 127),
        integer_attention.kernel("i8", 300, 77, 128, 8, 1 / 127, mask=(1, 1, 77), numerators=True),
    ]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One cache for this file, away from the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


def entry_parameters(ptx, name):
    text = re.search(rf"\.entry {name}\((.*?)\)", ptx, re.DOTALL)
    return [line.split()[1] for line in text.group(1).strip().splitlines()]


def assemble(compiled, folder):
    """What NVIDIA's assembler, which Triton brings along, says of the PTX as TensorRT gets it."""
    (folder / "kernel.ptx").write_text(compiled.ptx)
    assembler = "ptxas-blackwell" if compiled.capability >= (10, 0) else "ptxas"
    path = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / assembler
    target = re.search(r"^\.target (\w+)", compiled.ptx, re.MULTILINE).group(1)
    command = [path, f"-arch={target}", "-v", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


CAPABILITIES = aot.CAPABILITIES
KERNELS = range(len(kernels_of("fp16")))


@pytest.mark.parametrize(("index", "capability"), few(
    itertools.product(KERNELS, CAPABILITIES),
    *((0, capability) for capability in CAPABILITIES), *((index, (9, 0)) for index in KERNELS),
))  # fmt: skip
def test_kernels_compile_for_every_capability(index, capability, tmp_path):
    kernel = kernels_of("fp16")[index]
    compiled = aot.compile_kernel(kernel, capability)
    kinds = [".u64" if kind[0] == "*" else ".u32" for _, kind in kernel.parameters]
    assert entry_parameters(compiled.ptx, compiled.name) == kinds
    assert re.fullmatch(rf"{kernel.function}_[0-9a-f]{{16}}", compiled.name)
    assert not re.search(rf"\b{kernel.function}(_param_|\b)", compiled.ptx)
    target = {(9, 0): "sm_90a"}.get(capability, f"sm_{capability[0]}{capability[1]}")
    assert re.search(r"^\.target (.*)$", compiled.ptx, re.MULTILINE).group(1) == target
    version = "8.7" if capability >= (10, 0) else "8.0"  # of drivers R570 and R525
    assert re.search(r"^\.version (.*)$", compiled.ptx, re.MULTILINE).group(1) == version
    assemble(compiled, tmp_path)
    assert compiled.threads == 32 * kernel.num_warps
    assert f".reqntid {compiled.threads}" in compiled.ptx
    assert compiled.shared_bytes <= SHARED_LIMIT[capability]
    assert str(Path(aot.__file__).parent) not in compiled.ptx  # nothing of this machine


@pytest.mark.parametrize(("floats", "index"), few(
    itertools.product(["bf16", "fp32"], KERNELS), ("bf16", 0), ("bf16", 6), ("bf16", 7), ("fp32", 1), ("fp32", 2)
))  # fmt: skip
def test_kernels_compile_for_every_type(floats, index):
    kernel = kernels_of(floats)[index]
    assert aot.compile_kernel(kernel, (8, 0)).threads == 32 * kernel.num_warps


@pytest.mark.parametrize(("floats", "head", "tokens"), few(
    [("fp16", 80, 1024), ("fp16", 128, 1024), ("fp16", 128, 256), ("fp16", 96, 256), ("fp32", 128, 256)],
    ("fp16", 128, 256), ("fp32", 128, 256),
))  # fmt: skip
def test_what_tensorrt_is_offered_needs_no_more_shared_memory_than_every_launcher_gives(floats, head, tokens):
    """Beyond 48 KiB a launcher must ask the driver first. Tensor cores of 9.0 read from there, so it takes the most."""
    for blocks in attention.candidates(floats, head, tokens):
        kernel = attention.kernel(floats, tokens, tokens, head, 8, 1 / 127, blocks)
        assert aot.compile_kernel(kernel, (9, 0)).shared_bytes <= attention.SHARED_LIMIT, blocks


@pytest.mark.parametrize(("head", "tokens"), few([(72, 256), (80, 1024), (128, 256), (128, 1024)], (128, 256)))
def test_the_same_of_integer_attention(head, tokens):
    """Blocks have a power of two of channels: those of a head of 72 hold no more than those of one of 128."""
    for blocks in integer_attention.candidates(head, tokens):
        kernel = integer_attention.kernel("i8", tokens, tokens, head, 8, 1 / 127, blocks)
        assert aot.compile_kernel(kernel, (9, 0)).shared_bytes <= attention.SHARED_LIMIT, blocks


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_products_of_integer_attention_are_int8(capability):
    """On 9.0 no byte passes shared memory between them: the order of the keys is chosen for this (see the kernel)."""
    kernel = integer_attention.kernel("i8", 1024, 1024, 64, 8, 1 / 127)
    ptx = aot.compile_kernel(kernel, capability).ptx
    product = "wgmma.mma_async.sync.aligned.m64n" if capability == (9, 0) else "mma.sync.aligned.m16n8k32"
    assert re.search(rf"{re.escape(product)}.*s32\.s8\.s8", ptx)
    assert "f16" not in "".join(line for line in ptx.splitlines() if "mma" in line)
    if capability == (9, 0):
        assert not re.findall(r"stmatrix|st\.shared\S*b8", ptx)


@pytest.mark.full
def test_the_largest_block_shapes_fit_a_small_chip():
    """Those that a benchmark tries as well."""
    candidates = attention.candidates("fp16", 128, 1024, large=True)
    kernels = [attention.kernel("fp16", 1024, 1024, 128, 8, 1 / 127, each) for each in candidates[-3:]]
    sizes = [aot.compile_kernel(kernel, (8, 9)).shared_bytes for kernel in kernels]
    assert attention.SHARED_LIMIT < max(sizes) <= SHARED_LIMIT[8, 9]


@pytest.mark.parametrize(("capability", "spilled"), [((8, 0), 64), ((9, 0), 0)])
def test_the_scores_of_256_tokens_stay_in_registers(tmp_path, capability, spilled):
    """As NVIDIA's assembler, which Triton brings along, sees the stripped PTX. Bytes of a thread."""
    compiled = aot.compile_kernel(attention.kernel("fp16", 256, 256, 72, 8, 1 / 127), capability)
    stores = re.search(r"(\d+) bytes spill stores", assemble(compiled, tmp_path))
    assert int(stores.group(1) if stores else 0) <= spilled


def test_compiling_is_cached(monkeypatch):
    kernel = select.kernel("fp32", 9)
    first = aot.compile_kernel(kernel, (8, 0))

    def refuse(*args):
        raise AssertionError("compiled again")

    monkeypatch.setattr(aot, "_compile_in_fresh_process", refuse)
    assert aot.compile_kernel(kernel, (8, 0)) == first
    with pytest.raises(AssertionError, match="compiled again"):
        aot.compile_kernel(kernel, (8, 6))
    with pytest.raises(AssertionError, match="compiled again"):
        aot.compile_kernel(replace(kernel, num_warps=2), (8, 0))


def test_triton_is_keyed_by_its_version_wherever_a_release_has_its_key():
    modules = SimpleNamespace(triton_key=None), SimpleNamespace()
    for here, there in (modules, modules[::-1]):
        aot._key_by_version(SimpleNamespace(
            __version__="1.2", runtime=SimpleNamespace(cache=here), compiler=SimpleNamespace(compiler=there)
        ))  # fmt: skip
    assert modules[0].triton_key() == "tqdit, triton 1.2"
    assert not vars(modules[1])


def test_a_damaged_cache_is_written_anew(cache):
    kernel = select.kernel("fp16", 9)
    first = aot.compile_kernel(kernel, (8, 0))
    path = aot.cache_folder("kernels") / f"{kernel.function}-{aot._key(kernel, (8, 0))}.json"
    assert aot._read(path) == first
    path.write_text(path.read_text()[:100])
    assert aot.compile_kernel(kernel, (8, 0)) == first
    assert aot._read(path) == first
    assert aot.cache_folder("kernels") == cache / "tqdit" / "kernels"


def test_a_relative_cache_folder_counts_as_none(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert aot.cache_folder("kernels") == tmp_path / ".cache" / "tqdit" / "kernels"


def test_a_compiler_error_is_one_line():
    broken = replace(select.kernel("fp32", 9), constants=(("BOUNDARIES", 9), ("BLOCK", 100)))  # no power of two
    with pytest.raises(BackendError, match=r"Triton cannot compile 'time_group_select_kernel' for .* 8\.0: .*Use --no"):
        aot.compile_kernel(broken, (8, 0))


PTX = """.visible .entry f(
	.param .u64 .ptr .global .align 1 f_param_0,
	.param .u32 f_param_1{more}
)
{{
	ld.param.b64 %rd1, [f_param_0];{code}
}}"""


def ptx(hidden=0, code=""):
    more = "".join(f",\n\t.param .u64 .ptr .global .align 1 f_param_{i + 2}" for i in range(hidden))
    return PTX.format(more=more, code=code)


def test_an_entry_is_named_after_its_content():
    name, text = aot.name_by_content(ptx(), "f")
    assert text == ptx().replace("entry f(", f"entry {name}(").replace("f_param", f"{name}_param")
    assert aot.name_by_content(ptx(1), "f")[0] != name
    assert aot.name_by_content(ptx(), "f") == (name, text)


@pytest.mark.parametrize("hidden", [0, 1, 2])
def test_hidden_parameters_are_taken_out(hidden):
    assert aot.strip_scratch(ptx(hidden), "f", 2) == ptx()


@pytest.mark.parametrize(
    ("text", "visible", "found"),
    [
        (ptx(3), 2, "5 parameters, 0 hidden ones in use; expected 2"),
        (ptx(2, "\n\tld.param.b64 %rd2, [f_param_3];"), 2, "4 parameters, 1 hidden ones in use"),
        (ptx(), 3, "2 parameters, 0 hidden ones in use; expected 3"),
        ("", 2, "0 parameters"),
    ],
)
def test_an_unknown_entry_is_refused(text, visible, found):
    with pytest.raises(BackendError, match=rf"the PTX of 'f' has {found}.*This Triton is not known to tqdit"):
        aot.strip_scratch(text, "f", visible)


def test_the_runtime_imports_no_triton():
    """Plans and registration are looked at by builders on machines without it."""
    code = (
        "import sys, tqdit.plugins.tensorrt, tqdit.plugins.aot, tqdit.plugins.multi_region_attention.launch as p;"
        "p.kernel('fp16', 9, 9, 8, 8, 0.1); print('triton' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
