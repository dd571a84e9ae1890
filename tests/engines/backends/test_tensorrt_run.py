"""The GPU runtime against a CUDA and a TensorRT that compute on the host; nothing here ran on a GPU."""

import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fake_gpu
import support
from fake_gpu import FakeCuda, FakeTensorRT, compute, residual_of
from tqdit.engines import cuda
from tqdit.engines.backends.tensorrt import run
from tqdit.engines.backends.tensorrt.library import TENSORRT, TENSORRT_RTX
from tqdit.engines.bundle import BundlePart, Manifest, Verified, describe_parts, read_manifest, write_manifest
from tqdit.engines.config import BatchRange
from tqdit.engines.gpu import GpuShare
from tqdit.engines.run.backend import OpenEngine
from tqdit.engines.run.denoiser import Denoiser
from tqdit.engines.run.sampler import Sampler
from tqdit.engines.run.verify import verify_bundle
from tqdit.errors import (
    BackendError,
    FileFormatError,
    MissingLibraryError,
    TqditWarning,
    UsageError,
    VerificationError,
)
from tqdit.exporter.graph import ExportConfig
from tqdit.golden import GoldenCalls

SHAPE = (3, 4, 4)
OUT = (6, 4, 4)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    fake = FakeCuda()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda, "core", lambda: fake)
    monkeypatch.setattr(cuda, "driver", lambda: fake)
    monkeypatch.setattr(cuda, "KERNEL_MODULE", Path("/there/is/no/driver"))
    return fake


@pytest.fixture
def manifest():
    _, card = support.exported(ExportConfig(), pixels=True)
    return Manifest(
        backend="tensorrt", precision="int8", card=card, entry="engine.plan", decoder=None,
        versions={"tensorrt": "11.4.0"}, target={"compute_capabilities": "8.9"},
        files={"engine.plan": BundlePart("", 4)}, batch=BatchRange(1, 2, 16),
    )  # fmt: skip


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "model.engine" / "engine.plan"
    path.parent.mkdir()
    path.write_bytes(b"plan")
    return path


@pytest.fixture
def engine(gpu, manifest, plan):
    opened = run.TensorRTEngine(TENSORRT, plan, manifest, FakeTensorRT(gpu))
    yield opened
    opened.close()
    assert gpu.memory == {}
    assert gpu.streams == set()
    assert gpu.graphs == set()


def inputs(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((rows, *SHAPE), np.float32),
        "timestep": rng.integers(0, 1000, rows),
        "class_labels": rng.integers(0, 10, rows),
    }


@pytest.mark.slow
def test_it_computes_what_the_engine_computes_at_any_batch(engine):
    for seed, rows in enumerate((1, 3, 1, 16, 3)):
        fed = inputs(rows, seed)
        assert np.array_equal(engine(fed), compute(fed))


def test_a_plan_with_a_residual_gives_both_outputs_in_order_and_a_call_the_first(gpu, manifest, plan):
    """At rows that are filled up, and from a graph; what was returned is not written over by the next call."""
    shape = (5, 7)  # tokens, width
    engine = run.TensorRTEngine(TENSORRT, plan, manifest, FakeTensorRT(gpu, residual=shape))
    kept = []
    for seed, rows in enumerate((3, 3, 3, 16, 1)):
        fed = inputs(rows, seed)
        made = engine.outputs(fed)
        assert np.array_equal(engine(fed), compute(fed))
        kept.append((made, (compute(fed), residual_of(fed, shape))))
    assert "launch" in gpu.calls
    for made, expected in kept:
        assert [each.shape for each in made] == [each.shape for each in expected]
        assert all(np.array_equal(one, other) for one, other in zip(made, expected, strict=True))
    engine.close()
    assert gpu.memory == {}


def test_a_plan_with_one_output_gives_that(engine):
    fed = inputs(2)
    made = engine.outputs(fed)
    assert len(made) == 1
    assert np.array_equal(made[0], compute(fed))


@pytest.mark.slow
def test_a_fork_of_the_process_is_refused(engine, monkeypatch):
    for call in (lambda: engine(inputs(1)), lambda: engine.run_on_device({})):
        with monkeypatch.context() as patch:
            patch.setattr("os.getpid", lambda: 12345)
            with pytest.raises(BackendError, match="in process 12345, a fork of it"):
                call()


