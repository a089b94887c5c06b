"""The plainest language model: how often each token followed the one before it.

Shape suffixes: N token, P pair that occurs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Bigrams:
    """Counts of pairs of tokens that follow each other in one document.

        p(w | v) = count(v, w) / Σ_w' count(v, w'),

    and a token's own frequency after one that nothing ever followed. Not smoothed: what mixes it
    in has a model that is.

    Args:
        documents: token ids.
        vocab_size: V.
    """

    def __init__(self, documents: Sequence[Any], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        parts = [np.asarray(part, dtype=np.int64) for part in documents]
        pairs = [part[:-1] * vocab_size + part[1:] for part in parts if len(part) > 1]
        empty = np.empty(0, dtype=np.int64)
        self._codes_P, self._counts_P = np.unique(
            np.concatenate([empty, *pairs]), return_counts=True
        )
        self._before_V = np.zeros(vocab_size, dtype=np.int64)
        np.add.at(self._before_V, self._codes_P // vocab_size, self._counts_P)
        self._tokens_V = np.bincount(np.concatenate([empty, *parts]), minlength=vocab_size)

    def log_probs(self, before_N: Tensor, tokens_N: Tensor) -> Tensor:
        """(N,) float32, log p of each token after another; −inf for one that never followed it."""
        before, tokens = before_N.long().numpy(), tokens_N.long().numpy()
        codes = before * self.vocab_size + tokens
        at = np.searchsorted(self._codes_P, codes).clip(max=max(0, len(self._codes_P) - 1))
        count = np.zeros(len(codes), dtype=np.int64)
        if len(self._codes_P):
            count = np.where(self._codes_P[at] == codes, self._counts_P[at], 0)
        total = self._before_V[before]
        count = np.where(total > 0, count, self._tokens_V[tokens])
        total = np.where(total > 0, total, max(1, self._tokens_V.sum()))
        return (torch.from_numpy(count).double() / torch.from_numpy(total)).log().float()
