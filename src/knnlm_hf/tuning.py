"""TokenScores → k, t, λ: a grid over k and t, and the exact best λ for each of its points."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.parallel import over_blocks
from knnlm_hf.scores import TokenScores
from knnlm_hf.scoring import score
from knnlm_hf.types import check_k, check_lmbda, check_temperature

_log = logging.getLogger(__name__)

_NEGLIGIBLE_LMBDA = 0.01
_LARGEST_LMBDA = 0.999
_SQUARINGS = 4
_BLOCK = 1 << 19  # similarities in a block: 2 MB, so that a block stays in cache for all t


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The best settings found, and what they give on the text they were tuned on.

    Tuning flatters: report another split.
    """

    lmbda: float
    temperature: float | None
    """None for a memory without temperature."""
    k: int | None
    """None for a memory that does not search."""
    perplexity: float
    base_perplexity: float
    tokens: int
    message: str
    """What was found, in a sentence; says so when the memory does not help."""

    @property
    def helps(self) -> bool:
        """Whether the best λ is more than negligible."""
        return self.lmbda >= _NEGLIGIBLE_LMBDA


def tune(
    model: Any,
    corpus: Any,
    *,
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    bos: bool | None = None,
    ks: Sequence[int] | None = None,
    temperatures: Sequence[float] | None = None,
    lmbdas: Sequence[float] | None = None,
    apply: bool = True,
    progress: bool = True,
) -> Tuned:
    """Fit k, t and λ to held-out text, in one retrieval pass, and apply them to `model`.

    Use text that is neither in the datastore nor the text you will report.

    Args:
        model: a `KNNLMForCausalLM`.
        corpus: held-out text; options up to `bos` are `score`'s.
        ks: candidates, each at most the memory's k; None: that k and a few smaller ones.
        temperatures: candidates; None: a wide geometric grid around the memory's, then refined.
        lmbdas: candidates; None: the exact optimum for each k and t.
        apply: set the memory's k and temperature, and the model's lmbda, to the best.
    """
    if not hasattr(model, "memory"):
        raise KNNLMError(f"{type(model).__name__} has no memory to tune: wrap it first")
    scores = score(
        model, corpus, tokenizer=tokenizer, window=window, stride=stride,
        batch_size=batch_size, bos=bos, progress=progress,
    )  # fmt: skip
    best = fit(scores, ks=ks, temperatures=temperatures, lmbdas=lmbdas)
    if not best.helps:
        _log.warning("%s", best.message)
    if apply:
        model.lmbda = best.lmbda
        if best.k is not None and best.temperature is not None:
            model.memory.k, model.memory.temperature = best.k, best.temperature
    return best


def fit(
    scores: TokenScores,
    *,
    ks: Sequence[int] | None = None,
    temperatures: Sequence[float] | None = None,
    lmbdas: Sequence[float] | None = None,
) -> Tuned:
    """The settings of lowest perplexity on kept scores: arithmetic only, no retrieval.

    For fixed k and t the log-likelihood is concave in λ, so its optimum is found by bisection.
    """
    for name, grid in (("ks", ks), ("temperatures", temperatures), ("lmbdas", lmbdas)):
        if grid is not None and not len(grid):
            raise SettingError(f"{name} is empty: give candidates, or None for the default ones")
    lmbdas = None if lmbdas is None else [check_lmbda(lmbda) for lmbda in lmbdas]
    if scores.similarity is None:
        ratio_1N = (scores.memory_log_probs() - scores.lm_log_probs).clamp(max=80).exp()[None]
        (gain,), (lmbda,) = _best_lmbda(ratio_1N, lmbdas)
        return _tuned(scores, gain, lmbda, None, None)
    ks = _candidate_ks(scores, ks)
    refine = temperatures is None
    if temperatures is None:
        temperatures = [scores.temperature * 2 ** (step / 3) for step in range(-15, 15)]
    found = list(_search(scores, ks, [check_temperature(t) for t in temperatures], lmbdas))
    if refine:
        _, _, best_t, best_k = max(found, key=_preference)
        near = [best_t * 2 ** (step / 15) for step in range(-4, 5) if step]
        found += _search(scores, [best_k], near, lmbdas)
    gain, lmbda, temperature, k = max(found, key=_preference)
    return _tuned(scores, gain, lmbda, temperature, k)


