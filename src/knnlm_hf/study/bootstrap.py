"""Is one setting better than another, or is it this sample of text? A paired block bootstrap.

Tokens of one text are not independent, so whole blocks are drawn again, not tokens; both settings
are seen on the same blocks, so what is hard for both cancels.

Shape suffixes: N token, B block, R resample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm_hf.errors import KNNLMError

_FEWEST_BLOCKS = 10
_FEWEST_DOCUMENTS = 50
_SHORTEST, _LONGEST = 64, 512  # tokens of a run
_RUNS = 100
_COUNTS = 1 << 22  # resampled counts held at a time


@dataclass(frozen=True)
class _Interval:
    """A ratio of two settings, and where it lies with 95 % confidence."""

    ratio: float
    """Of all tokens."""
    low: float
    """2.5 % quantile of the ratio over the resamples."""
    high: float
    """97.5 % quantile."""
    blocks: int
    """Documents or runs of tokens that were resampled."""

    @property
    def certain(self) -> bool:
        """Whether the interval says anything: on 10 blocks or more."""
        return self.blocks >= _FEWEST_BLOCKS

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


class Comparison(_Interval):
    """The perplexity of setting a as a multiple of that of setting b, on the same tokens.

    exp(mean(log p_b − log p_a)): below 1 where a is better.
    """

    @property
    def better(self) -> bool:
        """Whether a is better than b with 95 % confidence; never on fewer than 10 blocks."""
        return self.certain and self.high < 1

    @property
    def large(self) -> bool:
        """Whether a is better by 5 % or more with 95 % confidence."""
        return self.better and self.high < 0.95

    @property
    def equal(self) -> bool:
        """Whether they differ by less than half a percent with 95 % confidence."""
        return self.certain and 0.995 < self.low <= self.high < 1.005

    @property
    def worse(self) -> bool:
        """Whether a is worse than b with 95 % confidence; never on fewer than 10 blocks."""
        return self.certain and self.low > 1

    def __str__(self) -> str:
        return f"{self.ratio:.3f} × [{self.low:.3f}, {self.high:.3f}]"


class Share(_Interval):
    """The gain of setting a as a share of that of setting b, both over a base, in perplexity.

    (PPL_base − PPL_a) ÷ (PPL_base − PPL_b); from −∞ to ∞ where b may have no gain to have a share
    of.
    """

    def __str__(self) -> str:
        return f"{self.ratio:.0%} [{self.low:.0%}, {self.high:.0%}]"


def compare(
    a_N: Tensor, b_N: Tensor, documents_N: Tensor, *, seed: int = 0, resamples: int = 2000
) -> Comparison:
    """Compare two settings by their log-probabilities of the same tokens.

    Args:
        a_N: (N,) log-probabilities under setting a, finite.
        b_N: (N,) under setting b.
        documents_N: (N,) the document of each token, see `blocks`.
        seed: equal seeds give equal intervals.
        resamples: R.

    Raises:
        KNNLMError: other lengths, no tokens, or a log-probability that is not finite.
    """
    gap_N = _gap(a_N, b_N, documents_N)
    means_R1, count = _resampled([gap_N], documents_N, seed, resamples)
    low, high = np.exp(np.quantile(means_R1[:, 0], [0.025, 0.975])).tolist()
    return Comparison(math.exp(float(gap_N.mean())), low, high, count)


def share(
    a_N: Tensor,
    b_N: Tensor,
    base_N: Tensor,
    documents_N: Tensor,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Share:
    """What part of b's gain over a base a has, by the log-probabilities of the same tokens.

    Args:
        a_N: (N,) log-probabilities under setting a, finite.
        b_N: (N,) under setting b.
        base_N: (N,) under what both are compared with.
        documents_N, seed, resamples: as for `compare`.

    Raises:
        KNNLMError: as `compare`.
    """
    gaps = [_gap(one, base_N, documents_N) for one in (a_N, b_N)]  # log(PPL ÷ PPL_base), negated
    means_R2, count = _resampled(gaps, documents_N, seed, resamples)
    ratio, _ = _share(np.array([[float(gap_N.mean()) for gap_N in gaps]]))
    ratios_R, has_gain = _share(means_R2)
    low, high = (
        np.quantile(ratios_R, [0.025, 0.975]).tolist() if has_gain else (-math.inf, math.inf)
    )
    return Share(float(ratio[0]), low, high, count)


def _share(means_R2: Any) -> tuple[Any, bool]:
    """(1 − PPL_a ÷ PPL_base) ÷ (1 − PPL_b ÷ PPL_base); whether b gains in 97.5 % of the rows."""
    gains_R2 = -np.expm1(means_R2)
    b_R = gains_R2[:, 1]
    has_gain = bool(np.quantile(b_R, 0.025) > 0)
    return gains_R2[:, 0] / np.where(b_R == 0, np.inf, b_R), has_gain


def _gap(a_N: Tensor, b_N: Tensor, documents_N: Tensor) -> Tensor:
    """(N,) float64, log p_b − log p_a."""
    if a_N.shape != b_N.shape or a_N.shape != documents_N.shape or not len(a_N):
        raise KNNLMError(
            f"settings with {len(a_N)} and {len(b_N)} tokens cannot be compared: score both on the "
            "same text"
        )
    gap_N = b_N.double() - a_N.double()
    if not bool(gap_N.isfinite().all()):
        raise KNNLMError("a token without probability cannot be compared: mix the memory first")
    return gap_N


def _resampled(
    gaps: Sequence[Tensor], documents_N: Tensor, seed: int, resamples: int
) -> tuple[Any, int]:
    """(R, len(gaps)) means over resampled blocks, the same blocks for all; and how many blocks."""
    block_N = blocks(documents_N)
    count = int(block_N.max()) + 1
    sums = [torch.bincount(block_N, weights=gap_N, minlength=count) for gap_N in gaps]
    gap_BG = torch.stack(sums, dim=1).numpy()
    size_B = torch.bincount(block_N, minlength=count).double().numpy()
    generator = np.random.default_rng(seed)
    means = []
    step = max(1, _COUNTS // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        times_RB = generator.multinomial(count, np.full(count, 1 / count), size=rows)
        means.append(times_RB @ gap_BG / (times_RB @ size_B)[:, None])
    return np.concatenate(means), count


def blocks(documents_N: Tensor) -> Tensor:
    """(N,) int64, the block of each token, from 0: its document, or its run of tokens.

    Documents where there are 50 or more of them; otherwise runs of 512 tokens, shorter (but at
    least 64) where there would be fewer than 100, which do not heed documents.
    """
    block_N: Tensor
    documents, block_N = torch.unique(documents_N, return_inverse=True)
    if len(documents) >= _FEWEST_DOCUMENTS:
        return block_N
    length = min(_LONGEST, max(_SHORTEST, len(documents_N) // _RUNS))
    whole = max(1, len(documents_N) // length)  # a short end belongs to the last run
    run_N: Tensor = (torch.arange(len(documents_N)) // length).clamp(max=whole - 1)
    return run_N
