"""Which points are inside the convex hull of the others: exactly, for tens of thousands of them.

A point w_i is outside iff some direction u has u·w_i > u·w_j for all j ≠ i: an output embedding is
outside iff some state makes its word the likeliest. With a bias the point is (w_i, b_i), and the
last coordinate of u is 1, or the limit of that: u·w_i + s·b_i > u·w_j + s·b_j with s ≥ 0.

1. Its own direction, from the mean of all points, shows most points to be outside.
2. For those left, a search for the nearest point of the hull (Gilbert's method) mostly ends in a
   direction that shows it.
3. The few left are decided by linear programs, each with the points that bind only: maximise the
   margin m of u·(w_i − w_j) ≥ m over |u| ≤ 1. Margin 0 with some of the points: inside. A margin
   above 0 is tried on all points, and those that violate it are added.

Shape suffixes: V point, D dimension, C candidate that is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from knnlm_hf.errors import KNNLMError
from knnlm_hf.progress import track

_ROUNDS = 200  # of Gilbert's method
_MARGIN = 1e-6
"""Smallest margin that shows a point to be outside, where the farthest point has norm 1."""
_SCORES = 1 << 26  # products held at a time
_ADDED = 64  # violated constraints added to a linear program at a time

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Hull:
    """What was decided of V points, and how."""

    inside: Tensor
    """Numbers of those inside the hull of the others, ascending."""
    by_own_direction: int
    """Points outside, by their own direction."""
    by_search: int
    """Points outside, by Gilbert's method."""
    by_program: int
    """Points that linear programs decided, inside or outside."""


def decide(points_VD: Tensor, bias_V: Tensor | None = None, *, show: bool = True) -> Hull:
    """Decide of each point whether it is inside the convex hull of the others.

    A point that equals another is inside: it can tie with it, and never win alone.

    Args:
        points_VD: (V, D) finite.
        bias_V: (V,) of the output layer, if it has one.
        show: a progress bar on stderr.

    Raises:
        KNNLMError: points that are not finite; or linear programs are needed, and scipy is missing.
    """
    if not bool(points_VD.isfinite().all()):
        raise KNNLMError("an output embedding is not finite: the model is broken")
    points_VD = points_VD.double() - points_VD.double().mean(0)
    if bias_V is not None:
        points_VD = torch.cat([points_VD, (bias_V.double() - bias_V.double().mean())[:, None]], 1)
    points_VD = points_VD / points_VD.norm(dim=1).max().clamp(min=1e-300)
    has_bias = bias_V is not None
    own_VD = _allowed(points_VD, has_bias)
    everything = torch.arange(len(points_VD))
    left_C = everything[_margins(points_VD, own_VD, everything)[0] <= _MARGIN]
    by_own = len(points_VD) - len(left_C)
    before = len(left_C)
    left_C = _gilbert(points_VD, left_C, has_bias)
    inside = [
        i
        for i in track(left_C.tolist(), "linear programs", total=len(left_C), unit="", show=show)
        if is_inside(points_VD, i, has_bias=has_bias)
    ]
    found = torch.tensor(inside, dtype=torch.int64)
    return Hull(found, by_own, before - len(left_C), len(left_C))


def is_inside(points_VD: Tensor, i: int, *, has_bias: bool = False) -> bool:
    """Whether one point is inside the hull of the others, by linear programs.

    Args:
        points_VD: (V, D), the farthest of norm 1.
        i: which.
        has_bias: whether the last coordinate is a bias.
    """
    points = points_VD.numpy()
    difference_VD = points[i] - points
    others = np.delete(np.arange(len(points)), i)
    # The nearest first: they bind most.
    nearest = others[np.argsort((difference_VD[others] ** 2).sum(1), kind="stable")]
    chosen = nearest[: 2 * points.shape[1] + _ADDED]
    while True:
        direction_D, margin = _program(difference_VD[chosen], has_bias)
        if margin <= _MARGIN:
            return True
        reached = difference_VD[others] @ direction_D
        if reached.min() > _MARGIN / 2:
            return False
        worst = others[np.argsort(reached, kind="stable")[:_ADDED]]
        fresh = np.setdiff1d(worst, chosen)
        if not len(fresh):  # what is violated is in the program already: within its tolerance
            return bool(reached.min() <= 0)
        chosen = np.concatenate([chosen, fresh])


