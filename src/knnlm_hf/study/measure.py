"""Tuned on valid, reported on test: the one way in which a setting gets its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from knnlm_hf.scores import TokenScores, exp
from knnlm_hf.study.bootstrap import Comparison, Share, compare, share
from knnlm_hf.study.study import Study
from knnlm_hf.tuning import Tuned, fit


@dataclass(frozen=True)
class Measured:
    """A setting with its λ, t and k fitted on valid, and what it gives on test."""

    name: str
    tuned: Tuned
    """What was found on valid."""
    test: TokenScores
    log_probs: Tensor
    """(N,) of the mixture, on test."""
    memory_log_probs: Tensor
    """(N,) of the memory alone, on test, −inf possible; (n, N) of n memories."""

    def row(self, **more: Any) -> dict[str, Any]:
        """The setting as a row of results."""
        memory_nN = self.memory_log_probs.reshape(-1, len(self.test))
        return {
            "setting": self.name,
            **more,
            "lmbda": self.tuned.lmbda,
            "temperature": self.tuned.temperature,
            "k": self.tuned.k,
            "tuned_on": "valid",
            "valid_perplexity": self.tuned.perplexity,
            "valid_tokens": self.tuned.tokens,
            "split": "test",
            "tokens": len(self.test),
            "base_perplexity": self.test.base_perplexity,
            "memory_perplexity": _perplexity(memory_nN[0]) if len(memory_nN) == 1 else None,
            "oracle_perplexity": _perplexity(self.test.lm_log_probs.maximum(memory_nN.amax(0))),
            "perplexity": self.perplexity,
        }

    @property
    def perplexity(self) -> float:
        """Of the mixture, on test."""
        return _perplexity(self.log_probs)


def measure(
    name: str,
    valid: TokenScores,
    test: TokenScores,
    *,
    temperatures: Sequence[float] | None = None,
    ks: Sequence[int] | None = None,
    lmbdas: Sequence[float] | None = None,
) -> Measured:
    """Fit the settings of a memory on valid and apply them to test.

    Args:
        name: of the setting.
        valid, test: scores of the same memory on the two splits.
        temperatures, ks, lmbdas: candidates, see `tuning.fit`; ks None: the k that was scored, as
            in the paper.
    """
    if ks is None:
        ks = sorted({found.k for found in valid.memories if found.k is not None}) or None
    tuned = fit(valid, ks=ks, temperatures=temperatures, lmbdas=lmbdas)
    log_probs = test.log_probs(tuned.lmbda, tuned.temperature, tuned.k)
    memory = test.memory_log_probs(tuned.temperature, tuned.k)
    return Measured(name, tuned, test, log_probs, memory)


def against(study: Study, a: Measured, b: Measured | None = None) -> Comparison:
    """Compare two settings on test; without a second, setting a with the model alone."""
    other = a.test.lm_log_probs if b is None else b.log_probs
    return compare(
        a.log_probs, other, a.test.documents,
        seed=study.settings.seed, resamples=study.settings.resamples,
    )  # fmt: skip


def share_of(study: Study, a: Measured, b: Measured) -> Share:
    """What part of b's gain over the model alone a has, on test."""
    return share(
        a.log_probs, b.log_probs, a.test.lm_log_probs, a.test.documents,
        seed=study.settings.seed, resamples=study.settings.resamples,
    )  # fmt: skip


def _perplexity(log_probs_N: Tensor) -> float:
    return exp(-log_probs_N.double().mean().item())
