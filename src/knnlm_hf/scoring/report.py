"""PerplexityReport: the perplexities of a corpus, side by side, from running sums."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knnlm_hf.interpolation import mix
from knnlm_hf.scores import TokenScores, exp
from knnlm_hf.types import one_or_all


@dataclass(frozen=True, kw_only=True)
class PerplexityReport:
    """Perplexities of one corpus; each is exp of a mean over all its tokens."""

    perplexity: float
    """Of the mixture, per token."""
    nll: float
    """Mean negative log-likelihood of the mixture per token, in nats."""
    tokens: int
    """Tokens predicted: all but the first of each document."""
    base_perplexity: float
    """Of the model alone."""
    memory_perplexity: Any
    """Of the memory alone, ∞ if it gives any token no probability; None without a memory, of
    several the tuple."""
    oracle_perplexity: float | None
    """If each token took the best of model and memories; None without a memory."""
    words: int | None
    """Whitespace-separated words, where the corpus is text."""
    word_perplexity: float | None
    """Of the mixture per word: exp(total nll / words)."""
    base_word_perplexity: float | None
    """Of the model alone per word."""
    tokens_per_second: float
    """Tokens scored per second, everything included."""
    model_seconds: float
    """Of it, in the model."""
    memory_seconds: float
    """Of it, in the memory."""


class Sums:
    """Running sums of log-likelihoods over parts of a corpus."""

    def __init__(self) -> None:
        self.tokens = 0
        self.mixture = self.base = self.oracle = 0.0
        self.memories: list[float] = []
        self.model_seconds = self.memory_seconds = 0.0

    def add(self, part: TokenScores) -> None:
        """Add the tokens of `part`."""
        base = part.lm_log_probs
        alone = [found.log_probs() for found in part.memories]
        best = functools.reduce(torch.maximum, alone, base)
        self.memories = [
            a + b
            for a, b in zip(self.memories or [0.0] * len(alone), map(_sum, alone), strict=True)
        ]
        self.tokens += len(part)
        self.base += _sum(base)
        self.oracle += _sum(best)
        self.mixture += _sum(mix(base, alone, part.lmbdas, [one.has_hit for one in part.memories]))
        self.model_seconds += part.model_seconds
        self.memory_seconds += part.memory_seconds

    def report(self, words: int | None, seconds: float) -> PerplexityReport:
        """The perplexities, given the corpus's words and the wall time of all."""

        def perplexity(total: float) -> float:
            return exp(-total / self.tokens)

        def per_word(total: float) -> float | None:
            return exp(-total / words) if words else None

        alone = [perplexity(total) for total in self.memories]
        return PerplexityReport(
            perplexity=perplexity(self.mixture),
            nll=-self.mixture / self.tokens,
            tokens=self.tokens,
            base_perplexity=perplexity(self.base),
            memory_perplexity=one_or_all(alone) if alone else None,
            oracle_perplexity=perplexity(self.oracle) if alone else None,
            words=words,
            word_perplexity=per_word(self.mixture),
            base_word_perplexity=per_word(self.base),
            tokens_per_second=self.tokens / seconds,
            model_seconds=self.model_seconds,
            memory_seconds=self.memory_seconds,
        )


def _sum(log_probs_N: Tensor) -> float:
    return log_probs_N.double().sum().item()