def _program(difference_CD: Array, has_bias: bool) -> tuple[Array, float]:
    """The direction in the unit cube with the largest margin over all rows, and that margin."""
    try:
        from scipy.optimize import linprog
    except ImportError as error:
        raise KNNLMError(
            "deciding which embeddings are inside a hull needs scipy: pip install knnlm-hf[study]"
        ) from error
    rows, width = difference_CD.shape
    bounds = [(-1.0, 1.0)] * width + [(0.0, None)]
    if has_bias:
        bounds[width - 1] = (0.0, 1.0)
    solved = linprog(
        np.append(np.zeros(width), -1.0), A_ub=np.hstack([-difference_CD, np.ones((rows, 1))]),
        b_ub=np.zeros(rows), bounds=bounds, method="highs",
    )  # fmt: skip
    if solved.x is None:
        raise KNNLMError(f"a linear program could not be solved: {solved.message}")
    direction: Array = solved.x[:width]
    return direction, float(solved.x[width])


def _gilbert(points_VD: Tensor, left_C: Tensor, has_bias: bool) -> Tensor:
    """Those of the candidates that no direction was found for, ascending.

    x is a point of the hull of the others; u = w_i − x. Where u·w_i exceeds all others' u·w_j it
    is a direction; else x moves towards the farthest of them, to the point nearest to w_i.
    """
    own_CD = points_VD[left_C]
    hull_CD = points_VD[_nearest(points_VD, left_C)]
    for _ in range(_ROUNDS):
        if not len(left_C):
            break
        margin_C, farthest_C = _margins(points_VD, _allowed(own_CD - hull_CD, has_bias), left_C)
        is_left_C = margin_C <= _MARGIN
        left_C, own_CD, hull_CD = left_C[is_left_C], own_CD[is_left_C], hull_CD[is_left_C]
        step_CD = points_VD[farthest_C[is_left_C]] - hull_CD
        share_C = ((own_CD - hull_CD) * step_CD).sum(1) / step_CD.square().sum(1).clamp(min=1e-300)
        hull_CD = hull_CD + share_C.clamp(0, 1)[:, None] * step_CD
    return left_C


def _margins(points_VD: Tensor, directions_CD: Tensor, ids_C: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) how far point ids_C is ahead of all others in its direction, and which is next."""
    directions_CD = directions_CD / directions_CD.abs().amax(1, keepdim=True).clamp(min=1e-300)
    margins, others = [], []
    for part_c, some_cD in zip(
        *(torch.split(x, max(1, _SCORES // len(points_VD))) for x in (ids_C, directions_CD)),
        strict=True,
    ):  # fmt: skip
        scores_cV = some_cD @ points_VD.T
        own_c1 = scores_cV.gather(1, part_c[:, None])
        best_c, which_c = scores_cV.scatter_(1, part_c[:, None], -torch.inf).max(1)
        margins.append(own_c1[:, 0] - best_c)
        others.append(which_c)
    return torch.cat(margins), torch.cat(others)


def _nearest(points_VD: Tensor, ids_C: Tensor) -> Tensor:
    """(C,) the nearest other point of each."""
    found = [ids_C[:0]]
    for part_c in torch.split(ids_C, max(1, _SCORES // len(points_VD))):
        distance_cV = torch.cdist(points_VD[part_c], points_VD)
        found.append(distance_cV.scatter_(1, part_c[:, None], torch.inf).argmin(1))
    return torch.cat(found)


def _allowed(directions_CD: Tensor, has_bias: bool) -> Tensor:
    """Directions whose last coordinate, that of a bias, is not below 0."""
    if not has_bias:
        return directions_CD
    return torch.cat([directions_CD[:, :-1], directions_CD[:, -1:].clamp(min=0)], 1)
