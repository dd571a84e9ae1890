"""The search: what it minimises, that no step makes it worse, and that short cuts give the same answer."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import few
from tqdit.calibration.capture import Samples
from tqdit.calibration.config import PRESETS, QuantizationConfig
from tqdit.calibration.layers import LayerPlan, OperandPlan
from tqdit.calibration.methods import METHODS, gptq, search
from tqdit.calibration.operands import Weight
from tqdit.calibration.problem import Problem, make_problem
from tqdit.models.products import Product
from tqdit.quantization.granularity import PerChannel, PerTensor, PerTimestepGroup
from tqdit.quantization.schemes.asymmetric import Asymmetric
from tqdit.quantization.schemes.softmax_numerator import SoftmaxNumerator
from tqdit.quantization.schemes.two_region_gelu import TwoRegionGelu
from tqdit.quantization.schemes.two_region_softmax import TwoRegionSoftmax

ROWS, TOKENS, WIDTH, OUT, GROUPS = 12, 10, 24, 16, 3
GROUP = torch.arange(ROWS) // 4
CONFIG = QuantizationConfig()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def ranges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.flatten(1).amin(1), x.flatten(1).amax(1)


def linear_problem(
    scheme: Any, bits: int, scales: int, weight_scales: int, config: QuantizationConfig = CONFIG, tokens: int = TOKENS
) -> Problem:
    """Inputs that grow from group to group, with heavy tails, and unequal weights of the errors."""
    x = random(ROWS, tokens, WIDTH) * torch.exp(random(ROWS, tokens, 1, seed=1)) * (1 + GROUP)[:, None, None]
    if scheme == "gelu":
        x = torch.nn.functional.gelu(x, approximate="tanh")
    weight, g2 = random(OUT, WIDTH, seed=2), torch.exp(random(ROWS, tokens, OUT, seed=3))
    plan = LayerPlan(
        Product("m", "block"),
        {"input": OperandPlan(scheme, bits, scales), "weight": OperandPlan("symmetric", bits, weight_scales)},
    )
    return make_problem(plan, Samples(x, None, g2, {"left": ranges(x)}), weight, GROUP, config)


def attention_problem(scheme: Any, bits: int, scales: int, config: QuantizationConfig = CONFIG) -> Problem:
    scores = random(ROWS, 2, TOKENS, TOKENS) * 2 ** (GROUP + 1)[:, None, None, None]
    left = torch.softmax(scores, -1) if scheme.startswith("softmax") else scores
    right, g2 = random(ROWS, 2, TOKENS, 8, seed=2), torch.exp(random(ROWS, 2, TOKENS, 8, seed=3))
    plan = LayerPlan(
        Product("m", "attention"),
        {"left": OperandPlan(scheme, bits, scales), "right": OperandPlan("symmetric", bits, scales)},
    )
    samples = Samples(left, right, g2, {"left": ranges(left), "right": ranges(right)})
    return make_problem(plan, samples, None, GROUP, config)


PROBLEMS = [
    *((f"{scheme} {bits} bits, {scales} scales", linear_problem(scheme, bits, scales, OUT))
      for scheme in ("symmetric", "asymmetric", "gelu") for bits in (3, 6, 8) for scales in (1, GROUPS)),
    ("weight per tensor", linear_problem("symmetric", 6, 1, 1)),
    ("weight in two blocks", linear_problem("symmetric", 6, 1, 2)),
    *((f"attention {scheme} {bits} bits, {scales} scales", attention_problem(scheme, bits, scales))
      for scheme in ("symmetric", "softmax", "softmax_numerator") for bits in (4, 8) for scales in (1, GROUPS)),
]  # fmt: skip
problems = pytest.mark.parametrize("problem", [p for _, p in PROBLEMS], ids=[name for name, _ in PROBLEMS])


@problems
def test_no_step_increases_the_objective(problem: Problem) -> None:
    solution = search.solve(problem, CONFIG)
    steps = sum(len(parameters) for parameters in solution.parameters.values())
    assert len(solution.history) == 1 + CONFIG.rounds * steps
    history = solution.history
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(history))
    assert solution.history[-1] == pytest.approx(problem.objective(solution.parameters), rel=1e-5)


@problems
def test_the_search_is_deterministic(problem: Problem) -> None:
    first, second = search.solve(problem, CONFIG), search.solve(problem, CONFIG)
    assert first.history == second.history
    for role, parameters in first.parameters.items():
        assert all(torch.equal(parameters[name], second.parameters[role][name]) for name in parameters)


@pytest.mark.slow
@pytest.mark.parametrize("metric", few(["ho", "mse"], "ho"))
def test_short_cuts_are_as_good_as_trying_every_candidate(metric: str) -> None:
    config, ratios = replace(CONFIG, metric=metric), []
    for scheme in ("symmetric", "asymmetric", "gelu"):
        for bits in (4, 6, 8):
            problem = linear_problem(scheme, bits, 1, OUT, config, tokens=400)
            fast, slow = search.solve(problem, config), search.solve(problem, replace(config, coarse=1))
            ratios.append(fast.history[-1] / slow.history[-1])
            assert 3 * fast.multiply_adds < slow.multiply_adds
    assert np.median(ratios) < 1.01


def test_the_objective_is_the_weighted_squared_error_of_the_product() -> None:
    problem = linear_problem("symmetric", 4, 1, OUT)
    parameters = problem.initial
    x, w = problem.left.numpy(), problem.right.numpy()
    sx, sw = parameters["input"]["scale"].numpy(), parameters["weight"]["scale"].numpy()[:, None]
    x_hat, w_hat = sx * np.clip(np.rint(x / sx), -8, 7), sw * np.clip(np.rint(w / sw), -8, 7)
    error = x_hat.astype(np.float64) @ w_hat.astype(np.float64).T - x.astype(np.float64) @ w.T
    assert problem.g2 is not None
    expected = float((problem.g2.double().numpy() * error**2).sum())
    assert problem.objective(parameters) == pytest.approx(expected, rel=1e-4)
    plain = linear_problem("symmetric", 4, 1, OUT, replace(CONFIG, metric="mse"))
    assert plain.objective(parameters) == pytest.approx(float((error**2).sum()), rel=1e-4)


def test_the_scale_of_a_group_is_that_of_its_rows_alone() -> None:
    together = search.solve(linear_problem("symmetric", 4, GROUPS, OUT), CONFIG).parameters["input"]["scale"]
    whole = linear_problem("symmetric", 4, GROUPS, OUT)
    x = whole.left.clone()
    x[GROUP == 2] *= 3  # only the last group changes
    assert whole.g2 is not None
    samples = Samples(x, None, whole.g2, {"left": ranges(x)})
    plan = LayerPlan(Product("m", "block"), {"input": OperandPlan("symmetric", 4, GROUPS)})
    alone = search.solve(make_problem(plan, samples, whole.right, GROUP, CONFIG), CONFIG).parameters["input"]["scale"]
    before = LayerPlan(Product("m", "block"), {"input": OperandPlan("symmetric", 4, GROUPS)})
    samples = Samples(whole.left, None, whole.g2, {"left": ranges(whole.left)})
    base = search.solve(make_problem(before, samples, whole.right, GROUP, CONFIG), CONFIG).parameters["input"]["scale"]
    assert torch.equal(alone[:2], base[:2])
    assert alone[2] == pytest.approx(3 * float(base[2]), rel=0.1)
    assert together[0] < together[2]


def test_three_matrices_in_one_weight_get_three_scales() -> None:
    weight = torch.cat([random(4, 8, seed=i) * 10**i for i in range(3)])
    operand = Weight(weight, OperandPlan("symmetric", 8, 3), torch.ones(1))
    parameters = operand.initial
    assert len(parameters["scale"]) == 3
    quantizer = operand.quantizer(parameters)
    assert quantizer.granularity == PerChannel(0)
    scale = quantizer.scale  # type: ignore[attr-defined]
    assert scale.shape == (12,)
    assert len(set(scale.tolist())) == 3
    assert scale[0] < scale[4] < scale[8]


def test_solutions_become_entries_of_the_table() -> None:
    def entry(problem: Problem, role: Any) -> Any:
        return problem.operands[role].quantizer(METHODS["search"](problem, CONFIG).parameters[role])

    asymmetric = entry(linear_problem("asymmetric", 6, GROUPS, 1), "input")
    assert isinstance(asymmetric, Asymmetric)
    assert asymmetric.granularity == PerTimestepGroup(GROUPS)
    assert asymmetric.zero_point.dtype == np.int32
    assert entry(linear_problem("symmetric", 6, 1, 1), "weight").granularity == PerTensor()
    gelu = entry(linear_problem("gelu", 6, 1, 1), "input")
    assert isinstance(gelu, TwoRegionGelu)
    assert gelu.negative_scale < gelu.positive_scale
    softmax = entry(attention_problem("softmax", 6, GROUPS), "left")
    assert isinstance(softmax, TwoRegionSoftmax)
    assert np.isin(softmax.high_scale / softmax.low_scale, 2.0 ** np.arange(6)).all()
    numerator = entry(attention_problem("softmax_numerator", 6, GROUPS), "left")
    assert type(numerator) is SoftmaxNumerator
    assert numerator.granularity == PerTimestepGroup(GROUPS)
    assert np.isin(numerator.high_scale / numerator.low_scale, 2.0 ** np.arange(6)).all()


def test_a_layer_that_nothing_weighs_keeps_its_range_based_scales() -> None:
    problem = linear_problem("symmetric", 6, 1, OUT)
    assert problem.g2 is not None
    problem.g2.zero_()
    solution = search.solve(problem, CONFIG)
    assert torch.equal(solution.parameters["input"]["scale"], problem.initial["input"]["scale"])
    assert problem.relative(0.0) == 0.0


def test_adjacent_presets_differ_in_one_ingredient() -> None:
    def difference(a: str, b: str) -> set[str]:
        first, second = PRESETS[a].to_json(), PRESETS[b].to_json()
        return {name for name in first if first[name] != second[name]}

    assert difference("min-max", "mse") == {"method"}
    assert difference("mse", "ho") == {"metric"}
    assert difference("ho", "ho+mrq") == {"softmax", "gelu"}
    assert difference("ho+mrq", "tq-dit") == {"time_groups"}


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_feedback_rounds_weights_better_than_to_nearest(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = LayerPlan(
        Product("m", "block"), {"input": OperandPlan("symmetric", 8, 1), "weight": OperandPlan("symmetric", bits, OUT)}
    )
    x = random(ROWS, 100, WIDTH) @ random(WIDTH, WIDTH, seed=5)  # correlated, as inputs are
    g2 = torch.exp(random(ROWS, 100, OUT, seed=3))
    problem = make_problem(plan, Samples(x, None, g2, {"left": ranges(x)}), random(OUT, WIDTH, seed=2), GROUP, CONFIG)
    nearest, found = METHODS["search"](problem, CONFIG), METHODS["gptq"](problem, CONFIG)
    assert found.history[-1] < 0.95 * nearest.history[-1]
    codes = found.weight_codes
    assert codes is not None
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1
    assert torch.equal(codes, codes.round())
    ratios = found.parameters["weight"]["scale"] / nearest.parameters["weight"]["scale"]
    assert {round(ratio, 4) for ratio in ratios.tolist()} <= set(gptq.FACTORS)
    monkeypatch.setattr(gptq, "FACTORS", (1.0,))  # the scales of the search alone
    assert found.history[-1] < METHODS["gptq"](problem, CONFIG).history[-1]


def test_what_earlier_parts_of_a_layer_left_is_a_part_of_the_target() -> None:
    """Half of the columns each: the second half mends the first one's error, as the whole layer would count it."""
    config, whole = replace(CONFIG, method="gptq"), linear_problem("asymmetric", 8, 1, OUT, tokens=40)
    x, weight = whole.left, whole.right
    assert whole.g2 is not None
    halves = []
    for columns in (slice(0, WIDTH // 2), slice(WIDTH // 2, WIDTH)):
        part = LayerPlan(Product("m", "block"), {"weight": OperandPlan("symmetric", 3, OUT)})
        samples = Samples(x[..., columns], None, whole.g2, {"left": ranges(x[..., columns])})
        halves.append(make_problem(part, samples, weight[:, columns], GROUP, config))
    first, second = halves
    solution = gptq.solve(first, config)
    assert solution.weight_codes is not None
    scale = solution.parameters["weight"]["scale"][:, None]
    left_over = first.left_over(solution)
    expected = first.left @ (solution.weight_codes * scale).t() - first.target
    torch.testing.assert_close(left_over, expected)

    mending = replace(second, carried=left_over)
    torch.testing.assert_close(mending.target, second.target - left_over)
    total = []
    for problem in (second, mending):
        found = problem.left_over(gptq.solve(problem, config))
        error = found if problem is mending else found + left_over
        total.append(float((whole.g2 * error**2).sum()))
    assert total[1] < total[0]