def test_a_graph_is_captured_after_the_first_run_and_replayed_from_then_on(engine, gpu):
    for seed in range(4):
        fed = inputs(2, seed)
        gpu.calls.clear()
        assert np.array_equal(engine(fed), compute(fed))
        ran = [call for call in gpu.calls if call not in ("copy", "sync") and not call.startswith("allocate")]
        first = ["execute[2]", "begin_building", "execute[2]", "end_building", "complete", "close builder"]
        assert ran == (first if seed == 0 else ["launch"])


def test_a_step_allocates_nothing_after_the_first(engine, gpu):
    engine(inputs(4))
    gpu.calls.clear()
    before = set(gpu.memory)
    for seed in range(20):
        engine(inputs(4, seed))
    assert set(gpu.memory) == before
    assert set(gpu.calls) == {"copy", "launch", "sync"}


def test_every_number_of_rows_meets_one_of_a_few_graphs(engine, gpu):
    """A batcher's number of rows changes at every step."""
    for rows in range(1, 33):
        fed = inputs(rows, rows)
        assert np.array_equal(engine(fed), compute(fed))
        on_device = engine.run_on_device({name: OnDevice(gpu, value) for name, value in fed.items()})
        assert np.array_equal(on_device.numpy(), compute(fed))
    assert sorted(engine._bound) == [2, 4, 8, 16, 32]
    assert len(gpu.graphs) == 5


@pytest.mark.slow
def test_a_bucket_stays_within_the_plan(gpu, manifest, plan):
    trt = FakeTensorRT(gpu, batch=(4, 12))
    engine = run.TensorRTEngine(TENSORRT, plan, replace(manifest, batch=BatchRange(2, 2, 6)), trt)
    for rows in (3, 5, 9, 12):
        fed = inputs(rows)
        assert np.array_equal(engine(fed), compute(fed))
    assert sorted(engine._bound) == [4, 8, 12]
    with pytest.raises(UsageError, match=r"not built for 13 row\(s\)"):
        engine(inputs(13))
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("call", ["begin_building", "end_building", "complete"])
def test_an_engine_whose_graph_cannot_be_captured_warns_once_and_goes_on(engine, gpu, call):
    gpu.fails[call] = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    first = inputs(3)
    with pytest.warns(TqditWarning, match=r"engine\.plan: no CUDA graph .*CAPTURE_UNSUPPORTED.*runs without"):
        made = engine(first)
    assert np.array_equal(made, compute(first))
    for seed in range(6):  # another warning would be an error
        fed = inputs(1 + seed, seed)
        assert np.array_equal(engine(fed), compute(fed))
    assert not gpu.capturing
    assert "launch" not in gpu.calls


def test_contexts_share_one_scratch_memory(engine):
    for rows in (1, 2, 3):
        engine(inputs(rows))
    assert len({context.scratch for context in engine._trt.contexts}) == 1


def test_the_longest_unused_shape_is_forgotten(engine, gpu, monkeypatch):
    monkeypatch.setattr(run, "SHAPES_KEPT", 2)
    for rows in (2, 8, 2, 4):
        engine(inputs(rows))
    assert list(engine._bound) == [2, 4]
    assert len(gpu.graphs) == 2
    fed = inputs(8, 9)
    assert np.array_equal(engine(fed), compute(fed))


@pytest.mark.parametrize(("budget", "kept"), [(0, 0), (1000, 1000), (10**9, 4096)])
def test_a_budget_leaves_weights_to_the_host_before_anything_is_allocated(gpu, manifest, plan, budget, kept):
    trt = FakeTensorRT(gpu)
    engine = run.TensorRTEngine(TENSORRT, plan, manifest, trt, None, budget)
    assert engine._engine.weight_streaming_budget_v2 == kept
    made = [call for call in gpu.calls if call.startswith(("budget", "allocate"))]
    assert made == [f"budget[{kept}]", "allocate device"]
    for seed in range(3):
        fed = inputs(2, seed)
        assert np.array_equal(engine(fed), compute(fed))
    assert "begin_building" not in gpu.calls
    engine.close()


