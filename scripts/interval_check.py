"""Whether the interval of a Frechet distance says how far the distance really moves from seed to seed.

    python scripts/interval_check.py [demo | text]

Draws sets of a demo model's data with many seeds (no model is sampled), and compares the spread of their distances
with the standard errors that each set alone gives: by the jackknife that tqdit-evaluate uses, and by the bootstrap.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tqdit.evaluate.bootstrap import around, jackknife
from tqdit.evaluate.judges import JUDGES
from tqdit.evaluate.statistics import Gaussian, frechet_to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=list(JUDGES), default="demo")
    parser.add_argument("--counts", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--seeds", type=int, default=24, help="sets of each count (default: %(default)s)")
    parser.add_argument("--checked", type=int, default=8, help="sets whose standard error is computed (%(default)s)")
    args = parser.parse_args()
    extractor, draw = JUDGES[args.model].extractor(), JUDGES[args.model].draw
    distance = frechet_to(Gaussian.of(extractor(draw(4096, 20_000).pixels).pooled))
    within = " within classes" * (args.model == "demo")  # which come in turn there; letters are drawn at random
    print(f"samples   mean distance   spread over seeds   jackknife   bootstrap{within}")
    for count in args.counts:
        drawn = [draw(count, seed) for seed in range(args.seeds)]
        sets = [extractor(each.pixels).pooled.astype(np.float64) for each in drawn]
        values = [distance(Gaussian.of(x)) for x in sets]
        labels = drawn[0].labels if within else None
        errors = np.array([standard_errors(x, labels, distance) for x in sets[: args.checked]]).mean(axis=0)
        print(
            f"{count:>7}   {np.mean(values):>13.4f}   {np.std(values, ddof=1):>17.4f}   {errors[0]:>9.4f}   "
            f"{errors[1]:>9.4f}",
            flush=True,
        )


def standard_errors(
    x: NDArray[np.float64], labels: NDArray[np.int64] | None, distance: Callable[[Gaussian], float]
) -> tuple[float, float]:
    """Of the distance of one set (N, D): by the jackknife, by the bootstrap."""
    jack = jackknife(lambda weights: distance(Gaussian.of(x, weights)), len(x), 200, labels).standard_error
    boot = around(lambda chosen: distance(Gaussian.of(x[chosen])), len(x), 100, 0, labels).standard_error
    assert jack is not None
    assert boot is not None
    return jack, boot


if __name__ == "__main__":
    main()
