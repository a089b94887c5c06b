"""A distribution from found neighbours, wherever they were found: M · softmax(mask_k(·) / t)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from knnlm_hf.errors import KNNLMError
from knnlm_hf.interpolation import Few, few_or_all, knn_log_probs, token_knn_log_probs
from knnlm_hf.types import Neighbors, check_temperature

_MAX_DISTRIBUTION = 1 << 26  # (Q, V) elements made at a time


class NeighbourMemory(ABC):
    """What every memory that searches has in common: two distributions, and a temperature.

    p(w | h) = Σ_{i ∈ kNN(h), value_i = w} softmax(s_i / t)_i
    """

    _temperature: float | None

    @property
    @abstractmethod
    def layer(self) -> str:
        """The representation that queries and keys are."""

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """D, the width of queries and keys."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V."""

    @abstractmethod
    def search(
        self, queries: Tensor, k: int | None = None, *, exclude: Tensor | None = None
    ) -> Neighbors:
        """The k nearest entries of each query (Q, D), nearest first."""

    @abstractmethod
    def _temperature_from_data(self) -> float:
        """The t of a memory that was given none."""

    @property
    def temperature(self) -> float:
        """t, in units of the similarity; from the data unless it was given."""
        if self._temperature is None:
            self._temperature = self._temperature_from_data()
        return self._temperature

    @temperature.setter
    def temperature(self, temperature: float) -> None:
        self._temperature = check_temperature(temperature)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """log p_kNN of every token: (..., D) → (..., V) float32, −inf where no neighbour is."""
        near = self._near(hidden)
        score_QK, tokens_QK = self.scored(near), near.tokens
        settings = self.temperature, self.vocab_size
        step = max(1, _MAX_DISTRIBUTION // self.vocab_size)
        if score_QK.shape[0] <= step:
            log_probs_QV = knn_log_probs(score_QK, tokens_QK, *settings)
        else:
            some = zip(torch.split(score_QK, step), torch.split(tokens_QK, step), strict=True)
            log_probs_QV = torch.cat([knn_log_probs(*part, *settings) for part in some])
        return log_probs_QV.view(*hidden.shape[:-1], self.vocab_size)

    def said_of_one(self, hidden: Tensor) -> Few | Tensor:
        """`log_probs` of one state (..., D) on the CPU, without the (..., V) where that can be."""
        near = self._near(hidden)
        said = few_or_all(self.scored(near), near.tokens, self.temperature, self.vocab_size)
        return said if isinstance(said, Few) else said.view(*hidden.shape[:-1], self.vocab_size)

    def token_log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """log p_kNN of one token per state, without a (..., V) tensor: (..., D), (...) → (...).

        −inf where no neighbour carries the token.
        """
        if tokens.shape != hidden.shape[:-1]:
            raise KNNLMError(
                f"tokens have shape {tuple(tokens.shape)}, expected {tuple(hidden.shape[:-1])}, "
                "one per hidden state"
            )
        near = self._near(hidden)
        is_target_QK = near.tokens == tokens.reshape(-1, 1).to(near.tokens.device)
        log_probs_Q = token_knn_log_probs(self.scored(near), is_target_QK, self.temperature)
        return log_probs_Q.reshape(tokens.shape)

    def scored(self, near: Neighbors) -> Tensor:
        """(Q, K) float32, s of which softmax(s / t) is taken; −inf for a missing hit."""
        return near.similarity

    def _near(self, hidden: Tensor) -> Neighbors:
        return self.search(hidden.reshape(-1, hidden.shape[-1]))

    def _check_queries(self, queries: Tensor) -> None:
        """Refuse queries of another shape than (Q, D)."""
        if queries.dim() != 2 or queries.shape[1] != self.hidden_size:
            raise KNNLMError(
                f"queries have shape {tuple(queries.shape)}, expected "
                f"(Q, {self.hidden_size}), states of layer {self.layer!r}"
            )