def test_a_decoder_keeps_its_weights(gpu, manifest, plan):
    decoder = plan.with_name("decoder.plan")
    decoder.write_bytes(b"plan")
    run.TensorRTEngine(TENSORRT, decoder, manifest, FakeTensorRT(gpu), None, 0).close()
    assert not [call for call in gpu.calls if call.startswith("budget")]


def test_a_budget_that_cannot_be_kept_is_refused(gpu, manifest, plan, monkeypatch):
    def opened(trt, built_for_it=True):
        monkeypatch.setattr("tqdit.engines.backends.tensorrt.library.need", lambda *_: trt)
        built = replace(manifest, streams_weights=built_for_it)
        run.open_engine(TENSORRT, plan.parent, built, "engine.plan", weight_budget=0).close()

    opened(FakeTensorRT(gpu))
    with pytest.raises(UsageError, match=r"all its weights lie on the GPU.*build the engine with --weight-streaming"):
        opened(FakeTensorRT(gpu), built_for_it=False)
    trt = FakeTensorRT(gpu)
    trt.streams = False
    with pytest.raises(BackendError, match=r"TensorRT 11\.4\.0 refused to leave 4096 bytes of weights to the host"):
        opened(trt)
    monkeypatch.delattr(fake_gpu.FakeEngine, "weight_streaming_budget_v2")
    with pytest.raises(UsageError, match=r"--weight-budget: TensorRT 11\.4\.0 has no weight_streaming_budget_v2"):
        opened(FakeTensorRT(gpu))


def test_a_gpu_may_have_a_budget():
    assert GpuShare.with_budget(1, None) == 1
    assert GpuShare.with_budget(None, 1.5) == GpuShare(None, 3 * 2**19)
    for made in (lambda: GpuShare(-1), lambda: GpuShare(0, -1), lambda: GpuShare.with_budget(0, -2.0)):
        with pytest.raises(UsageError):
            made()


def test_rtx_captures_by_itself(gpu, manifest, plan):
    trt = FakeTensorRT(gpu)
    engine = run.TensorRTEngine(TENSORRT_RTX, plan, manifest, trt)
    for seed in range(3):
        fed = inputs(2, seed)
        assert np.array_equal(engine(fed), compute(fed))
    assert trt.contexts[0].configuration.cuda_graph_strategy == "WHOLE_GRAPH_CAPTURE"
    assert trt.contexts[0].configuration.strategy == "USER_MANAGED"
    assert trt.contexts[0].executions == 3
    assert "begin_building" not in gpu.calls
    engine.close()


