"""TokenScores: what one retrieval pass leaves, and every figure that can be had from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.interpolation import mix, token_knn_log_probs
from knnlm_hf.types import check_k, check_lmbda, check_temperature

_CHUNK = 1 << 24  # similarities worked on at a time


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """One row per predicted token of a corpus, in corpus order: N rows.

    Any (k, t, λ) is arithmetic on this table, so nothing is ever searched twice. All tensors are
    on the CPU.
    """

    lm_log_probs: Tensor
    """(N,) float32, log P_LM of the token."""
    tokens: Tensor
    """(N,) int32, the token itself."""
    documents: Tensor
    """(N,) int32, which corpus item it stands in."""
    context: Tensor
    """(N,) int32, how many tokens the model saw before it, in its window."""
    similarity: Tensor | None = None
    """(N, K) float32, nearest first, −inf for a missing hit; None for a memory without search."""
    is_target: Tensor | None = None
    """(N, K) bool, whether the neighbour carries the token."""
    memory_scores: Tensor | None = None
    """(N,) float32, log-probability of a memory that does not search."""
    lmbda: float = 0.0
    """λ of the scored model: the default of every figure below."""
    temperature: float = 1.0
    """t of the scored memory, likewise."""
    words: int | None = None
    """Whitespace-separated words of the corpus, where it was text."""
    model_seconds: float = 0.0
    """Wall time of the model's forward passes."""
    memory_seconds: float = 0.0
    """Wall time of the memory: search and what belongs to it."""

    def __len__(self) -> int:
        return self.lm_log_probs.shape[0]

    @property
    def k(self) -> int | None:
        """Neighbours kept per token; None without kNN."""
        return None if self.similarity is None else self.similarity.shape[1]

    def memory_log_probs(self, temperature: float | None = None, k: int | None = None) -> Tensor:
        """(N,) float32, log-probability of each token under the memory alone; −inf is possible."""
        if self.memory_scores is not None:
            if temperature is not None or k is not None:
                raise SettingError("these scores come from a memory without k and temperature")
            return self.memory_scores
        similarity_NK, is_target_NK = self._neighbours(k)
        t = self.temperature if temperature is None else check_temperature(temperature)
        rows = max(1, _CHUNK // max(1, similarity_NK.shape[1]))
        parts = [
            token_knn_log_probs(similarity, is_target, t)
            for similarity, is_target in zip(
                torch.split(similarity_NK, rows), torch.split(is_target_NK, rows), strict=True
            )
        ]
        return torch.cat(parts) if parts else torch.empty(0)

    def log_probs(
        self,
        lmbda: float | None = None,
        temperature: float | None = None,
        k: int | None = None,
    ) -> Tensor:
        """(N,) float32, log-probability of each token under the mixture."""
        weight = self.lmbda if lmbda is None else check_lmbda(lmbda)
        if not self.has_memory or (weight == 0 and temperature is None and k is None):
            if weight > 0:
                raise KNNLMError("these are the scores of a model without memory: lmbda must be 0")
            return self.lm_log_probs
        memory = self.memory_log_probs(temperature, k)
        return mix(self.lm_log_probs, memory, weight, self.has_hit)

    def nll(
        self,
        lmbda: float | None = None,
        temperature: float | None = None,
        k: int | None = None,
    ) -> float:
        """Mean negative log-likelihood of the mixture per token, in nats, summed in float64."""
        return _mean_nll(self.log_probs(lmbda, temperature, k))

    def perplexity(
        self,
        lmbda: float | None = None,
        temperature: float | None = None,
        k: int | None = None,
    ) -> float:
        """exp(mean negative log-likelihood) of the mixture, per token.

        Args:
            lmbda: 0 ≤ λ < 1; default: the scored model's.
            temperature: t > 0; default: the scored memory's.
            k: 1 ≤ k ≤ the k that was scored; default: that one.
        """
        return exp(self.nll(lmbda, temperature, k))

    def word_perplexity(
        self,
        lmbda: float | None = None,
        temperature: float | None = None,
        k: int | None = None,
    ) -> float | None:
        """exp(total negative log-likelihood / words); None where the corpus was no text.

        Interpolated per token, summed, divided by the number of whitespace-separated words.
        """
        if not self.words:
            return None
        return exp(self.nll(lmbda, temperature, k) * len(self) / self.words)

    @property
    def base_perplexity(self) -> float:
        """Perplexity of the language model alone."""
        return exp(_mean_nll(self.lm_log_probs))

    def memory_perplexity(self, temperature: float | None = None, k: int | None = None) -> float:
        """Perplexity of the memory alone: ∞ as soon as one token has no neighbour carrying it."""
        return exp(_mean_nll(self.memory_log_probs(temperature, k)))

    def oracle(self, temperature: float | None = None, k: int | None = None) -> float:
        """Perplexity if each token took the better of the two components (paper, section 3)."""
        memory = self.memory_log_probs(temperature, k)
        return exp(_mean_nll(torch.maximum(self.lm_log_probs, memory)))

    @property
    def has_memory(self) -> bool:
        """Whether a memory was scored beside the model."""
        return self.similarity is not None or self.memory_scores is not None

    def _neighbours(self, k: int | None) -> tuple[Tensor, Tensor]:
        if self.similarity is None or self.is_target is None:
            raise KNNLMError("these are the scores of a model without memory")
        kept = self.similarity.shape[1]
        k = kept if k is None else check_k(k)
        if k > kept:
            raise SettingError(f"k is {k}, but only {kept} neighbours were scored: score again")
        return self.similarity[:, :k], self.is_target[:, :k]

    @property
    def has_hit(self) -> Tensor | None:
        """(N,) bool, whether the token's query found anything at all; None without search."""
        return None if self.similarity is None else self.similarity[:, 0] > -math.inf

    @staticmethod
    def concatenate(parts: Sequence[TokenScores]) -> TokenScores:
        """The rows of all parts, in order; settings of the first, times summed."""
        if not parts:
            raise KNNLMError("no scores to concatenate")

        def join(name: str) -> Tensor | None:
            columns = [getattr(part, name) for part in parts]
            return None if columns[0] is None else torch.cat(columns)

        return replace(
            parts[0],
            **{name: join(name) for name in _COLUMNS},  # type: ignore[arg-type]
            model_seconds=sum(part.model_seconds for part in parts),
            memory_seconds=sum(part.memory_seconds for part in parts),
        )


_COLUMNS = (
    "lm_log_probs", "tokens", "documents", "context", "similarity", "is_target", "memory_scores",
)  # fmt: skip


def _mean_nll(log_probs_N: Tensor) -> float:
    return -log_probs_N.double().mean().item()


def exp(value: float) -> float:
    """exp that overflows to ∞ instead of raising."""
    return math.exp(value) if value < 700 else math.inf
