"""Pure torch: similarities → log-probabilities → mixture, all in float32.

    P(w|c) = (1−λ) · P_LM(w|c)  +  λ · Σ_{i: value_i = w} softmax(similarity / t)_i

Everything stays in log space, so that a neighbour of weight e⁻²⁰⁰ is not lost and a word that no
neighbour carries is exactly −inf. A missing hit (similarity −inf, token −1) weighs nothing; a query
without any hit has the kNN log-probability −inf everywhere, and the mixture is then the language
model alone. No function here returns NaN for finite input.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from knnlm_hf.types import check_temperature

_INF = math.inf


def knn_weights(similarity_QK: Tensor, temperature: float) -> Tensor:
    """Log-weights of the neighbours: log softmax(similarity / t) over the hits of each query.

    Args:
        similarity_QK: (..., K), larger is nearer, −inf for a missing hit.
        temperature: t > 0, in units of the similarity.

    Returns:
        (..., K) float32, each row's exp summing to 1; all −inf for a row without a hit.
    """
    scaled_QK = similarity_QK.float() / check_temperature(temperature)
    log_norm_Q1 = torch.logsumexp(scaled_QK, dim=-1, keepdim=True)
    return torch.where(log_norm_Q1 == -_INF, -_INF, scaled_QK - log_norm_Q1)


def knn_log_probs(
    similarity_QK: Tensor, tokens_QK: Tensor, temperature: float, vocab_size: int
) -> Tensor:
    """Log of the kNN distribution over the vocabulary: neighbours of one token are *summed*.

    log p_kNN(w) = logsumexp_{i: token_i = w}(s_i / t) − logsumexp_i(s_i / t)

    Args:
        similarity_QK: (Q, K), −inf for a missing hit.
        tokens_QK: (Q, K) integers in [0, V), anything for a missing hit.
        temperature: t > 0.
        vocab_size: V.

    Returns:
        (Q, V) float32; −inf for a word that no neighbour carries, and everywhere without a hit.

    Example: of three equally near neighbours, two carry token 2.

        >>> knn_log_probs(torch.zeros(1, 3), torch.tensor([[2, 0, 2]]), 1.0, 4).exp()
        tensor([[0.3333, 0.0000, 0.6667, 0.0000]])
    """
    log_weights_QK = knn_weights(similarity_QK, temperature)
    # A missing hit is given token 0 with weight exp(−inf) = 0, so that it can be scattered.
    is_missing_QK = log_weights_QK == -_INF
    tokens_QK = tokens_QK.long().masked_fill(is_missing_QK, 0)
    shape = (similarity_QK.shape[0], vocab_size)
    # The log-sum-exp of each token's weights is taken relative to their maximum. Only what the
    # neighbours carry is computed: V is much larger than K.
    result_QV = torch.full(shape, -_INF, device=similarity_QK.device)
    result_QV.scatter_reduce_(1, tokens_QK, log_weights_QK, "amax")
    peak_QK = result_QV.gather(1, tokens_QK)
    relative_QK = (log_weights_QK - peak_QK).masked_fill_(is_missing_QK, -_INF)
    total_QV = torch.zeros(shape, device=similarity_QK.device)
    total_QV.scatter_add_(1, tokens_QK, relative_QK.exp_())
    # Neighbours of one token all write the same sum; −inf + log 0 is −inf.
    return result_QV.scatter_(1, tokens_QK, peak_QK + total_QV.gather(1, tokens_QK).log_())


def token_knn_log_probs(similarity_QK: Tensor, is_target_QK: Tensor, temperature: float) -> Tensor:
    """log p_kNN of one token per query, without a (Q, V) tensor.

    logsumexp over the neighbours that carry the target − logsumexp over all neighbours.

    Args:
        similarity_QK: (..., K), −inf for a missing hit.
        is_target_QK: (..., K) bool, whether neighbour k carries the query's target token.
        temperature: t > 0.

    Returns:
        (...) float32; −inf where no neighbour carries the target.
    """
    log_weights_QK = knn_weights(similarity_QK, temperature)
    return torch.logsumexp(log_weights_QK.masked_fill(~is_target_QK, -_INF), dim=-1)


def mix(lm: Tensor, memory: Tensor, lmbda: float, has_memory: Tensor | None = None) -> Tensor:
    """Log of the mixture: log((1−λ)·exp(lm) + λ·exp(memory)).

    Args:
        lm: (...) log-probabilities of the language model.
        memory: log-probabilities of the memory, same shape, −inf allowed.
        lmbda: 0 ≤ λ < 1. At λ = 0 the result is `lm` itself.
        has_memory: bool, broadcastable to `lm`; where False the memory had nothing to say (no hit)
            and the result is `lm` itself. Default: everywhere True.

    Returns:
        (...) float32. Where `memory` is −inf: log(1−λ) + lm.

    Example:

        >>> mix(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log(), 0.2).exp()
        tensor([0.6000, 0.4000])
    """
    lm = lm.float()
    if lmbda == 0:
        return lm
    mixed = torch.logaddexp(lm + math.log1p(-lmbda), memory.float() + math.log(lmbda))
    return mixed if has_memory is None else torch.where(has_memory, mixed, lm)


def mix_distributions(lm_V: Tensor, memory_V: Tensor, lmbda: float) -> Tensor:
    """`mix` of whole distributions (..., V); a memory row of only −inf leaves the model's row."""
    has_memory = (memory_V > -_INF).any(dim=-1, keepdim=True)
    return mix(lm_V, memory_V, lmbda, has_memory)


def default_temperature(similarity_QK: Tensor) -> float:
    """A temperature from the data: the one at which a neighbourhood weighs like a few dozen hits.

    There is no universal t: squared distances scale with the width and the norm of the states, and
    a product quantiser shrinks them. This one makes the *median* query's weights as spread as
    `_EFFECTIVE_NEIGHBOURS` equal neighbours (perplexity of the weights), or half of the hits where
    there are fewer; `tune` then fits it.

    Args:
        similarity_QK: (Q, K) similarities of a sample of queries to their own neighbours.

    Returns:
        t > 0; 1.0 where the sample says nothing (no hits, or all equally near).
    """
    hits_Q = similarity_QK.isfinite().sum(dim=-1)
    similarity_QK = similarity_QK.float()[hits_Q > 1]
    if similarity_QK.shape[0] == 0:
        return 1.0
    hits_Q = hits_Q[hits_Q > 1]
    target_Q = torch.minimum(hits_Q / 2, torch.tensor(_EFFECTIVE_NEIGHBOURS)).log()
    best = similarity_QK.amax(dim=-1, keepdim=True)
    spread = torch.where(similarity_QK.isfinite(), best - similarity_QK, 0.0).max().item()
    if spread <= 0:
        return 1.0
    low, high = math.log(spread * 1e-6), math.log(spread * 1e3)
    for _ in range(40):  # the entropy of the weights rises with t: bisect log t
        middle = (low + high) / 2
        log_weights = knn_weights(similarity_QK, math.exp(middle))
        terms = torch.where(log_weights.isfinite(), log_weights.exp() * log_weights, 0.0)
        too_cold = (-terms.sum(dim=-1) < target_Q).float().mean().item() > 0.5
        low, high = (middle, high) if too_cold else (low, middle)
    return math.exp((low + high) / 2)


_EFFECTIVE_NEIGHBOURS = 64.0
