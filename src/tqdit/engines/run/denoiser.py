"""A network call on an engine, for schedulers of one's own. NumPy and one backend, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqdit.card import GraphCard
from tqdit.engines.gpu import GpuChoice
from tqdit.engines.run.backend import Engine, check_graph, open_bundle
from tqdit.engines.run.verify import open_verified
from tqdit.errors import UsageError
from tqdit.ports import Port, check_call, check_values
from tqdit.sampling.forecasts import RESIDUAL

Float32 = NDArray[np.float32]


class Denoiser:
    """The network of a bundle: its ports in the order of `card.signature`, or by name -> prediction. Thread-safe.

        with Denoiser.open("model.engine") as denoise:
            prediction = denoise(x, timestep, class_labels)

    Guidance is the caller's: rows with the ports' null values (a DiT's label num_classes) beside the conditional ones.
    `full` and `forecast` make it a `ForecastNetwork` if the engine was exported with forecasts.
    """

    def __init__(
        self, card: GraphCard, engine: Engine, batch: int | None = None, forecast: Engine | None = None
    ) -> None:
        """batch: rows per engine call at most; None: any number. forecast: ports and the residual -> prediction."""
        check_graph(card)
        self.card = card
        self._forecast: Engine | None = forecast
        self._residual: Port | None = None  # what a forecast takes beside the ports; None: there are no forecasts
        if forecast is not None and card.residual is not None:
            self._residual = Port(RESIDUAL, "request", "float32", (None, *card.residual))
        self.most_rows = batch
        self.gpu: int | None = getattr(engine, "gpu", None)  # index of the GPU whose arrays `run_on_device` takes
        self._engine: Engine | None = engine

    @classmethod
    def open(cls, path: str | Path, *, threads: int | None = None, device: GpuChoice = None) -> Denoiser:
        """Open a bundle that tqdit-build wrote, after checking every file of it.

        threads: CPU threads per call; None leaves it to the backend. device: index of the GPU, or a `GpuShare`.
        Golden calls run once for each GPU. Raises FileFormatError for a damaged bundle,
        VerificationError if they are wrong, BackendError if it cannot run here, UsageError for a step graph.
        """
        manifest, load = open_bundle(path, threads, device)
        most = None if manifest.batch is None else manifest.batch.most * manifest.card.rows_per_image
        with ExitStack() as refused:
            engine, forecast = open_verified(Path(path), manifest, load, refused)
            refused.pop_all()  # all is right: the engine stays open
        return cls(manifest.card, engine, most, forecast)

    def __call__(self, *values: Any, **ports: Any) -> NDArray[np.float32]:
        """The prediction float32 (rows, K, ...) for one array (rows, ...) of each port, or for one mapping of them.

        What it holds is up to the network: a DiT's is the noise in the first C channels of the state, then the learned
        variance, if there is one (K = 2C). More rows than the engine was built for take several calls. Raises
        UsageError for other ports, shapes, types or values than the signature's.
        """
        engine = self._opened()
        return self._in_parts(lambda part: (engine(part),), self._checked(self._by_name(values, ports)))[0]

    @property
    def forecasts(self) -> bool:
        """Whether the engine was exported with forecasts."""
        return self._residual is not None

    def full(self, inputs: Mapping[str, Any]) -> tuple[Float32, Float32]:
        """The prediction (rows, K, ...) of the ports by name, and the residual (rows, ...) that forecasts start from.

        Raises UsageError as a call does, and if the engine was exported without forecasts.
        """
        engine = self._opened()
        self._residual_port()
        prediction, residual = self._in_parts(engine.outputs, self._checked(inputs))
        return prediction, residual

    def forecast(self, inputs: Mapping[str, Any]) -> Float32:
        """The prediction (rows, K, ...) of the ports by name and of a `residual` (rows, ...), without the blocks.

        Raises UsageError as `full` does.
        """
        self._opened()
        port, forecast, given = self._residual_port(), self._forecast, dict(inputs)
        assert forecast is not None, "it is open"
        residual = check_values(RESIDUAL, port, given.pop(RESIDUAL, None))
        checked = self._checked(given)
        rows = len(checked[self.card.signature.state.name])
        if len(residual) != rows:
            raise UsageError(f"'{RESIDUAL}' has {len(residual)} rows, the ports have {rows}. Pass as many of each.")
        return self._in_parts(lambda part: (forecast(part),), {**checked, RESIDUAL: residual})[0]

    def run_on_device(self, inputs: Mapping[str, Any], stream: Any = None, out: Any = None) -> Any:
        """As a call, of arrays on the GPU, without waiting: port -> array (rows, ...) to the prediction (rows, K, ...).

        inputs: arrays of cupy, torch, pycuda or numba, by `__cuda_array_interface__`, contiguous and of the graph's
        types; at most as many rows as the engine was built for. stream: the caller's, a handle or a stream of any of
        these; the engine starts after what is on it, and what is put on it afterwards starts after the engine. out: an
        array to fill; None makes one. Values are not checked. Raises UsageError for arrays that do not fit, and if the
        engine is not one of TensorRT or TensorRT-RTX.
        """
        engine: Any = self._opened()
        return engine.run_on_device(inputs, stream, out)

    def _opened(self) -> Engine:
        if self._engine is None:
            raise UsageError("this denoiser is closed. Open the engine again.")
        return self._engine

    def _residual_port(self) -> Port:
        if self._residual is None:
            raise UsageError(
                f"{self.card.signature.family}: this engine computes every call in full. Take one that was exported "
                "with forecasts."
            )
        return self._residual

    def _checked(self, values: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        inputs = check_call(self.card.signature, values)
        self.check_time(inputs[self.card.signature.time.name])
        return inputs

    def _in_parts(
        self, call: Callable[[dict[str, NDArray[Any]]], tuple[Float32, ...]], inputs: dict[str, NDArray[Any]]
    ) -> tuple[Float32, ...]:
        """The outputs of a call; of several if there are more rows than the engine was built for."""
        rows = len(inputs[self.card.signature.state.name])
        most = self.most_rows or rows
        if rows <= most:
            return call(inputs)
        parts = [slice(start, start + most) for start in range(0, rows, most)]
        # copies, since an engine may reuse its outputs
        made = [[each.copy() for each in call({name: value[part] for name, value in inputs.items()})] for part in parts]
        return tuple(map(np.concatenate, zip(*made, strict=True)))

    def _by_name(self, values: tuple[Any, ...], ports: dict[str, Any]) -> dict[str, Any]:
        """The ports of a call, like the arguments of a function."""
        if len(values) == 1 and isinstance(values[0], Mapping) and not ports:
            return dict(values[0])
        names = self.card.signature.names
        if len(values) > len(names) or set(names[: len(values)]) & set(ports):
            found = ", ".join([f"{len(values)} array(s) without a name", *ports])
            raise UsageError(f"found {found}; expected {', '.join(names)}, each once.")
        return dict(zip(names, values, strict=False)) | ports

    def check_time(self, timesteps: NDArray[Any]) -> None:
        """Raises UsageError for timesteps (rows,) that the network does not know."""
        low, high = self.card.sampling.process.span
        whole = np.issubdtype(timesteps.dtype, np.integer)
        bad = timesteps[(timesteps < low) | (timesteps >= high if whole else timesteps > high)]
        if bad.size:
            known = f"{low:g}..{high - 1:g}" if whole else f"{low:g} to {high:g}"
            name = self.card.signature.time.name
            raise UsageError(f"'{name}' {bad[0]} is out of range; this model knows timesteps {known}.")

    def close(self) -> None:
        """Free the engine; the denoiser cannot be used afterwards."""
        opened = filter(None, (self._engine, self._forecast))
        self._engine = self._forecast = None
        for engine in opened:
            engine.close()

    def __enter__(self) -> Denoiser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
