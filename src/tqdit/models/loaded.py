"""What a loader hands on: a network behind one seam, and the facts that the stages need about it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tqdit.card import GraphCard, GraphName, Latents, QuantizationCard
from tqdit.errors import TqditError, UsageError, first_line
from tqdit.interface import TextExamples
from tqdit.models.arguments import Constant, digest, nest
from tqdit.models.blocks import listen_to_blocks
from tqdit.models.products import Convolution, Product, prediction_of
from tqdit.models.weights import IN_MEMORY, Weights
from tqdit.ports import Signature
from tqdit.sampling.forecasts import RESIDUAL
from tqdit.sampling.guidance import Guidance
from tqdit.sampling.schedule import SamplingSpec
from tqdit.version import __version__

Source = str | nn.Module | Mapping[str, Any]  # what the user wrote, a network or a state dict


@dataclass(frozen=True)
class LoadedModel:
    """A float32 network in eval mode, and how it is sampled by default. No stage knows more about a family."""

    network: nn.Module  # takes the ports of the signature by name
    signature: Signature
    products: tuple[Product, ...]
    sampling: SamplingSpec
    guidance: Guidance | None
    latents: Latents | None  # None: the state is an image in -1..1
    origin: str
    source: str  # what the user wrote: 'demo' or a path
    fingerprint: str  # SHA-256 over configuration and weights
    class_names: tuple[str, ...] = ()
    proposed: SamplingSpec | None = None  # the chain that engines propose; None: `sampling`
    vae_folder: Path | None = field(default=None, compare=False)  # of a pipeline directory
    told_latents: bool = field(default=False, compare=False)  # by a model card, which goes before a VAE's configuration
    assumed: Mapping[str, str] = field(default_factory=dict, compare=False)  # fact of a model card -> what is taken
    constants: Mapping[str, Constant] = field(default_factory=dict, compare=False)  # arguments of every call, by name
    alike: Mapping[str, Tensor] = field(default_factory=dict, compare=False)  # a row of those that the network holds
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)  # settings that diffusers' pipelines read
    text: TextExamples | None = field(default=None, compare=False)  # of a pipeline that was recorded with prompts
    weights: Weights = field(default=IN_MEMORY, compare=False)  # where the values of the network's parameters lie

    @property
    def device(self) -> torch.device:
        """Where the network's weights lie."""
        return next((parameter.device for parameter in self.network.parameters()), torch.device("cpu"))

    def call(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """One network call: ports by name to the prediction (rows, K, ...).

        Raises UsageError if the network refuses it.
        """
        what = f"a call with {len(inputs[self.signature.state.name])} rows"
        with in_one_line(self.source, what), self.weights.lent():
            return prediction_of(self.network(**self.arguments(inputs)))

    def weight(self, product: str) -> Tensor | None:
        """The values of a product's weight (O, K) or (O, I, ...); None: it has none, as those of attention."""
        module = self.network.get_submodule(product)
        return self.weights.read(module.weight) if isinstance(module, nn.Linear | Convolution) else None

    def arguments(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The network's keyword arguments for ports by name."""
        return arguments_of(self.signature, self.constants, inputs)

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The same without gradients, in NumPy: a network as `sampling.chains` takes it."""
        with torch.no_grad():
            output = self.call({name: torch.from_numpy(array).to(self.device) for name, array in inputs.items()})
        result: NDArray[np.float32] = output.cpu().numpy()
        return result

    def full(self, inputs: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The prediction, and the residual of the blocks (`sampling.forecasts`)."""
        with listen_to_blocks(self.network) as stack:
            prediction = self(inputs)
        return prediction, stack.residual().detach().cpu().numpy()

    def forecast(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The prediction of the ports and a residual. It computes the blocks, too, and drops what they add: it shows
        what an engine's forecast is, not how fast.
        """
        ports = dict(inputs)
        with listen_to_blocks(self.network, torch.from_numpy(ports.pop(RESIDUAL)).to(self.device)):
            return self(ports)

    def card(
        self, graph: GraphName = "denoiser", *, sampling: SamplingSpec | None = None,
        guidance: Guidance | Literal["own"] | None = "own", quantization: QuantizationCard | None = None,
    ) -> GraphCard:  # fmt: skip
        """The card of a graph of this model, sampled as the model says unless something else is given."""
        return GraphCard(
            graph=graph,
            signature=self.signature,
            sampling=sampling or self.sampling,
            guidance=self.guidance if guidance == "own" else guidance,
            latents=self.latents,
            class_names=self.class_names,
            model=self.source,
            origin=self.origin,
            fingerprint=self.fingerprint,
            written_by=__version__,
            published=None if sampling in (None, self.sampling) else self.sampling,
            quantization=quantization,
            constants={name: digest(value) for name, value in {**self.constants, **self.alike}.items()},
            alike=tuple(self.alike),
            config=dict(self.config) or _dit_settings(self.signature),
        )

    def to(self, device: str | torch.device) -> LoadedModel:
        """The model on another device. Its network moves: there is no second copy of the weights."""
        assert not self.weights.made or torch.device(device) == self.device, "weights that stay in their file"
        return replace(self, network=self.network.to(device))


@contextmanager
def in_one_line(source: str, what: str) -> Iterator[None]:
    """What a network raises, which can be anything, as a UsageError."""
    try:
        yield
    except (TqditError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(f"{source}: {what} failed ({type(error).__name__}: {first_line(error)}).") from error


def arguments_of(
    signature: Signature, constants: Mapping[str, Constant], inputs: Mapping[str, Tensor]
) -> dict[str, Any]:
    """A network's keyword arguments for its ports and its constants by name."""
    lists = {port.name: list(inputs[port.name].unbind()) for port in signature.ports if port.listed}
    return nest({**constants, **inputs, **lists})


def name_of(source: Source) -> str:
    """The source in messages."""
    if isinstance(source, str):
        return source
    return f"{'state dict' if isinstance(source, Mapping) else type(source).__name__} in memory"


def _dit_settings(signature: Signature) -> dict[str, Any]:
    """What diffusers' DiT pipeline reads, if it can run such a network."""
    shape, label = signature.state.row_shape, signature.label
    if len(shape) != 3 or shape[1] != shape[2] or label is None:
        return {}
    return {"sample_size": shape[1], "in_channels": shape[0], "out_channels": signature.output_shape[0],
            "num_embeds_ada_norm": label.choices}  # fmt: skip


class PositionalCall(nn.Module):
    """A network call with the ports as positional arguments and one tensor as the result: what an exporter traces.

    residual: the result is the prediction and the residual of the blocks (`sampling.forecasts`).
    """

    def __init__(self, model: LoadedModel, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.network, self.signature, self.constants = model.network, model.signature, dict(model.constants)

    def forward(self, *ports: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        inputs = dict(zip(self.signature.names, ports, strict=True))
        arguments = arguments_of(self.signature, self.constants, inputs)
        if not self.residual:
            return prediction_of(self.network(**arguments))
        with listen_to_blocks(self.network) as stack:
            prediction = prediction_of(self.network(**arguments))
        return prediction, stack.residual()


def fingerprint(network: nn.Module, configuration: object, weights: Weights = IN_MEMORY) -> str:
    """SHA-256 over the configuration and every parameter's name, shape and float32 bytes, in the order of names."""
    digest = hashlib.sha256(repr(configuration).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(weights.read(tensor).to(torch.float32).contiguous().numpy().data)
    return digest.hexdigest()
