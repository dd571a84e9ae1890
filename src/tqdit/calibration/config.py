"""Every knob of a calibration, and the presets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from tqdit.bounds import BLOCKS, MOST_GUIDANCE, check_count, check_number
from tqdit.errors import UsageError
from tqdit.quantization.schemes import schemes_of
from tqdit.sampling.guidance import check_scale
from tqdit.sampling.process import TRAINING_STEPS
from tqdit.sampling.schedule import sampler_names

if TYPE_CHECKING:  # which needs torch; this module does not
    from tqdit.models.loaded import LoadedModel


NUMERATOR_KEYS = 2048  # docs/calibration.md has the measurement
MOST_TEMPERATURE = 1e6
MOST_FACTOR = 100  # between a candidate scale and the range-based one
Choices = tuple[str, ...] | range


def knob(default: Any, help_text: str, choices: Choices | Callable[[], Choices] = (), alone: str | None = None) -> Any:
    """A field that is also a flag of `tqdit-calibrate`; `choices_of` gives its choices.

    alone: what the flag without a value means.
    """
    return field(default=default, metadata={"help": help_text, "choices": choices, "alone": alone})


def choices_of(knob_field: Field[Any]) -> Choices:
    """The values that a knob can have, () if they cannot be listed."""
    choices = knob_field.metadata["choices"]
    found: Choices = choices() if callable(choices) else choices
    return found


@dataclass(frozen=True)
class QuantizationConfig:
    """What is quantized, how finely, and how the scales are found. Print it, compare it, save it."""

    weight_bits: int = knob(8, "bits of weights, 2..8; below 8 the codes still take a byte each", range(2, 9))
    activation_bits: int = knob(8, "bits of activations, 2..8", range(2, 9))
    outer_bits: int = knob(8, "least bits of the patch embedding, the final layer and the conditioning", range(2, 9))
    attention_bits: int = knob(2, "least bits of q, k, v and the probabilities of attention", range(2, 9))

    steps: int | None = knob(None, "steps T of the chain that scales are found for (default: the model's own)",
                             range(1, TRAINING_STEPS + 1))  # fmt: skip
    groups: int = knob(10, "groups G of timesteps", range(1, 1001))
    boundaries: str = knob("even", "where groups end: at even timesteps, or where the activations drift most",
                           ("even", "drift"))  # fmt: skip
    rows_per_group: int = knob(32, "calibration rows n per group; the two rows of a guided pair count as two",
                               range(1, 100_001))  # fmt: skip
    chains: int = knob(8, "guided chains from which the rows are picked; they are most of the cost", range(1, 100_001))
    guidance_scale: float | None = knob(None, "of the chains (default: the model's own)")
    seed: int = knob(0, "decides chains, classes, rows and cotangents", range(2**63 + 1))

    calls: int | None = knob(None, "also find where the steps of a chain of so many network calls lie best, and "
                             "propose that chain (default: none)", range(2, 51))  # fmt: skip
    forecast: bool = knob(False, "with --calls, also try chains of more steps whose other calls are forecasts "
                          "(tqdit-export --forecast)")  # fmt: skip
    solver: str = knob("auto", "sampler of these steps; auto: the better one of dpm++2m and unipc",
                       lambda: ("auto", *sampler_names()))  # fmt: skip

    correction: bool = knob(False, "also measure the errors of the quantized network along chains, which sampling at "
                            "this guidance scale then takes back (PTQD)")  # fmt: skip

    method: str = knob("search", "how scales are found; gptq is a search that rounds weights with error feedback; "
                       "reconstruct is one after which each block learns its rounding and scales; "
                       "weights looks at the weights alone, for --inputs dynamic without attention",
                       ("search", "min-max", "gptq", "reconstruct", "weights"))  # fmt: skip
    iterations: int = knob(500, "of --method reconstruct for each block; the papers' is 20000", range(1, 1_000_001))
    metric: str = knob("ho", "what a search minimises: Hessian-weighted or plain squared error", ("ho", "mse"))
    fisher: str = knob(
        "step", "gradients that HO takes its weights from. guided: of random sums of the prediction, times the row's "
        "weight in its step and in guidance; step: times that in its step; plain: as they are; loss: of the paper's "
        "loss (eq. 11)", ("guided", "step", "plain", "loss"),
    )  # fmt: skip
    fisher_temperature: float = knob(
        0.0, "of a softmax over the gradients of the groups of timesteps, by which --method gptq weighs samples; "
        "0: each sample has its own weight",
    )  # fmt: skip
    rounds: int = knob(3, "alternating rounds R of the search", range(1, 101))
    candidates: int = knob(100, "candidate scales between --alpha and --beta times the range-based one",
                           range(2, 10_001))  # fmt: skip
    alpha: float = knob(0.01, "smallest candidate factor")
    beta: float = knob(1.2, "largest candidate factor")
    coarse: int = knob(8, "stride of the first pass over the candidates, refined around the best; 1 tries each one",
                       range(1, 10_001))  # fmt: skip
    token_share: float = knob(0.1, "share of a row's tokens that a search looks at")

    weight_granularity: str = knob("channel", "one weight scale per output channel or per tensor (three for qkv)",
                                   ("channel", "tensor"))  # fmt: skip
    columns: int = knob(0, "most input channels of a product: a wider linear layer of a block becomes a sum of "
                        "products, each with scales of its own; 0: layers stay whole", range(1 << 16))  # fmt: skip
    column_search: int = knob(0, "find a number of columns for each layer by evolution, with so many evaluations of "
                              "the network; 0: none; 500 in Q-DiT", range(100_001))  # fmt: skip
    column_sizes: str = knob("32,64,96,128,192,288", "numbers of columns that --column-search chooses from")
    mean_columns: int | None = knob(None, "least mean of the layers' columns in --column-search (default: 128, or half "
                                    "of that of whole layers, if less)", range(1, 1 << 16))  # fmt: skip
    column_objective: str = knob("eps", "error that --column-search lowers: of the prediction, or weighted by what it "
                                 "does to the next state", ("eps", "step"))  # fmt: skip
    rotate: int = knob(
        0,
        "rotate the input channels of the linear layers of blocks in groups of so many, 4, 16, 64 or "
        "256; a layer takes the largest of these up to N that divides its width; 0: none",
        range(257),
    )
    rank: int = knob(0, "rank of a float branch beside each linear layer of a block, at most an eighth of the layer's "
                     "inputs and outputs; 0: none", range(1 << 12))  # fmt: skip
    inputs: str = knob("symmetric", "scheme of the inputs of linear layers", partial(schemes_of, "input"))
    equalize: str = knob("none", "divide input channels by constants that their weights are multiplied with: by their "
                         "range (as --equalize alone), or by PTQ4DiT's salience",
                         ("none", "range", "salience"), alone="range")  # fmt: skip
    equalize_all: bool = knob(
        False, "with --equalize, also inputs that no layer before can divide; the engine divides them"
    )
    softmax: str = knob("two-region", "one scale, or two regions of probabilities or of numerators; two-region takes "
                        f"numerators from {NUMERATOR_KEYS:,} keys on; auto takes two regions if they at least halve "
                        "the layer's error, and else one scale, with which engines make one kernel of an attention",
                        ("uniform", "probability", "numerator", "two-region", "auto"))  # fmt: skip
    gelu: str = knob("two-region", "inputs after GELU; auto takes two regions, which cost a second product, if they "
                     "at least halve the layer's error", ("uniform", "two-region", "auto"))  # fmt: skip
    softmax_top: str = knob("exact", "high scale 1/(q-1), which represents 1, or the paper's 1/q", ("exact", "paper"))
    group_bits: str = knob("", "bits of each group of timesteps, such as 8/8/6/4, of inputs with schemes ..._bits: "
                           "one number is that of all groups (default: --activation-bits)")  # fmt: skip
    bit_search: bool = knob(False, "find bits of each input in each group, at most --activation-bits in the mean")
    bit_choices: str = knob("", "bits that --bit-search chooses from, such as 4/6/8 (default: two less, "
                            "--activation-bits and two more)")  # fmt: skip
    time_groups: str = knob("softmax", "which activations have a scale per group", ("none", "softmax", "all"))

    attention: bool = knob(True, "quantize both products of attention")
    patch: str = knob("weights", "what is quantized of the patch embedding", ("none", "weights", "all"))
    final: str = knob("all", "what is quantized of the final layer", ("none", "weights", "all"))
    conditioning: str = knob("weights", "what is quantized of the timestep MLP and adaLN", ("none", "weights", "all"))
    overrides: str = knob(
        "",
        "other knobs for single layers, such as "
        "'blocks.0.mlp.fc2:activation_bits=8,time_groups=all;blocks.1.attn.proj:inputs=asymmetric'",
    )

    def __post_init__(self) -> None:
        earlier = {True: "range", False: "none"}  # what tables and programs of earlier versions say
        object.__setattr__(self, "equalize", earlier.get(self.equalize, self.equalize))  # type: ignore[call-overload]
        for knob_field in fields(self):
            choices, value = choices_of(knob_field), getattr(self, knob_field.name)
            if isinstance(choices, range):
                if value is not None:
                    check_count(flag(knob_field), value, choices[0], choices[-1])
            elif choices and value not in choices:
                raise UsageError(f"{flag(knob_field)} is '{value}'; known are {', '.join(map(str, choices))}.")
        if self.guidance_scale is not None:
            check_number("--guidance-scale", self.guidance_scale, -MOST_GUIDANCE, MOST_GUIDANCE)
        if not 0 < self.alpha < self.beta <= MOST_FACTOR or not 0 < self.token_share <= 1:
            raise UsageError(
                f"--alpha {self.alpha}, --beta {self.beta}, --token-share {self.token_share}: expected "
                f"0 < alpha < beta <= {MOST_FACTOR} and a share in (0, 1]."
            )
        check_number("--fisher-temperature", self.fisher_temperature, 0, MOST_TEMPERATURE)
        if self.fisher_temperature and (self.metric != "ho" or self.method != "gptq"):
            raise UsageError("--fisher-temperature weighs what --method gptq rounds with, by gradients of --metric ho. "
                             "Pass both, or leave it out.")  # fmt: skip
        if self.forecast and self.calls is None:
            raise UsageError("--forecast chooses which calls of --calls N are full. Pass both.")
        if self.rotate not in (0, *BLOCKS):
            raise UsageError(f"--rotate is {self.rotate}; expected {', '.join(map(str, BLOCKS))}, or 0 for none.")
        if self.equalize_all and self.equalize == "none":
            raise UsageError("--equalize-all says where --equalize divides. Pass both.")
        if self.column_search and (self.rotate or self.rank or self.equalize_all):
            raise UsageError("--column-search does not go with --rotate, --rank or --equalize-all. Leave one out.")
        for layer in self.layer_knobs:
            self.for_layer(layer)  # which checks the values

    @property
    def layer_knobs(self) -> Mapping[str, Mapping[str, Any]]:
        """layer -> knob -> value of the overrides."""
        return _parse_overrides(self.overrides)

    def with_layer_knobs(self, changes: Iterable[tuple[str, Mapping[str, Any]]]) -> QuantizationConfig:
        """With these knobs (layer, knob -> value) over those that the overrides have."""
        merged = {layer: dict(knobs) for layer, knobs in self.layer_knobs.items()}
        for layer, knobs in changes:
            merged.setdefault(layer, {}).update(knobs)
        entries = ((layer, ",".join(f"{name}={value}" for name, value in knobs.items()))
                   for layer, knobs in merged.items())  # fmt: skip
        return replace(self, overrides=";".join(f"{layer}:{pairs}" for layer, pairs in entries))

    @property
    def layer_columns(self) -> dict[str, int]:
        """layer -> its own number of columns, of those that have one."""
        return {layer: knobs["columns"] for layer, knobs in self.layer_knobs.items() if "columns" in knobs}

    def for_layer(self, layer: str) -> QuantizationConfig:
        """As it is for one layer, its overrides applied; a part has those of its layer, and then its own."""
        found = self.layer_knobs
        changes = {name: value for each in wholes(layer) for name, value in found.get(each, {}).items()}
        return replace(self, overrides="", **changes) if changes else self

    def for_model(self, model: LoadedModel) -> QuantizationConfig:
        """With the model's own values if none were given; the guidance scale stays None for unguided models."""
        scale = check_scale(model.guidance, self.guidance_scale)
        return replace(
            self,
            steps=model.sampling.steps if self.steps is None else self.steps,
            guidance_scale=None if model.guidance is None else scale,
        )

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> QuantizationConfig:
        """From the settings of a scale table, which hold more than knobs."""
        return cls(
            **{knob_field.name: settings[knob_field.name] for knob_field in fields(cls) if knob_field.name in settings}
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """One knob per line."""
        values = {flag(f)[2:]: getattr(self, f.name) for f in fields(self)}
        return "\n".join(f"{name:<20} {'none' if value == '' else value}" for name, value in values.items())


def wholes(layer: str) -> list[str]:
    """The layers that a layer is a part of, the largest first, and itself: LAYER, LAYER.columns.N."""
    pieces = layer.split(".columns.")
    return [".columns.".join(pieces[: count + 1]) for count in range(len(pieces))]


@lru_cache(maxsize=16)
def _parse_overrides(text: str) -> Mapping[str, Mapping[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entry in filter(None, text.split(";")):
        layer, _, pairs = entry.partition(":")
        for pair in pairs.split(","):
            name, _, value = pair.partition("=")
            name = name.strip().replace("-", "_")
            whole = name in LAYER_KNOBS and isinstance(getattr(TQ_DIT, name), int)
            if not layer.strip() or name not in LAYER_KNOBS or (whole and not value.isdecimal()):
                raise UsageError(
                    f"--overrides '{entry}': expected LAYER:KNOB=VALUE,... with knobs {', '.join(LAYER_KNOBS)}."
                )
            found.setdefault(layer.strip(), {})[name] = int(value) if whole else value.strip()
    return found


# What can differ from layer to layer.
LAYER_KNOBS = (
    "weight_bits",
    "activation_bits",
    "outer_bits",
    "attention_bits",
    "columns",
    "group_bits",
    "inputs",
    "softmax",
    "gelu",
    "time_groups",
    "patch",
    "final",
)


def presets_without_rows() -> list[str]:
    """Names of the presets that need no calibration: what an export can take in place of a scale table."""
    return [name for name, config in PRESETS.items() if config.method == "weights" and config.equalize == "none"]


def default_preset(weight_bits: int, activation_bits: int, backend: str | None = None) -> str:
    """What a user gets who names no preset: the knee of the measured front (docs/results/presets.md).

    At W8A8 `dynamic` is nearly as fast as the fastest, and has a third of its error. Fewer bits need weights that are
    rounded by what the activations say. backend: the engine that the table is for; None: one on a CPU. On TensorRT
    nothing was timed: it gets static scales, which need no pass over an activation.
    """
    if backend is not None and backend.startswith("tensorrt"):
        return "fast"
    return "dynamic" if weight_bits == activation_bits == 8 else "gptq"


def flag(knob_field: Field[Any]) -> str:
    return "--" + knob_field.name.replace("_", "-")


TQ_DIT = QuantizationConfig()
# Each differs from the one after it in one ingredient, and ho+mrq from tq-dit: what Table III of the paper adds up.
HO_MRQ = replace(TQ_DIT, time_groups="none")
HO = replace(HO_MRQ, softmax="uniform", gelu="uniform")
MSE = replace(HO, metric="mse")
MIN_MAX = replace(MSE, method="min-max")
# The paper's settings to the letter (section IV, Algorithm 1, eq. 11; granularity and sites of its released code).
PAPER = replace(
    TQ_DIT, fisher="loss", weight_granularity="tensor", softmax="probability", softmax_top="paper", outer_bits=2,
    patch="all", final="all", conditioning="none",
)  # fmt: skip

# Beyond the paper with static scales alone: all that pays (docs/calibration.md says what each is worth).
STATIC = replace(TQ_DIT, inputs="asymmetric", time_groups="all", equalize="range")
# Two regions only if they pay: a second product of fc2 is a third more of a block's work.
FAST = replace(TQ_DIT, inputs="asymmetric", gelu="auto", softmax="auto")

# Nothing is calibrated: a scale per token is found while the network runs, and those of the weights need no rows. The
# few rows are those of golden calls. Attention stays float.
DYNAMIC = replace(
    TQ_DIT, method="weights", inputs="dynamic", gelu="uniform", attention=False, time_groups="none", groups=1,
    rows_per_group=8, chains=1, alpha=0.4, beta=1.0, candidates=25,
)  # fmt: skip

# Scales per token, weights rounded by what all tokens say.
GPTQ = replace(STATIC, method="gptq", inputs="dynamic_asymmetric", gelu="uniform", rounds=1, token_share=1.0)
# The least error that was found at every number of bits (docs/results/presets.md): gptq in groups of 32 channels,
# rotated, beside branches of low rank. For quality, not for speed: a group is a product of its own.
BEST = replace(GPTQ, columns=32, rotate=16, rank=32, equalize_all=True, attention_bits=8)

# Reconstruction of blocks, on rows of all timesteps with one scale each, as the papers have it.
Q_DIFFUSION = replace(
    TQ_DIT, method="reconstruct", metric="mse", inputs="asymmetric", softmax="uniform", gelu="uniform",
    time_groups="none",
)  # fmt: skip
PTQD = replace(Q_DIFFUSION, correction=True)
PTQ4DIT = replace(Q_DIFFUSION, equalize="salience")

# Q-DiT (arXiv 2406.17343): groups of input channels whose sizes evolution finds, ranges per token and group, GPTQ.
Q_DIT = replace(GPTQ, equalize="none", attention=False, column_search=100)

# AdaTSQ (arXiv 2602.09883): bits of each input in each group of timesteps, GPTQ weighted by the gradients over time.
ADATSQ = replace(GPTQ, inputs="asymmetric_bits", bit_search=True, fisher_temperature=1.0)

# As published, except for what docs/methods.md says. Both leave attention float.
VIDIT_Q = replace(
    DYNAMIC, inputs="dynamic_asymmetric", equalize="range", equalize_all=True, rotate=64, rows_per_group=64, chains=2
)
SVDQUANT = replace(DYNAMIC, equalize="range", equalize_all=True, rank=32, columns=64, rows_per_group=64, chains=2)

PRESETS = {"tq-dit": TQ_DIT, "paper": PAPER, "min-max": MIN_MAX, "mse": MSE, "ho": HO, "ho+mrq": HO_MRQ,
           "static": STATIC, "gptq": GPTQ, "best": BEST, "fast": FAST, "dynamic": DYNAMIC, "q-diffusion": Q_DIFFUSION,
           "ptqd": PTQD, "ptq4dit": PTQ4DIT, "q-dit": Q_DIT, "adatsq": ADATSQ, "vidit-q": VIDIT_Q,
           "svdquant": SVDQUANT}  # fmt: skip