def _preference(found: tuple[float, float, float, int]) -> tuple[float, float]:
    """Largest gain; among equals (λ = 0, say) the smallest λ."""
    return found[0], -found[1]


def _tuned(
    scores: TokenScores, gain: float, lmbda: float, temperature: float | None, k: int | None
) -> Tuned:
    base = scores.base_perplexity
    mixed = base * math.exp(-gain)
    settings = f"lmbda {lmbda:.3g}"
    if temperature is not None:
        settings += f", temperature {temperature:.4g}, k {k}"
    if lmbda < _NEGLIGIBLE_LMBDA:
        message = (
            f"the memory does not help on this text: the best lmbda is {lmbda:.2g} "
            f"(perplexity {mixed:.2f}, the model alone {base:.2f})"
        )
    else:
        message = f"perplexity {base:.2f} → {mixed:.2f} with {settings}"
    return Tuned(
        lmbda=lmbda, temperature=temperature, k=k, perplexity=mixed, base_perplexity=base,
        tokens=len(scores), message=message,
    )  # fmt: skip


def _candidate_ks(scores: TokenScores, ks: Sequence[int] | None) -> list[int]:
    kept = scores.k or 1
    if ks is None:
        return sorted({max(1, kept >> shift) for shift in (0, 1, 2, 4, 6)})
    ks = sorted({check_k(k) for k in ks})
    if ks[-1] > kept:
        raise KNNLMError(f"k {ks[-1]} asked for, but only {kept} neighbours were scored")
    return ks


def _search(
    scores: TokenScores, ks: list[int], temperatures: list[float], lmbdas: list[float] | None
) -> Iterator[tuple[float, float, float, int]]:
    """Yield (gain over the model alone, λ, t, k) for each t and k; λ the best one there."""
    for temperature, knn_KN in zip(
        temperatures, _knn_probabilities(scores, ks, temperatures), strict=True
    ):
        # p_kNN / p_LM; a query without hits leaves the model alone, as if both agreed.
        ratio_KN = knn_KN * (-scores.lm_log_probs).clamp(max=80).exp()
        gains, best = _best_lmbda(torch.where(knn_KN.isnan(), 1.0, ratio_KN), lmbdas)
        for k, gain, lmbda in zip(ks, gains, best, strict=True):
            yield gain, lmbda, temperature, k


