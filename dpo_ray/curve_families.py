"""Families of learning curves and their fit by least squares. Pure: numpy, no torch, no file.

S is the number of sizes, B of curves fitted at once, P of a family's shape parameters. Every family is a value less an
amplitude times a fixed shape of the size,

    f(n) = c - a g(n; shape),    a >= 0,

so for a given shape the best c and a are a weighted linear regression and only the shape, one or two positive numbers,
is searched (variable projection, Golub & Pereyra 1973). Curves here rise; `curves` turns a metric that falls.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

GRID = {1: 33, 2: 17}
"""Points of the starting grid along every axis, by the number of axes."""

SEARCH_ROUNDS = 60
"""Of the pattern search; a parameter is then known to some millionths of itself, or as far as it can be told at all."""


class Family(NamedTuple):
    """A family of curves; `a` and `c` are found by regression, the parameters after them by search."""

    formula: str
    parameters: tuple[str, ...]
    shape: Callable[..., Any]
    """g(n, *shape parameters), falling in n."""
    box: Callable[[float, float], list[tuple[float, float]]]
    """Smallest and largest size -> bounds of each shape parameter."""
    saturates: bool = True
    """c is the limit for endless data, which cannot pass the best possible value."""
    smallest_size: int = 1


def _no_box(smallest: float, largest: float) -> list[tuple[float, float]]:
    return []


FAMILIES: dict[str, Family] = {
    "constant": Family("c", ("c",), lambda n: 0.0 * n, _no_box),
    "log2": Family("c + a ln n", ("c", "a"), lambda n: -np.log(n), _no_box, saturates=False),
    "ilog2": Family("c - a / ln n", ("c", "a"), lambda n: 1 / np.log(n), _no_box, smallest_size=2),
    "pow3": Family("c - a n^-alpha", ("c", "a", "alpha"), lambda n, alpha: n**-alpha, lambda low, high: [(0.01, 2.0)]),
    "exp3": Family(
        "c - a exp(-b n)",
        ("c", "a", "b"),
        lambda n, b: np.exp(-b * n),
        lambda low, high: [(0.01 / high, 10 / low)],
    ),
    "pow4": Family(
        "c - a (n + d)^-alpha",
        ("c", "a", "alpha", "d"),
        lambda n, alpha, d: (n + d) ** -alpha,
        lambda low, high: [(0.01, 2.0), (0.01 * low, 10 * high)],
    ),
    "wbl4": Family(
        "c - a exp(-(n / k)^d)",
        ("c", "a", "k", "d"),
        lambda n, k, d: np.exp(-((n / k) ** d)),
        lambda low, high: [(0.1 * low, 10 * high), (0.1, 3.0)],
    ),
    "mmf4": Family(
        "c - a / (1 + (n / k)^d)",
        ("c", "a", "k", "d"),
        lambda n, k, d: 1 / (1 + (n / k) ** d),
        lambda low, high: [(0.1 * low, 10 * high), (0.1, 5.0)],
    ),
}
"""The families, fewest parameters first. `constant` is the null model: data does not matter.

pow3, exp3, pow4 (a power law shifted by d pairs), wbl4 (Weibull) and mmf4 (Morgan, Mercer & Flodin 1975) are among
those surveyed by Viering & Loog 2021 (arXiv:2103.10948); wbl4 and mmf4 are written here with a scale k in pairs, for
mmf4 the size where half of a is gained. log2 is what pow3 becomes as alpha goes to 0. The bounds keep a shape from
bending so far outside the sizes that they could not tell it from a constant or a line.
"""


class Coefficients(NamedTuple):
    """B curves of one family, for the metric turned so that larger is better."""

    c: FloatArray  # [B]
    a: FloatArray  # [B]
    shape: FloatArray  # [B, P]

    def at(self, family: Family, sizes: FloatArray) -> FloatArray:
        """[B, N] values at `sizes` [N]."""
        return self.c[:, None] - self.a[:, None] * shape_at(family, sizes, self.shape)


def shape_at(family: Family, sizes: FloatArray, shape: FloatArray) -> FloatArray:
    """g at sizes [N] for shape parameters [..., P]: [..., N]."""
    columns = [shape[..., i, None] for i in range(shape.shape[-1])]
    return np.broadcast_to(family.shape(sizes, *columns), (*shape.shape[:-1], len(sizes)))


def regress(
    g: FloatArray, y: FloatArray, weights: FloatArray, ceiling: float | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Weighted least squares of y on c - a g, with a >= 0 and c <= ceiling: c, a and the squared error, [...] each.

    Args:
        g: [..., S].
        y: [..., S].
        weights: [S].
    """
    share = weights / weights.sum()
    centre, mean = (g * share).sum(-1, keepdims=True), (y * share).sum(-1, keepdims=True)
    spread = (share * (g - centre) ** 2).sum(-1)
    slope = -(share * (g - centre) * (y - mean)).sum(-1)
    a = np.maximum(0.0, slope / np.where(spread > 0, spread, np.inf))
    c = mean[..., 0] + a * centre[..., 0]
    if ceiling is not None:
        # The squared error is convex: where the free limit lies above the ceiling, the best allowed one is the ceiling.
        square = (share * g**2).sum(-1)
        at_ceiling = (share * g * (ceiling - y)).sum(-1) / np.where(square > 0, square, np.inf)
        a = np.where(c > ceiling, at_ceiling, a)
        c = np.minimum(c, ceiling)
    error = (share * (y - c[..., None] + a[..., None] * g) ** 2).sum(-1)
    return c, a, error


def fit_family(
    family: Family, sizes: FloatArray, y: FloatArray, weights: FloatArray, ceiling: float | None
) -> Coefficients:
    """Fit B curves at once: a grid over the whole box, then a pattern search from its best point.

    The grid makes the start safe from local minima; the search (Hooke & Jeeves 1961) looks at the neighbours one step
    away in every direction of the logarithms, moves to the best and halves the step where none is better.

    Args:
        sizes: [S].
        y: [B, S], larger is better.
        weights: [S].
        ceiling: Of c, for families that saturate.
    """
    ceiling = ceiling if family.saturates else None
    box = np.log(np.array(family.box(float(sizes[0]), float(sizes[-1]))).reshape(-1, 2))  # [P, 2]
    if not len(box):
        shape = np.zeros((len(y), 0))
        return Coefficients(*regress(shape_at(family, sizes, shape), y, weights, ceiling)[:2], shape)

    points = GRID[len(box)]
    grid = _product([np.linspace(low, high, points) for low, high in box])  # [K, P]
    _, _, error = regress(shape_at(family, sizes, np.exp(grid)), y[:, None, :], weights, ceiling)  # [B, K]
    best = grid[error.argmin(axis=1)]  # [B, P]
    step = np.tile((box[:, 1] - box[:, 0]) / (points - 1), (len(y), 1))
    neighbours = _product([np.array([0.0, -1.0, 1.0])] * len(box))  # [3**P, P], itself first
    for _ in range(SEARCH_ROUNDS):
        around = np.clip(best[:, None, :] + step[:, None, :] * neighbours, box[:, 0], box[:, 1])
        _, _, error = regress(shape_at(family, sizes, np.exp(around)), y[:, None, :], weights, ceiling)
        at = error.argmin(axis=1)
        best = around[np.arange(len(y)), at]
        step[at == 0] /= 2

    shape = np.exp(best)
    c, a, _ = regress(shape_at(family, sizes, shape), y, weights, ceiling)
    return Coefficients(c, a, shape)


def _product(axes: list[FloatArray]) -> FloatArray:
    """Every combination of one value from each axis, [K, P]."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
