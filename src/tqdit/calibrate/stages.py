"""A DiT as a sequence of stages, so that one block at a time is in memory with its gradients.

Stage 0 embeds (patches, and the shared conditioning where there is one), stages 1..L are the blocks, stage L + 1 is the
final layer. Between two stages flow the tokens (N, T, D); the shared conditioning (N, D) goes to all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tqdit.models.dit import DiT, DiTBlock


@dataclass(frozen=True)
class Batch:
    """Rows as the network sees them: x (N, C, H, W), timestep (N,), label (N,)."""

    x: Tensor
    timestep: Tensor
    label: Tensor


class Stages:
    """The stages of one network."""

    def __init__(self, network: nn.Module) -> None:
        assert isinstance(network, DiT)  # layers.find_layers refuses others with a message
        self.network = network

    def __len__(self) -> int:
        return len(self.network.blocks) + 2

    @property
    def last(self) -> int:
        return len(self) - 1

    def of(self, layer: str) -> int:
        """The stage that a layer belongs to.

        Embedders that are copied into every block belong to their block, and the final layer uses those of block 0:
        the share of their gradient that comes through the final layer is left out.
        """
        head, _, rest = layer.partition(".")
        if head == "blocks":
            return int(rest.split(".")[0]) + 1
        return self.last if head == "final_layer" else 0

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Tokens (N, T, D) and the shared conditioning (N, D), or None where each block has its own."""
        network = self.network
        tokens = network.x_embedder(batch.x) + network.pos_embed
        return tokens, network._shared_conditioning(batch.timestep, batch.label)

    def run(self, stage: int, tokens: Tensor, shared: Tensor | None, batch: Batch) -> Tensor:
        """Tokens after a block, or the network's output (N, K, H, W) after the final layer."""
        block = self.network.blocks[0 if stage == self.last else stage - 1]
        assert isinstance(block, DiTBlock)
        conditioning = block.conditioning(batch.timestep, batch.label, shared)
        if stage == self.last:
            return self.network.unpatchify(self.network.final_layer(tokens, conditioning))
        output: Tensor = block(tokens, conditioning)
        return output