def test_rtx_compiles_once_for_a_gpu_and_not_in_every_process(gpu, manifest, plan, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def compiled_by_a_process(version="1.7.1", device=0):
        gpu.calls.clear()
        engine = run.TensorRTEngine(TENSORRT_RTX, plan, manifest, FakeTensorRT(gpu, version), device)
        for rows in (2, 4, 2):
            assert np.array_equal(engine(inputs(rows)), compute(inputs(rows)))
        engine.close()
        return [call for call in gpu.calls if call.startswith("compile")]

    assert compiled_by_a_process() == ["compile[2]", "compile[4]"]
    assert compiled_by_a_process() == []
    assert compiled_by_a_process(device=1) == ["compile[2]", "compile[4]"]  # another GPU has its own file
    assert compiled_by_a_process() == []
    assert compiled_by_a_process(version="1.8.0") == ["compile[2]", "compile[4]"]  # refused by the library
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").write_text("a file in the way")
    assert compiled_by_a_process() == ["compile[2]", "compile[4]"]


def test_the_library_has_the_runtime_cache_that_its_stand_in_has():
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has wheels for x86-64 only")
    assert {"create_runtime_cache", "set_runtime_cache"} <= set(dir(rtx.IRuntimeConfig))
    assert {"serialize", "deserialize"} <= set(dir(rtx.IRuntimeCache))


def test_fewer_rows_than_the_engine_was_built_for_are_filled_up(gpu, manifest, plan):
    """An image has two rows with guidance, so two images are four rows."""
    trt = FakeTensorRT(gpu, batch=(4, 8))
    engine = run.TensorRTEngine(TENSORRT, plan, replace(manifest, batch=BatchRange(2, 2, 4)), trt)
    fed = inputs(3)
    assert np.array_equal(engine(fed), compute(fed))
    assert trt.contexts[0].shapes["x"][0] == 4
    engine.close()


def test_more_rows_than_it_was_built_for_are_refused_and_nothing_is_kept(engine, gpu):
    before = set(gpu.memory)
    with pytest.raises(UsageError, match=r"not built for 33 row\(s\).*--batch 1,8,17"):
        engine(inputs(33))
    assert set(gpu.memory) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", np.zeros((2, 3, 5, 4), np.float32), r"'x' has the shape \(2, 3, 5, 4\), expected \(2, 3, 4, 4\)"),
        ("timestep", np.zeros(3, np.int64), r"'timestep' has the shape \(3,\), expected \(2,\)"),
        ("class_labels", None, "the engine also takes class_labels"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(engine, name, value, message):
    fed = inputs(2) | {name: value}
    if value is None:
        del fed[name]
    with pytest.raises(UsageError, match=message):
        engine(fed)


def test_eight_threads_get_their_own_results(engine):
    wrong = []

    def work(seed):
        for turn in range(10):
            fed = inputs(1 + (seed + turn) % 5, 100 * seed + turn)
            if not np.array_equal(engine(fed), compute(fed)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_closed_engine_says_so_and_closing_twice_is_fine(engine):
    engine.close()
    engine.close()
    with pytest.raises(UsageError, match="this engine is closed"):
        engine(inputs(1))


def test_a_failing_driver_is_one_line(engine, gpu):
    gpu.fails["copy"] = "CUDA_ERROR_ILLEGAL_ADDRESS"
    with pytest.raises(BackendError, match=r"CUDA failed: CUDA_ERROR_ILLEGAL_ADDRESS: what the documentation says\.$"):
        engine(inputs(1))
    gpu.fails.clear()
    fed = inputs(1)
    assert np.array_equal(engine(fed), compute(fed))


def test_memory_that_runs_out_is_one_line_and_leaks_nothing(engine, gpu):
    before = set(gpu.memory)
    gpu.fails["allocate device"] = "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(BackendError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        engine(inputs(1))
    gpu.fails.clear()
    assert set(gpu.memory) == before


class OnDevice:
    """Somebody's array in "GPU memory"."""

    def __init__(self, gpu, array, stream=None):
        self.array, self.copy = array, np.ascontiguousarray(array).copy()
        self.__cuda_array_interface__ = {
            "shape": array.shape, "typestr": array.dtype.str, "data": (self.copy.ctypes.data, False), "version": 3,
            "strides": None if array.flags.c_contiguous else array.strides, "stream": stream,
        }  # fmt: skip


class TorchLike:
    cuda_stream = 77


@pytest.mark.parametrize("stream", [None, 77, TorchLike()])
def test_arrays_on_the_device_stay_there(engine, gpu, stream):
    for seed in range(3):
        fed = inputs(2, seed)
        gpu.calls.clear()
        out = engine.run_on_device({name: OnDevice(gpu, value) for name, value in fed.items()}, stream)
        assert out.shape == (2, *OUT)
        assert np.array_equal(out.numpy(), compute(fed))
        assert out.__cuda_array_interface__["stream"] == (77 if stream else 1)
        assert gpu.calls.count("wait") == 2  # ours after the caller's, and the caller's after ours
        assert "allocate pinned" not in gpu.calls or seed == 0
        gpu.calls.clear()
        del out
        assert gpu.calls == ["device.sync", "free"]  # the caller may still work on it


def test_a_result_goes_into_the_array_that_the_caller_brings(engine, gpu):
    fed = inputs(2)
    given = OnDevice(gpu, np.zeros((2, *OUT), np.float32))
    assert engine.run_on_device({n: OnDevice(gpu, v) for n, v in fed.items()}, 77, out=given) is given
    assert np.array_equal(given.copy, compute(fed))
    with pytest.raises(UsageError, match="'out' is float32"):
        engine.run_on_device(
            {n: OnDevice(gpu, v) for n, v in fed.items()}, 77, out=OnDevice(gpu, np.zeros((1, *OUT), np.float32))
        )


def test_arrays_of_another_type_or_layout_are_refused(engine, gpu):
    fed = {name: OnDevice(gpu, value) for name, value in inputs(2).items()}
    with pytest.raises(UsageError, match="'x' is float64, the engine takes float32"):
        engine.run_on_device(fed | {"x": OnDevice(gpu, np.zeros((2, *SHAPE)))})
    with pytest.raises(UsageError, match="'x' is not contiguous"):
        engine.run_on_device(fed | {"x": OnDevice(gpu, np.zeros((*SHAPE[::-1], 2), np.float32).T)})
    with pytest.raises(UsageError, match=r"'x' is ndarray, expected an array with __cuda_array_interface__"):
        engine.run_on_device(fed | {"x": np.zeros((2, *SHAPE), np.float32)})
    with pytest.raises(UsageError, match="'x' is list, expected an array"):
        engine.run_on_device(fed | {"x": [0.0]})


def test_an_array_made_on_another_stream_is_waited_for(engine, gpu):
    fed = {name: OnDevice(gpu, value, stream=5) for name, value in inputs(2).items()}
    engine.run_on_device(fed, 77)
    assert gpu.calls.count("wait") == 2 + len(fed)


def test_a_context_of_the_caller_is_current_again_afterwards(engine, gpu):
    """A program may work with a context of its own, as `pycuda.autoinit` makes one."""
    gpu.context = 7
    engine(inputs(1))
    assert gpu.context == 7
    with pytest.raises(UsageError):
        engine(inputs(33))
    assert gpu.context == 7


def test_a_device_without_memory_pools_is_served(gpu, manifest, plan):
    gpu.pools = False
    engine = run.TensorRTEngine(TENSORRT, plan, manifest, FakeTensorRT(gpu))
    fed = inputs(2)
    assert np.array_equal(engine(fed), compute(fed))
    assert "allocate device" not in gpu.calls
    engine.close()
    assert gpu.memory == {}


@pytest.mark.parametrize("name", ["Device", "Stream", "Buffer", "GraphBuilder", "Graph"])
def test_cuda_core_has_what_its_stand_in_has(name):
    import cuda.core.graph

    real = getattr(cuda.core, name, None) or getattr(cuda.core.graph, name)
    fake = vars(getattr(fake_gpu, f"Fake{name}"))
    assert [one for one in fake if not one.startswith("_") and not hasattr(real, one)] == []


def test_streams_of_other_libraries_are_understood():
    class Protocol:
        def __cuda_stream__(self):
            return 0, 42

    class Cupy:
        ptr = 42

    class Pycuda:
        handle = 42

    streams = [cuda.open_stream(one) for one in (Protocol(), Cupy(), Pycuda(), 42, None, 0)]
    assert [int(stream.handle) for stream in streams] == [42, 42, 42, 42, 1, 1]
    with pytest.raises(UsageError, match="str is not a CUDA stream"):
        cuda.open_stream("first")


def load(library, manifest, plan, trt, monkeypatch, device=None):
    monkeypatch.setattr(type(library), "load", lambda *_: trt)
    return run.open_engine(library, plan.parent, manifest, "engine.plan", device=device)


def test_another_gpu_is_refused_with_what_to_do(gpu, manifest, plan, monkeypatch):
    gpu.capability = (9, 0)
    rtx = replace(manifest, target={"compute_capabilities": "8.9,12.0"}, versions={"tensorrt_rtx": "11.4.0"})
    with pytest.raises(BackendError, match=r"built for compute capability 8.9, 12.0, this GPU has 9.0.*--target 9.0"):
        load(TENSORRT_RTX, rtx, plan, FakeTensorRT(gpu), monkeypatch)


def test_a_plan_of_another_chip_is_refused(gpu, manifest, plan, monkeypatch):
    """An L4 and an RTX 4090 have one compute capability."""
    target = manifest.target | cuda.find_device().facts
    made = replace(manifest, target=target)
    load(TENSORRT, made, plan, FakeTensorRT(gpu), monkeypatch).close()
    with pytest.raises(BackendError, match=r"built on NVIDIA L4 with 58 multiprocessors.*RTX 4090 with 128.*--device"):
        load(TENSORRT, made, plan, FakeTensorRT(gpu), monkeypatch, device=1)
    gpu.multiprocessors[1] = 58
    with pytest.warns(TqditWarning, match="built on NVIDIA L4, this GPU is NVIDIA GeForce RTX 4090"):
        load(TENSORRT, made, plan, FakeTensorRT(gpu), monkeypatch, device=1).close()
    assert gpu.current == 1


def test_a_gpu_that_is_not_there_is_named(gpu, manifest, plan, monkeypatch):
    with pytest.raises(BackendError, match=r"no usable NVIDIA GPU 7 here \(device_id must be within"):
        load(TENSORRT, manifest, plan, FakeTensorRT(gpu), monkeypatch, device=7)


def test_another_release_is_refused_with_what_to_do(gpu, manifest, plan, monkeypatch):
    with pytest.raises(
        BackendError, match=r"built by TensorRT 11.4.0, installed is 11.5.0.*pip install tensorrt==11.4.0"
    ):
        load(TENSORRT, manifest, plan, FakeTensorRT(gpu, "11.5.0"), monkeypatch)


@pytest.mark.parametrize(
    ("built", "installed", "compatible", "runs"),
    [
        ("10.16.1.11", "10.16.1.12", False, True),
        ("10.16.1.11", "10.16.2.1", False, False),
        ("11.0.0.1", "11.4.0.106", True, True),
        ("11.4.0.106", "11.0.0.1", True, False),
        ("10.16.1.11", "11.4.0.106", True, False),
    ],
)
def test_which_releases_run_a_plan(built, installed, compatible, runs):
    assert TENSORRT.runs_engine_of(built, installed, compatible) is runs
    assert not TENSORRT_RTX.runs_engine_of("1.6.0.1", "1.7.0.1", True)


def test_a_plan_with_code_inside_opens_only_when_allowed(gpu, manifest, plan, monkeypatch):
    embedded = replace(manifest, target=manifest.target | {"version_compatible": "embed"})
    with pytest.raises(BackendError, match=r"carries program code.*TQDIT_ALLOW_ENGINE_CODE=1"):
        load(TENSORRT, embedded, plan, FakeTensorRT(gpu, "11.5.0"), monkeypatch)
    monkeypatch.setenv("TQDIT_ALLOW_ENGINE_CODE", "1")
    load(TENSORRT, embedded, plan, FakeTensorRT(gpu, "11.5.0"), monkeypatch).close()


def test_a_plan_without_its_lean_runtime_asks_for_it(gpu, manifest, plan, monkeypatch):
    excluded = replace(manifest, target=manifest.target | {"version_compatible": "exclude"})
    with pytest.raises(BackendError, match=r"lean runtime of TensorRT 11.4.0; set TQDIT_TENSORRT_LEAN"):
        load(TENSORRT, excluded, plan, FakeTensorRT(gpu, "11.5.0"), monkeypatch)
    monkeypatch.setenv("TQDIT_TENSORRT_LEAN", "libnvinfer_lean.so.11")
    load(TENSORRT, excluded, plan, FakeTensorRT(gpu, "11.5.0"), monkeypatch).close()
    load(TENSORRT, excluded, plan, FakeTensorRT(gpu, "11.4.0"), monkeypatch).close()


@pytest.mark.slow
def test_a_plan_that_the_library_cannot_open_is_one_line(gpu, manifest, plan, monkeypatch):
    trt = FakeTensorRT(gpu)
    trt.opens = False
    with pytest.raises(
        BackendError, match=r"cannot open it .Serialization assertion failed: version tag does not match"
    ):
        load(TENSORRT, manifest, plan, trt, monkeypatch)


def test_a_missing_library_is_answered_with_the_pip_command(manifest, plan):
    with pytest.raises(
        MissingLibraryError, match=r"needs tensorrt, which is not installed. Run: pip install 'tensorrt>="
    ):
        run.open_engine(TENSORRT, plan.parent, manifest, "engine.plan")


def test_a_machine_without_a_driver_is_told_so():
    """The real cuda.core; on a machine with a GPU the capability comes back instead."""
    try:
        found = cuda.find_device().capability
    except BackendError as error:
        found = str(error)
    assert re.fullmatch(r"\d+\.\d|no usable NVIDIA GPU here \(.*\)\. Install NVIDIA's driver.*", found)


def test_a_damaged_batch_range_is_refused(manifest):
    values = manifest.to_json()
    assert Manifest.from_json(json.dumps(values), Path("m")) == manifest
    assert Manifest.from_json(json.dumps(values | {"batch": None}), Path("m")) == replace(manifest, batch=None)
    for damaged in ({"least": 3, "best": 2, "most": 1}, {"least": "one"}, [1, 2, 3]):
        with pytest.raises(FileFormatError, match="m: damaged"):
            Manifest.from_json(json.dumps(values | {"batch": damaged}), Path("m"))


def test_a_denoiser_takes_arrays_on_the_gpu(gpu, manifest, plan, monkeypatch):
    monkeypatch.setattr(type(TENSORRT), "load", lambda *_: FakeTensorRT(gpu, shape=manifest.card.state_shape))
    write_manifest(plan.parent, replace(manifest, files=describe_parts(plan.parent)))
    fed = inputs(3) | {"x": np.random.default_rng(0).standard_normal((3, *manifest.card.state_shape), np.float32)}
    with Denoiser.open(plan.parent) as denoise:
        made = denoise.run_on_device({name: OnDevice(gpu, value) for name, value in fed.items()})
        assert np.array_equal(made.numpy(), compute(fed))
    with pytest.raises(UsageError, match="closed"):
        denoise.run_on_device(fed)


def test_an_engine_of_another_backend_takes_no_arrays_on_a_gpu():
    engine = OpenEngine(lambda inputs: inputs["x"])
    with pytest.raises(UsageError, match="tensorrt"):
        engine.run_on_device(inputs(1), None, None)


@pytest.mark.parametrize("opened", [Sampler, Denoiser])
def test_golden_calls_run_once_where_the_engine_runs(gpu, manifest, plan, monkeypatch, opened, tmp_path):
    """At the first opening on a GPU, if the engine was built where it could not run."""
    monkeypatch.setattr(type(TENSORRT), "load", lambda *_: trt)
    trt = FakeTensorRT(gpu, shape=manifest.card.state_shape)
    shape = manifest.card.state_shape
    fed = {"x": np.ones((3, *shape), np.float32), "timestep": np.arange(3), "class_labels": np.arange(3)}

    def bundle(prediction, **facts):
        GoldenCalls(fed, prediction.astype(np.float32), np.zeros(3)).save(plan.with_name("calls.npz"))
        plan.with_name("manifest.json").unlink(missing_ok=True)
        write_manifest(plan.parent, replace(manifest, files=describe_parts(plan.parent), **facts))
        return plan.parent

    def calls():
        gpu.calls.clear()
        opened.open(plan.parent).close()
        return len([call for call in gpu.calls if call.startswith(("execute", "launch"))])

    bundle(compute(fed))
    assert calls() > 0
    assert calls() == 0
    (record,) = (tmp_path / "cache" / "tqdit" / "verified").iterdir()
    assert "NVIDIA L4 8.9, 58 multiprocessors, driver of CUDA 12.8, TensorRT 11.4.0" in record.read_text()
    gpu.version = 13000
    assert calls() > 0
    gpu.names[0] = "NVIDIA L40S"
    assert calls() > 0
    bundle(compute(fed), verified=Verified(3, 1e-3, 1e-3))  # on another machine
    gpu.names[0] = "NVIDIA L40"
    assert verify_bundle(plan.parent, read_manifest(plan.parent)).passes  # as tqdit-build does
    assert calls() == 0
    bundle(compute(fed) * 1.005, float_type="fp32")  # errors of TF32 are no fault
    assert calls() > 0
    bundle(compute(fed) * 2)
    for _ in range(2):
        with pytest.raises(VerificationError, match="golden calls"):
            opened.open(plan.parent)
    if opened is Sampler:
        Sampler.open(plan.parent, verify=False).close()
    assert gpu.memory == {}  # a refused engine is freed


def test_a_sampler_runs_on_it(gpu, manifest, plan, monkeypatch):
    """The chain of a whole sampler equals the same chain in NumPy."""
    trt = FakeTensorRT(gpu, shape=manifest.card.state_shape)
    sampler = Sampler(manifest.card, load(TENSORRT, manifest, plan, trt, monkeypatch), batch=2)

    class OnHost:
        def __call__(self, fed):
            return compute(fed)

        def close(self):
            pass

    expected = Sampler(manifest.card, OnHost(), batch=2).sample_latents([0, 1, 2], seed=3)
    assert np.array_equal(sampler.sample_latents([0, 1, 2], seed=3), expected)
    sampler.close()
    assert gpu.memory == {}
