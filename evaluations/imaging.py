"""Pictures as arrays: how far apart two collections are, and how near one comes to another.

Features are rows of any network's activations; what a distance means depends on that network, so
it is named after it. Only the distance in Inception's features is called FID; none here is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from unlearn.attacks.membership.arrays import array
from unlearn.errors import BadInput

Array = npt.NDArray[np.float64]
NEIGHBOURS = 3  # that make a manifold
CLOSEST = 50  # training pictures that tell what is near, for the adaptive ratio
AT_ONCE = 256  # rows whose distances are held at a time


class PrecisionRecall(NamedTuple):
    """Share of generated pictures that look real, and of real ones that could be generated."""

    precision: float
    recall: float


def frechet_distance(a: Any, b: Any) -> float:
    """Squared Frechet (Wasserstein-2) distance of Gaussians fitted to two samples.

        |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    Heusel et al. 2017 (arXiv 1706.08500, eq. 6), in whatever features are given. With A the
    centred sample over sqrt(n - 1), so that C_a = A'A, the trace of the root is the sum of the
    singular values of A B': no root of a nearly singular matrix is taken.

    Args:
        a: features, shape (n, dim), n at least 2.
        b: features, shape (m, dim), m at least 2.

    Returns:
        The distance, at least 0; biased upwards by small samples.

    Raises:
        BadInput: samples of other shapes, too small, or not finite.

    >>> round(frechet_distance([[0.0], [2.0]], [[3.0], [5.0]]), 9)
    9.0
    """
    a, b = _both(a, b, 2)
    mean_a, mean_b = a.mean(0), b.mean(0)
    root_a: Array = np.asarray(np.linalg.qr((a - mean_a) / np.sqrt(len(a) - 1), mode="r"))
    root_b: Array = np.asarray(np.linalg.qr((b - mean_b) / np.sqrt(len(b) - 1), mode="r"))
    cross = float(np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum())
    apart = float(((mean_a - mean_b) ** 2).sum() + (root_a**2).sum() + (root_b**2).sum())
    return max(0.0, apart - 2 * cross)


def kernel_distance(a: Any, b: Any, subsets: int = 100, size: int = 1000, seed: int = 0) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / dim + 1)^3.

    Binkowski et al. 2018 (arXiv 1801.01401, section 4). Unlike the Frechet distance it is not
    biased by small samples, so it may be slightly below 0.

    Args:
        a: features, shape (n, dim), n at least 2.
        b: features, shape (m, dim), m at least 2.
        subsets: random parts over which the distance is averaged, where the samples are larger
            than ``size``; smaller ones are taken whole, once.
        size: of the parts.
        seed: of their choice.

    Raises:
        BadInput: samples of other shapes, too small, or not finite.

    >>> kernel_distance([[0.0], [0.0]], [[1.0], [1.0]])
    7.0
    """
    a, b = _both(a, b, 2)
    if max(len(a), len(b)) <= size:
        return _mmd(a, b)
    draw = np.random.default_rng(seed)

    def part(x: Array) -> Array:
        return x[draw.choice(len(x), min(size, len(x)), replace=False)]

    return float(np.mean([_mmd(part(a), part(b)) for _ in range(subsets)]))


def _mmd(a: Array, b: Array) -> float:
    def kernel(x: Array, y: Array) -> Array:
        return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)

    def among(x: Array) -> float:
        values = kernel(x, x)
        return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))

    return among(a) + among(b) - 2 * float(kernel(a, b).mean())


def radii(reference: Any, neighbours: int = NEIGHBOURS) -> Array:
    """Distance of each point from its k-th nearest among the others, shape (n,).

    Raises:
        BadInput: no more points than neighbours.
    """
    points = array(reference, "reference", None, None)
    if len(points) <= neighbours:
        raise BadInput(f"it takes more than {neighbours} points to have {neighbours} neighbours")
    return np.sort(_distances(points, points), axis=1)[:, neighbours]  # 0: the point itself


def within(points: Any, reference: Any, neighbours: int = NEIGHBOURS) -> npt.NDArray[np.bool_]:
    """Whether points lie in the manifold of a reference: within the radius of any of its points.

    Kynkaanniemi et al. 2019 (arXiv 1904.06991, eq. 1).

    Args:
        points: features, shape (n, dim).
        reference: features, shape (m, dim), more than ``neighbours``.
        neighbours: k, whose distance from a reference point is its radius.

    >>> within([[0.5], [9.0]], [[0.0], [1.0], [2.0], [3.0]], neighbours=1).tolist()
    [True, False]
    """
    a, b = _both(points, reference, 1)
    return np.asarray((_distances(a, b) <= radii(b, neighbours)).any(1))