def _knn_probabilities(scores: TokenScores, ks: list[int], temperatures: list[float]) -> Tensor:
    """p_kNN(target) for each temperature and k: (len(temperatures), len(ks), N) float32.

    A block of rows stays in cache for all temperatures. NaN where a query has no hit.
    """
    assert scores.similarity is not None
    assert scores.is_target is not None
    result_TKN = torch.empty(len(temperatures), len(ks), len(scores))
    all_similarity_NK, all_is_target_NK = scores.similarity, scores.is_target

    def work(block: slice) -> None:
        similarity_nK = all_similarity_NK[block, : ks[-1]]
        relative_nK = similarity_nK - similarity_nK[:, :1]  # NaN throughout where there is no hit
        hits = _Hits(relative_nK, all_is_target_NK[block, : ks[-1]], ks)
        total_TKn = torch.empty(len(temperatures), len(ks), len(relative_nK))
        for i, weights_nK in _weights(relative_nK, temperatures):
            for j, (first, last) in enumerate(zip([0, *ks], ks, strict=False)):
                torch.sum(weights_nK[:, first:last], 1, out=total_TKn[i, j])
        result_TKN[:, :, block] = hits.weights(temperatures) / total_TKn.cumsum(1)

    over_blocks(work, len(scores), max(1, _BLOCK // ks[-1]))
    return result_TKN


def _weights(relative: Tensor, temperatures: list[float]) -> Iterator[tuple[int, Tensor]]:
    """Yield (i, exp(relative / temperatures[i])) from the hottest to the coldest.

    subtle: halving t squares the weights, four times cheaper than an exponential; a grid of
    2^(step/n) needs few exponentials. Squared at most `_SQUARINGS` times in a row, which keeps the
    relative error below 1e-6. A yielded tensor is valid until the next one.
    """
    chains: list[tuple[float, int, Tensor]] = []
    for i in sorted(range(len(temperatures)), key=lambda i: -temperatures[i]):
        t = temperatures[i]
        hotter = (
            n for n, (at, depth, _) in enumerate(chains)
            if depth < _SQUARINGS and math.isclose(at, 2 * t, rel_tol=1e-9)
        )  # fmt: skip
        n = next(hotter, None)
        if n is None:
            weights, depth = torch.mul(relative, 1 / t).exp_(), 0
        else:
            _, depth, weights = chains.pop(n)
            weights.square_()
            depth += 1
        chains = [chain for chain in chains if chain[0] <= 2 * t * (1 + 1e-9)]
        chains.append((t, depth, weights))
        yield i, weights


class _Hits:
    """The neighbours of a block that carry their query's target: few, so kept as a ragged list."""

    def __init__(self, relative_nK: Tensor, is_target_nK: Tensor, ks: list[int]) -> None:
        row_H, column_H = is_target_nK.nonzero(as_tuple=True)
        self.relative_H = relative_nK[row_H, column_H]
        self.shape = (len(ks), relative_nK.shape[0])
        # Neighbours are sorted: a query's hits under each k are a running sum over segments.
        segment_H = torch.bucketize(column_H, torch.tensor(ks), right=True)
        runs, self.starts = np.unique((row_H * len(ks) + segment_H).numpy(), return_index=True)
        self.rows, self.segments = np.divmod(runs, len(ks))

    def weights(self, temperatures: list[float]) -> Tensor:
        """(T, len(ks), n) summed weight of the hits among the first k neighbours."""
        carried_TKn = np.zeros((len(temperatures), *self.shape), dtype=np.float32)
        for i, weights_H in _weights(self.relative_H, temperatures):
            if len(self.starts):
                sums = np.add.reduceat(weights_H.numpy(), self.starts)
                carried_TKn[i, self.segments, self.rows] = sums
        return torch.from_numpy(carried_TKn.cumsum(1, dtype=np.float32))


def _best_lmbda(ratio_RN: Tensor, lmbdas: list[float] | None) -> tuple[list[float], list[float]]:
    """For each row the largest mean log(1 + λ(ratio − 1)) and its λ.

    The mean log-likelihood of the mixture less the model's own; concave in λ.
    """
    excess_RN = ratio_RN - 1
    if lmbdas is None:
        lmbda_R = _concave_optimum(excess_RN)
        gain_R = torch.log1p(lmbda_R[:, None] * excess_RN).mean(1, dtype=torch.float64)
        return gain_R.tolist(), lmbda_R.tolist()
    gain_LR = torch.stack(
        [torch.log1p(lmbda * excess_RN).mean(1, dtype=torch.float64) for lmbda in lmbdas]
    )
    gain_R, index_R = gain_LR.max(0)
    return gain_R.tolist(), [lmbdas[i] for i in index_R.tolist()]


def _concave_optimum(excess_RN: Tensor) -> Tensor:
    """λ ∈ [0, 1) where the derivative Σ excess / (1 + λ·excess) changes sign, row by row."""
    low_R = torch.zeros(excess_RN.shape[0])
    high_R = torch.full_like(low_R, _LARGEST_LMBDA)
    for _ in range(16):
        middle_R = (low_R + high_R) / 2
        slope_R = (excess_RN / (1 + middle_R[:, None] * excess_RN)).mean(1, dtype=torch.float64)
        low_R = torch.where(slope_R > 0, middle_R, low_R)
        high_R = torch.where(slope_R > 0, high_R, middle_R)
    # The lower end: exactly 0 where the slope is never positive.
    return low_R
