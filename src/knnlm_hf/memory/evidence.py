"""What a memory knows of target tokens, kept so that k and t can be changed afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.interpolation import token_knn_log_probs
from knnlm_hf.types import check_k, check_match_weight, check_temperature

_CHUNK = 1 << 24  # similarities worked on at a time
_COLUMNS = ("similarity", "is_target", "matches", "scores")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What one memory knows of N target tokens.

    A memory that searches leaves `similarity` and `is_target`, from which its log-probabilities
    follow for any k and t; any other leaves its log-probabilities as they are, `scores`. A head
    has a temperature too, but every one of its V rows is in the normaliser: another t would need
    all V logits of each token, and those are not kept.
    """

    similarity: Tensor | None = None
    """(N, K) float32, nearest first, −inf for a missing hit."""
    is_target: Tensor | None = None
    """(N, K) bool: neighbour k carries the target."""
    matches: Tensor | None = None
    """(N, K) uint8: how many tokens before it neighbour k shares with the query, of a
    `HybridMemory`."""
    scores: Tensor | None = None
    """(N,) float32, log-probability of the target under a memory that does not search."""
    temperature: float = 1.0
    """t of the memory that was asked: the default below."""
    match_weight: float = 0.0
    """γ of the memory that was asked, likewise; without `matches` it weighs nothing."""

    @property
    def k(self) -> int | None:
        """Neighbours kept per token; None for a memory that does not search."""
        return None if self.similarity is None else self.similarity.shape[1]

    @property
    def has_hit(self) -> Tensor | None:
        """(N,) bool, whether the token's query found anything at all; None without search."""
        return None if self.similarity is None else self.similarity[:, 0] > -math.inf

    def log_probs(self, temperature: Any = None, k: Any = None, match_weight: Any = None) -> Tensor:
        """(N,) float32, log-probability of each token; −inf is possible.

        Args:
            temperature: t > 0; None: the memory's own.
            k: 1 ≤ k ≤ the k that was searched; None: that one.
            match_weight: γ, 0 to 8, of a memory that counts matches; None: its own.

        Raises:
            SettingError: out of range, or given for a memory that does not search.
        """
        if self.scores is not None:
            if temperature is not None or k is not None or match_weight is not None:
                raise SettingError("these scores come from a memory without k and temperature")
            return self.scores
        similarity_NK, is_target_NK = self._neighbours(k)
        t = self.temperature if temperature is None else check_temperature(temperature)
        gamma = self._match_weight(match_weight)
        count, k = similarity_NK.shape
        rows = max(1, _CHUNK // max(1, k))
        parts = []
        for first in range(0, count, rows):
            some = slice(first, first + rows)
            similarity_nK = similarity_NK[some]
            if self.matches is not None and gamma:
                similarity_nK = similarity_nK + self.matches[some, :k] * (t * gamma)
            parts.append(token_knn_log_probs(similarity_nK, is_target_NK[some], t))
        return torch.cat(parts) if parts else torch.empty(0)

    def _match_weight(self, match_weight: Any) -> float:
        if match_weight is None:
            return self.match_weight
        if self.matches is None:
            raise SettingError("match_weight: these scores come from a memory that counts none")
        return check_match_weight(match_weight)

    def _neighbours(self, k: Any) -> tuple[Tensor, Tensor]:
        if self.similarity is None or self.is_target is None:
            raise KNNLMError("there is no evidence here: neither neighbours nor log-probabilities")
        kept = self.similarity.shape[1]
        k = kept if k is None else check_k(k)
        if k > kept:
            raise SettingError(f"k is {k}, but only {kept} neighbours were scored: score again")
        return self.similarity[:, :k], self.is_target[:, :k]

    def __getitem__(self, rows: slice | Tensor) -> Evidence:
        """Of some of the tokens: a slice, or a tensor of their places."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        some: Any = {n: None if c is None else c[rows] for n, c in columns.items()}
        return replace(self, **some)

    def cpu(self) -> Evidence:
        """The same on the CPU."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        host: Any = {n: None if c is None else c.cpu() for n, c in columns.items()}
        return replace(self, **host)

    @staticmethod
    def concatenate(parts: Sequence[Evidence]) -> Evidence:
        """The tokens of all parts, in order; the temperature of the first."""
        columns = {name: [getattr(part, name) for part in parts] for name in _COLUMNS}
        whole: Any = {n: None if c[0] is None else torch.cat(c) for n, c in columns.items()}
        return replace(parts[0], **whole)


def evidence(
    memory: Any, hidden_QD: Tensor, tokens_Q: Tensor, exclude_Q: Tensor | None = None
) -> Evidence:
    """What `memory` says of each target, in the form that keeps most settings open.

    Args:
        memory: any `Memory`.
        hidden_QD: (Q, D) captured states.
        tokens_Q: (Q,) target tokens.
        exclude_Q: (Q,) entry numbers that a query must not find, for a memory that can search.
    """
    temperature = getattr(memory, "temperature", 1.0)
    if not searches(memory):
        if exclude_Q is not None:
            raise KNNLMError("only a memory with a datastore can exclude entries by number")
        scores_Q = memory.token_log_probs(hidden_QD, tokens_Q)
        return Evidence(scores=scores_Q, temperature=temperature)
    near = memory.search(hidden_QD, exclude=exclude_Q)
    is_target_QK = near.tokens == tokens_Q.to(near.tokens.device)[:, None]
    matches = getattr(memory, "matches", None)
    return Evidence(
        similarity=near.similarity, is_target=is_target_QK, temperature=temperature,
        matches=None if matches is None else matches(near.ids),
        match_weight=getattr(memory, "match_weight", 0.0),
    )  # fmt: skip


def searches(memory: Any) -> bool:
    """Whether the memory finds neighbours, so that k and t can be changed afterwards."""
    return hasattr(memory, "search")
