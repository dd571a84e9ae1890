"""ONNX Runtime's execution providers: which ones TQDiT drives, their settings, and the check that they really run.

ONNX Runtime falls back to the CPU without an error when a provider's libraries or its GPU are missing
(https://onnxruntime.ai/docs/execution-providers/): what a session got is compared with what was asked for.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from tqdit.card import GraphCard
from tqdit.engines.config import BatchRange, FloatType
from tqdit.errors import BackendError, UsageError
from tqdit.extras import install

CPU = "CPUExecutionProvider"
PROVIDERS = {"cpu": CPU, "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
NAMES = {provider: name for name, provider in PROVIDERS.items()}
# On CPUs it only emulates the others, with casts around float32.
FLOAT_TYPES: dict[str, tuple[FloatType, ...]] = {
    "cpu": ("fp32",), "cuda": ("fp16", "bf16", "fp32"), "tensorrt": ("fp16", "fp32"),
}  # fmt: skip
NOT_AUDITED = (
    "ONNX Runtime's TensorRT provider hides the compiled layers, so that nothing proves them integer; "
    "--backend tensorrt builds an audited engine from the same file"
)
ENGINE_CACHE = "trt"  # prefix of the files in which the TensorRT provider keeps its engine


def settings_of(
    provider: str, folder: Path, card: GraphCard, batch: BatchRange | None, float_type: str = "fp32",
    device: int | None = None,
) -> list[Any]:  # fmt: skip
    """The argument `providers` of a session."""
    if provider == "cpu":
        return [CPU]
    gpu = {} if device is None else {"device_id": device}
    cuda: Any = (PROVIDERS["cuda"], gpu) if gpu else PROVIDERS["cuda"]
    if provider == "tensorrt":
        options: dict[str, Any] = gpu | {
            # It lets TensorRT choose these types only if it is told so, whatever the graph's types are.
            "trt_int8_enable": card.quantization is not None,
            "trt_fp16_enable": float_type == "fp16",
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": str(folder),
            "trt_engine_cache_prefix": ENGINE_CACHE,
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(folder),
        }
        rows = (card.rows,) * 3 if card.rows else (batch or BatchRange()).rows(card.rows_per_image)
        for name, count in zip(("min", "opt", "max"), rows, strict=True):
            shapes = (f"{port}:{'x'.join(map(str, (count, *shape)))}" for port, shape in card.inputs.items())
            options[f"trt_profile_{name}_shapes"] = ",".join(shapes)
        return [(PROVIDERS["tensorrt"], options), cuda, CPU]
    return [cuda, CPU]


def refuse_device(provider: str, device: int | None) -> None:
    """Raises UsageError for the index of a GPU if the provider runs on CPUs."""
    if device is not None and provider == "cpu":
        raise UsageError("--device is the index of a GPU; this engine runs on the CPU. Leave it out.")


def check_offered(ort: ModuleType, provider: str) -> None:
    """Refuse a provider that this build of ONNX Runtime does not have."""
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise BackendError(
            f"--provider {provider}: ONNX Runtime {ort.__version__} here has no {PROVIDERS[provider]}. Run: "
            f"pip uninstall -y onnxruntime, then {install('onnxruntime-gpu')}"
        )


def check_got(session: Any, provider: str) -> None:
    """Refuse the silent fallback to another provider."""
    found = session.get_providers()
    if PROVIDERS[provider] not in found:
        raise BackendError(
            f"asked ONNX Runtime for {PROVIDERS[provider]}, got {', '.join(found)}: a GPU, its driver or the "
            "provider's libraries are missing. Install them, or build with --provider cpu."
        )
