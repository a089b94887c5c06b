"""MixtureOfSoftmaxes: several states made of one, each with a softmax over the same V rows.

    p(w | h) = Σ_k π_k(h) · softmax_w(W · g_k),   g_k = tanh(U_k h + b_k),   π(h) = softmax(A h)

After Yang et al. (2018); the paper tries 2 … 5 components over the frozen model (section 4). The
model's own output layer is of rank D at most; a mixture of its kind is not.

Shape suffixes: Q query, K component, D dimension, V vocabulary, T target, S query and component.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from knnlm_hf.memory.head import Head, exact, first_rows
from knnlm_hf.memory.head_loss import head_loss
from knnlm_hf.memory.sampled_loss import sampled_rows
from knnlm_hf.types import check_count


class MixtureOfSoftmaxes(Head):
    """A memory of K softmaxes with shared rows; see the module's formula.

    Parameters: V·D + K·(D² + D) + K·D.

    Args:
        hidden_size: D, the width of the captured states.
        vocab_size: V.
        components: K ≥ 1.
        layer: the representation it reads, as for a datastore.

    Raises:
        SettingError: a size below 1.
    """

    kind = "mixture_of_softmaxes"
    always_speaks = True
    negatives: int | None = None
    """Tokens drawn for a training step's denominators, see `sampled_loss`; None: all."""

    def __init__(
        self, hidden_size: int, vocab_size: int, components: int = 3, layer: str = "att"
    ) -> None:
        super().__init__(hidden_size, vocab_size, layer)
        self.components = check_count("components", components)
        self.weight = first_rows(vocab_size, hidden_size)
        self.latent = nn.Linear(hidden_size, components * hidden_size)
        self.prior = nn.Linear(hidden_size, components, bias=False)

    def settings(self) -> dict[str, Any]:
        """`kind` and the constructor's arguments, as plain data."""
        return super().settings() | {"components": self.components}

    def forward(self, hidden: Tensor, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats, for training; exact gradients, no logits beyond a block.

        The gradient of −log Σ_k π_k p_k is −Σ_k r_k ∇(log π_k + log p_k), where r_k is component
        k's share of the target's probability. So one pass finds the shares, and `head_loss` with
        the shares as weights has the gradient.

        Args:
            hidden: (..., D) states.
            tokens: (...) next tokens; with weights (..., T), several targets of each state.
            weights: (..., T) ≥ 0, how much each target counts; 0 for one that only fills the row.
        """
        tokens_QT = self._targets(tokens, weights, hidden)
        states_QKD, log_prior_QK = self._components(self._flat(hidden))
        rows_rD, bias_r, rows_QT1 = sampled_rows(
            self.weight, None, lambda tokens: tokens[..., None], tokens_QT,
            vocab_size=self.vocab_size, negatives=self.negatives if self.training else None,
        )  # fmt: skip
        with torch.no_grad():
            own_QKT = self._own_log_probs(states_QKD, rows_rD, bias_r, rows_QT1[..., 0])
            joint_QKT = log_prior_QK[:, :, None] + own_QKT
            log_p_Q1T = joint_QKT.logsumexp(1, keepdim=True)
            share_QKT = (joint_QKT - log_p_Q1T).exp()
            loss_Q1T = -log_p_Q1T
            if weights is not None:
                weights_Q1T = weights.reshape(tokens_QT.shape).to(share_QKT)[:, None]
                share_QKT, loss_Q1T = share_QKT * weights_Q1T, loss_Q1T * weights_Q1T
            loss = loss_Q1T.sum() / len(tokens_QT)
        if not torch.is_grad_enabled():
            return loss
        rows_ST1 = rows_QT1.repeat_interleave(self.components, 0)
        of_rows = head_loss(
            states_QKD.flatten(0, 1), rows_rD, bias_r, rows_ST1, share_QKT.flatten(0, 1)
        )
        of_prior = (share_QKT.sum(2) * log_prior_QK).sum() / len(tokens_QT)
        same_gradient = self.components * of_rows - of_prior
        return loss + (same_gradient - same_gradient.detach())

    @property
    def _width(self) -> int:
        return self.components * self.vocab_size

    def _log_probs(self, hidden_QD: Tensor) -> Tensor:
        states_QKD, log_prior_QK = self._components(hidden_QD)
        log_probs_QKV = exact(states_QKD @ self.weight.T).log_softmax(-1)
        return torch.logsumexp(log_prior_QK[..., None] + log_probs_QKV, dim=1)

    def _token_log_probs(self, hidden_QD: Tensor, tokens_Q: Tensor) -> Tensor:
        states_QKD, log_prior_QK = self._components(hidden_QD)
        own_QK = _own_block(states_QKD, self.weight, None, tokens_Q[:, None])[..., 0]
        return torch.logsumexp(log_prior_QK + own_QK, dim=1)

    def _components(self, hidden_QD: Tensor) -> tuple[Tensor, Tensor]:
        """States (Q, K, D) and log π (Q, K), the latter in float32 (float64 for float64)."""
        states_QS = torch.tanh(self.latent(hidden_QD))
        states_QKD = states_QS.view(len(hidden_QD), self.components, self.hidden_size)
        return states_QKD, exact(self.prior(hidden_QD)).log_softmax(-1)

    def _own_log_probs(
        self, states_QKD: Tensor, rows_rD: Tensor, bias_r: Tensor | None, targets_QT: Tensor
    ) -> Tensor:
        """(Q, K, T) log p_k of the targets' rows, a chunk of queries at a time."""
        pairs = zip(self._chunks(states_QKD), self._chunks(targets_QT), strict=True)
        return torch.cat([_own_block(states, rows_rD, bias_r, rows) for states, rows in pairs])


def _own_block(
    states_QKD: Tensor, rows_rD: Tensor, bias_r: Tensor | None, targets_QT: Tensor
) -> Tensor:
    logits_QKr = exact(states_QKD @ rows_rD.T)
    if bias_r is not None:
        logits_QKr += bias_r
    targets_QKT = targets_QT[:, None].expand(-1, logits_QKr.shape[1], -1)
    return logits_QKr.gather(2, targets_QKT) - logits_QKr.logsumexp(2, keepdim=True)
