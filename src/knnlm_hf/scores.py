"""TokenScores: what one retrieval pass leaves, and every figure that can be had from it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from knnlm_hf.errors import KNNLMError
from knnlm_hf.interpolation import mix
from knnlm_hf.memory import Evidence
from knnlm_hf.types import check_lmbda, check_lmbdas, each, one_or_all


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """One row per predicted token of a corpus, in corpus order: N rows.

    Any (k, t, λ) is arithmetic on this table, so nothing is ever searched twice. All tensors are
    on the CPU. Where there are several memories, each has its own k, t and λ.
    """

    lm_log_probs: Tensor
    """(N,) float32, log P_LM of the token."""
    tokens: Tensor
    """(N,) int32, the token itself."""
    documents: Tensor
    """(N,) int32, which corpus item it stands in."""
    context: Tensor
    """(N,) int32, how many tokens the model saw before it, in its window."""
    memories: tuple[Evidence, ...] = ()
    """What each memory of the scored model said, N rows each; empty for a plain model."""
    lmbdas: tuple[float, ...] = ()
    """λ of each in the scored model: the default of every figure below."""
    words: int | None = None
    """Whitespace-separated words of the corpus, where it was text."""
    model_seconds: float = 0.0
    """Wall time of the model's forward passes."""
    memory_seconds: float = 0.0
    """Wall time of the memory: search and what belongs to it."""

    def __len__(self) -> int:
        return self.lm_log_probs.shape[0]

    def __getitem__(self, rows: slice) -> TokenScores:
        """Some of the tokens, every tenth for instance: `scores[::10]`; times stay those of all."""
        some: Any = {name: getattr(self, name)[rows] for name in _COLUMNS}
        return replace(self, **some, memories=tuple(found[rows] for found in self.memories))

    @property
    def has_memory(self) -> bool:
        """Whether a memory was scored beside the model."""
        return bool(self.memories)

    @property
    def lmbda(self) -> Any:
        """λ of the scored model, 0 without a memory; of several memories the tuple."""
        return one_or_all(self.lmbdas) if self.memories else 0.0

    @property
    def temperature(self) -> Any:
        """t of the scored memory, None without one; of several memories the tuple."""
        return one_or_all([found.temperature for found in self.memories]) if self.memories else None

    @property
    def k(self) -> Any:
        """Neighbours kept per token, None without kNN; of several memories the tuple."""
        return one_or_all([found.k for found in self.memories]) if self.memories else None

    def memory_log_probs(
        self, temperature: Any = None, k: Any = None, match_weight: Any = None
    ) -> Tensor:
        """(N,) float32, log-probability of each token under the memory alone; −inf is possible.

        Of n memories (n, N).
        """
        answers = self._answers(temperature, k, match_weight)
        return answers[0] if len(answers) == 1 else torch.stack(answers)

    def log_probs(
        self, lmbda: Any = None, temperature: Any = None, k: Any = None, match_weight: Any = None
    ) -> Tensor:
        """(N,) float32, log-probability of each token under the mixture; see `perplexity`."""
        lmbdas = self.lmbdas if lmbda is None else self._checked(lmbda)
        settings = self._settings(temperature, k, match_weight)
        asked = [
            (found, lmbda, own)
            for found, lmbda, own in zip(self.memories, lmbdas, settings, strict=True)
            if lmbda > 0 or own != (None, None, None)
        ]
        return mix(
            self.lm_log_probs,
            [found.log_probs(*own) for found, _, own in asked],
            [lmbda for _, lmbda, _ in asked],
            [found.has_hit for found, _, _ in asked],
        )

    def nll(
        self, lmbda: Any = None, temperature: Any = None, k: Any = None, match_weight: Any = None
    ) -> float:
        """Mean negative log-likelihood of the mixture per token, in nats, summed in float64."""
        return _mean_nll(self.log_probs(lmbda, temperature, k, match_weight))

    def perplexity(
        self, lmbda: Any = None, temperature: Any = None, k: Any = None, match_weight: Any = None
    ) -> float:
        """exp(mean negative log-likelihood) of the mixture, per token.

        Of several memories each setting is a list with one value per memory (None: its own t,
        k or γ), or one value: λ is then divided equally, t and k go to every memory that searches,
        γ to every one that counts matches.

        Args:
            lmbda: 0 ≤ λ < 1; default: the scored model's.
            temperature: t > 0; default: the scored memory's.
            k: 1 ≤ k ≤ the k that was scored; default: that one.
            match_weight: γ of a `HybridMemory`, 0 to 8; default: the scored memory's.
        """
        return exp(self.nll(lmbda, temperature, k, match_weight))

    def word_perplexity(
        self, lmbda: Any = None, temperature: Any = None, k: Any = None, match_weight: Any = None
    ) -> float | None:
        """exp(total negative log-likelihood / words); None where the corpus was no text.

        Interpolated per token, summed, divided by the number of whitespace-separated words.
        """
        if not self.words:
            return None
        return exp(self.nll(lmbda, temperature, k, match_weight) * len(self) / self.words)

    @property
    def base_perplexity(self) -> float:
        """Perplexity of the language model alone."""
        return exp(_mean_nll(self.lm_log_probs))

    def memory_perplexity(
        self, temperature: Any = None, k: Any = None, match_weight: Any = None
    ) -> Any:
        """Perplexity of the memory alone: ∞ as soon as one token has no neighbour carrying it.

        Of several memories the tuple.
        """
        return one_or_all(
            [exp(_mean_nll(one)) for one in self._answers(temperature, k, match_weight)]
        )

    def oracle(self, temperature: Any = None, k: Any = None, match_weight: Any = None) -> float:
        """Perplexity if each token took the best of all components (paper, section 3)."""
        best = functools.reduce(
            torch.maximum, self._answers(temperature, k, match_weight), self.lm_log_probs
        )
        return exp(_mean_nll(best))

    def _answers(self, *settings: Any) -> list[Tensor]:
        """(N,) log-probabilities of each memory alone."""
        if not self.memories:
            raise KNNLMError("these are the scores of a model without memory")
        each_own = zip(self.memories, self._settings(*settings), strict=True)
        return [found.log_probs(*own) for found, own in each_own]

    def _checked(self, lmbda: Any) -> tuple[float, ...]:
        if self.memories:
            return check_lmbdas(lmbda, len(self.memories))
        if check_lmbda(lmbda) > 0:
            raise KNNLMError("these are the scores of a model without memory: lmbda must be 0")
        return ()

    def _settings(self, temperature: Any, k: Any, match_weight: Any) -> list[tuple[Any, Any, Any]]:
        """t, k and γ of each memory."""
        searching = [found.k is not None for found in self.memories]
        matching = [found.matches is not None for found in self.memories]
        columns = (
            _each("temperature", temperature, searching),
            _each("k", k, searching),
            _each("match_weight", match_weight, matching),
        )
        return list(zip(*columns, strict=True))

    @staticmethod
    def concatenate(parts: Sequence[TokenScores]) -> TokenScores:
        """The rows of all parts, in order; settings of the first, times summed."""
        if not parts:
            raise KNNLMError("no scores to concatenate")

        memories = zip(*(part.memories for part in parts), strict=True)
        return replace(
            parts[0],
            **{n: torch.cat([getattr(part, n) for part in parts]) for n in _COLUMNS},  # type: ignore[arg-type]
            memories=tuple(Evidence.concatenate(found) for found in memories),
            model_seconds=sum(part.model_seconds for part in parts),
            memory_seconds=sum(part.memory_seconds for part in parts),
        )


_COLUMNS = ("lm_log_probs", "tokens", "documents", "context")


def _each(name: str, value: Any, takes: Sequence[bool]) -> tuple[Any, ...]:
    """A setting of each memory; one value is for those that take it, if there is one."""
    values = each(name, value, len(takes))
    if isinstance(value, list | tuple) or not any(takes):
        return values
    return tuple(value if one else None for one in takes)


def _mean_nll(log_probs_N: Tensor) -> float:
    return -log_probs_N.double().mean().item()


def exp(value: float) -> float:
    """exp that overflows to ∞ instead of raising."""
    return math.exp(value) if value < 700 else math.inf
