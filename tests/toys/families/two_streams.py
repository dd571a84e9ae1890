"""A toy family: two token streams that attend jointly, word tokens as requests, a float timestep, rectified flow.

Nothing of it is like a DiT: three axes of state, no classes, no guidance, no learned variance, RMS norms, SwiGLU.
"""

import torch
from torch import nn
from torch.nn import functional as F

from tqdit.models.loaded import LoadedModel, fingerprint
from tqdit.models.products import find_products
from tqdit.ports import Port, Signature
from tqdit.sampling.process import Flow
from tqdit.sampling.schedule import SamplingSpec

TOKENS, CHANNELS, WORDS, VOCABULARY, WIDTH = 12, 5, 4, 7, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.image_qkv, self.word_qkv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.image_out, self.word_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.gate, self.down = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, image, words, time):
        image, words = image + time, words + time
        joint = torch.cat([self.image_qkv(self.norm(image)), self.word_qkv(self.norm(words))], dim=1)
        q, k, v = joint.unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        image = image + self.image_out(attended[:, : image.shape[1]])
        words = words + self.word_out(attended[:, image.shape[1] :])
        return image + self.down(F.silu(self.gate(image)) * self.up(image)), words


class TwoStreams(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.words = nn.Linear(CHANNELS, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.time = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(WIDTH, CHANNELS)

    def forward(self, latents, words, sigma):
        image, text, time = self.embed(latents.transpose(1, 2)), self.words(words), self.time(sigma[:, None])[:, None]
        for block in self.blocks:
            image, text = block(image, text, time)
        return (self.out(image).transpose(1, 2),)


def matches(source):
    return source == "two-streams"


def load(source, heads=None):
    torch.manual_seed(3)
    network = TwoStreams().eval().requires_grad_(False)
    signature = Signature(
        ports=(
            Port("latents", "state", "float32", (None, CHANNELS, TOKENS)),
            Port("words", "request", "int64", (None, WORDS), values=VOCABULARY),
            Port("sigma", "time", "float32", (None,)),
        ),
        output=(None, CHANNELS, TOKENS),
        family="TwoStreams",
    )
    example = {name: torch.from_numpy(array) for name, array in signature.zeros(2).items()}
    return LoadedModel(
        network=network, signature=signature, products=find_products(network, example),
        sampling=SamplingSpec(Flow(time_scale=1.0, shift=3.0), "euler", 12), guidance=None, latents=None,
        origin="toy", source=source, fingerprint=fingerprint(network, "two-streams"),
    )  # fmt: skip
