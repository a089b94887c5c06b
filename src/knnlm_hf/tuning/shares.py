"""The best λs for given memories: exact, for the log-likelihood is concave in them.

With e_i = P_i/P_LM − 1 for each token (0 where memory i has nothing to say), the mixture gains

    gain(λ) = mean log(1 + Σ_i λ_i · e_i),   λ_i ≥ 0,  Σ λ_i ≤ 0.999

over the model alone. One λ is found by bisection, for many settings of a memory at once; several
together by a projected Newton method in float64.

Shape suffixes: N token, R alternative settings, I component (the model first), L candidate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LARGEST_SUM = 0.999
_CLOSE_ENOUGH = 1e-10
"""Nats by which the gain may fall short of the largest."""
_STEPS = 200


def best_share(ratio_RN: Tensor, rest_N: Tensor) -> tuple[Tensor, Tensor]:
    """For each alternative of one memory its best λ beside a mixture, and the gain with it.

    Maximises mean log((1−λ)·rest + λ·ratio): all that the others have is scaled by 1−λ.

    Args:
        ratio_RN: P of the memory over P_LM.
        rest_N: P of the mixture without it over P_LM; 1 for the model alone.

    Returns:
        (R,) gains and (R,) λs, each at most 2⁻¹⁶ below the optimum: exactly 0 where no λ helps.
    """
    excess_RN = ratio_RN - rest_N
    low_R = torch.zeros(excess_RN.shape[0])
    high_R = torch.full_like(low_R, _LARGEST_SUM)
    for _ in range(16):
        middle_R = (low_R + high_R) / 2
        mixed_RN = torch.addcmul(rest_N, middle_R[:, None], excess_RN)
        slope_R = (excess_RN / mixed_RN).mean(1, dtype=torch.float64)
        low_R = torch.where(slope_R > 0, middle_R, low_R)
        high_R = torch.where(slope_R > 0, high_R, middle_R)
    mixed_RN = torch.addcmul(rest_N, low_R[:, None], excess_RN)
    return mixed_RN.log().mean(1, dtype=torch.float64), low_R


def best_of(ratio_RN: Tensor, rest_LN: Sequence[Tensor], lmbdas: Sequence[float]) -> Tensor:
    """For each alternative and candidate the gain, mean log(rest + λ·(ratio − 1)): (L, R).

    Args:
        ratio_RN: as above.
        rest_LN: for each candidate, 1 + Σ λ_j·e_j over the other memories.
        lmbdas: for each candidate, λ of this one.
    """
    excess_RN = ratio_RN - 1
    gains = [
        torch.add(rest_N, excess_RN, alpha=lmbda).log_().mean(1, dtype=torch.float64)
        for rest_N, lmbda in zip(rest_LN, lmbdas, strict=True)
    ]
    return torch.stack(gains)


def best_shares(ratios: Sequence[Tensor]) -> tuple[float, ...]:
    """The λs of the largest gain, all together.

    The problem is to find the weights of a mixture of known distributions. Instead of minding
    Σ w = 1 one may maximise mean log(Σ w_i·p_i) − Σ w_i over w ≥ 0 alone, whose optimum has that
    sum. A Newton step on the weights that are not held at 0, cut off at 0, is taken where it
    climbs; else a step of expectation–maximisation, which always does. The largest slope bounds
    what is left to gain, and says when to stop.

    Args:
        ratios: of each memory (N,), P over P_LM; 1 where it has nothing to say.
    """
    # With P̃_i = 0.999·P_i + 0.001·P_LM in place of P_i, Σ λ_i cannot pass 0.999.
    columns = [torch.ones_like(ratios[0]), *(1 + _LARGEST_SUM * (ratio - 1) for ratio in ratios)]
    odds_NI = torch.stack(columns, dim=1).double()
    if odds_NI.mean(0).max() <= 1:  # nothing is better than the model alone
        return (0.0,) * len(ratios)
    weight_I = torch.full((len(columns),), 1 / len(columns), dtype=torch.float64)
    for _ in range(_STEPS):
        share_NI = odds_NI / (odds_NI @ weight_I)[:, None]
        slope_I = share_NI.mean(0) - 1
        if slope_I.max() < _CLOSE_ENOUGH:
            break
        weight_I = _climb(odds_NI, weight_I, share_NI, slope_I)
    lmbdas = _LARGEST_SUM * weight_I[1:] / weight_I.sum()
    return tuple(lmbdas.tolist())


def _climb(odds_NI: Tensor, weight_I: Tensor, share_NI: Tensor, slope_I: Tensor) -> Tensor:
    """Better weights than `weight_I`, which sum to 1."""
    free = (weight_I > 0) | (slope_I > 0)
    curvature = share_NI[:, free].T @ share_NI[:, free] / len(share_NI)
    curvature += 1e-12 * curvature.diagonal().max() * torch.eye(len(curvature))
    step_I = torch.zeros_like(weight_I)
    step_I[free] = torch.linalg.solve(curvature, slope_I[free])
    now = (odds_NI @ weight_I).log().mean()
    for halvings in range(8):
        new_I = (weight_I + step_I * 0.5**halvings).clamp(min=0)
        if new_I.sum() > 0:
            new_I /= new_I.sum()
            if (odds_NI @ new_I).log().mean() > now:
                return new_I
    return weight_I * (slope_I + 1)