def among_themselves(points: Any, neighbours: int = NEIGHBOURS) -> npt.NDArray[np.bool_]:
    """Whether each point lies in the manifold of the others: what :func:`within` can be at best.

    A point left out widens the radius of those it was a neighbour of up to their next neighbour,
    so it lies within them exactly if it was one of their k nearest.
    """
    found = array(points, "points", None, None)
    near = _distances(found, found) <= radii(found, neighbours)
    np.fill_diagonal(near, False)
    return np.asarray(near.any(1))


def precision_recall(generated: Any, real: Any, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 2).

    Args:
        generated: features, shape (n, dim).
        real: features, shape (m, dim).
        neighbours: k of the manifolds.
    """
    return PrecisionRecall(
        float(within(generated, real, neighbours).mean()),
        float(within(real, generated, neighbours).mean()),
    )


def clip_score(pictures: Any, texts: Any, weight: float = 2.5) -> Array:
    """``weight`` times the cosine, at least 0, of each picture with its text, shape (n,).

    Hessel et al. 2021 (arXiv 2104.08718, eq. 1).

    Args:
        pictures: embeddings, shape (n, dim).
        texts: embeddings, shape (n, dim), of the same network.
        weight: 2.5 as published; 100 for percent.

    >>> clip_score([[2.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]).tolist()
    [2.5, 0.0]
    """
    a, b = _both(pictures, texts, 1)
    if len(a) != len(b):
        raise BadInput(f"there are {len(a)} pictures and {len(b)} texts: give one per picture")
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(1) / np.maximum(lengths, np.finfo(float).tiny)
    return np.asarray(weight * np.clip(cosine, 0.0, 1.0))  # above 1 by rounding alone


class Nearest(NamedTuple):
    """The training picture nearest to each generated one.

    Attributes:
        which: its position, shape (n,).
        distance: root mean squared difference per pixel, shape (n,).
        ratio: the distance over half the mean distance of the ``CLOSEST`` nearest, shape (n,):
            far below 1 where the picture is nearer to one training picture than is usual there.
    """

    which: npt.NDArray[np.int64]
    distance: Array
    ratio: Array


def nearest(generated: Any, training: Any, closest: int = CLOSEST) -> Nearest:
    """How near generated pictures come to training pictures.

    Carlini et al. 2023 (arXiv 2301.13188, section 5.1): the adaptive ratio has alpha = 0.5 and 50
    neighbours, so that flat pictures, which are near to many others, do not count as copies.

    Args:
        generated: pictures, shape (n, ...).
        training: pictures, shape (m, ...) of the same size and range.
        closest: training pictures that the ratio compares with, all where there are fewer.

    >>> nearest([[0.0, 0.0]], [[0.6, 0.8], [3.0, 4.0]]).ratio.round(3).tolist()
    [0.667]
    """
    a, b = (np.asarray(x, np.float64) for x in (generated, training))
    a, b = _both(a.reshape(len(a), -1), b.reshape(len(b), -1), 1)
    apart = _distances(a, b) / np.sqrt(a.shape[1])
    distance = apart.min(1)
    usual = np.sort(apart, axis=1)[:, :closest].mean(1)
    ratio = distance / np.maximum(usual / 2, np.finfo(float).tiny)
    return Nearest(apart.argmin(1), distance, ratio)


def _distances(a: Array, b: Array) -> Array:
    """Euclidean distances, shape (n, m)."""
    from scipy.spatial.distance import cdist

    return np.vstack([cdist(a[i : i + AT_ONCE], b) for i in range(0, len(a), AT_ONCE)])


def _both(a: Any, b: Any, least: int) -> tuple[Array, Array]:
    """Two matrices of as many columns, finite, with at least so many rows."""
    found = array(a, "a", None, None), array(b, "b", None, None)
    if found[0].shape[1] != found[1].shape[1]:
        raise BadInput(
            f"the rows have {found[0].shape[1]} and {found[1].shape[1]} columns: give the same"
        )
    if min(map(len, found)) < least:
        raise BadInput(f"it takes {least} rows on either side")
    if not all(np.isfinite(x).all() for x in found):
        raise BadInput("the rows hold numbers that are not finite")
    return found
