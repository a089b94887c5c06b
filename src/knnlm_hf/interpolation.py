"""Pure torch: similarities → log-probabilities → mixture, all in float32.

    P(w|c) = (1−Σλ_i) · P_LM(w|c)  +  Σ λ_i · P_i(w|c),
    of a kNN memory: P_i(w|c) = Σ_{j: value_j = w} softmax(similarity / t)_j

Everything stays in log space, so that a neighbour of weight e⁻²⁰⁰ is not lost and a word that no
neighbour carries is exactly −inf. A missing hit (similarity −inf, token −1) weighs nothing; a query
without any hit has the kNN log-probability −inf everywhere, and gives its share λ to the language
model. No function here returns NaN for finite input.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from knnlm_hf.types import check_temperature

_INF = math.inf
_SMALL = 1 << 17  # numbers that one core adds sooner than others are woken
_LEAST_SCORE = -680.0  # its exp, even a millionth of it, has all of float64's digits


def knn_weights(similarity_QK: Tensor, temperature: float) -> Tensor:
    """Log-weights of the neighbours: log softmax(similarity / t) over the hits of each query.

    Args:
        similarity_QK: (..., K), larger is nearer, −inf for a missing hit.
        temperature: t > 0, in units of the similarity.

    Returns:
        (..., K) float32, each row's exp summing to 1; all −inf for a row without a hit.
    """
    similarity_QK = similarity_QK.float()
    peak_Q1 = similarity_QK.amax(dim=-1, keepdim=True)
    # subtle: relative to the nearest before t divides. At s / t = 1e7 float32 has no digits left
    # for the log of a sum, and weights would exceed 1.
    scaled_QK = (similarity_QK - peak_Q1).div_(check_temperature(temperature))
    return log_softmax(scaled_QK, dim=-1).masked_fill(peak_Q1 == -_INF, -_INF)


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
    said = few_or_all(similarity_QK, tokens_QK, temperature, vocab_size)
    return said.log_probs() if isinstance(said, Few) else said


def few_or_all(
    similarity_QK: Tensor, tokens_QK: Tensor, temperature: float, vocab_size: int
) -> Few | Tensor:
    """`knn_log_probs`, or the same in short where `said_by_few` can say it."""
    settings = temperature, vocab_size
    few = said_by_few(similarity_QK, tokens_QK, *settings)
    return said_by_all(similarity_QK, tokens_QK, *settings) if few is None else few


def said_by_all(
    similarity_QK: Tensor, tokens_QK: Tensor, temperature: float, vocab_size: int
) -> Tensor:
    """`knn_log_probs` of any neighbours of any queries, over all of V."""
    shape, device = (similarity_QK.shape[0], vocab_size), similarity_QK.device
    result_QV = torch.full(shape, -_INF, device=device)
    log_weights_QK = knn_weights(similarity_QK, temperature)
    # A missing hit is given token 0 with weight exp(−inf) = 0, so that it can be scattered.
    is_missing_QK = log_weights_QK == -_INF
    tokens_QK = tokens_QK.long().masked_fill(is_missing_QK, 0)
    # The log-sum-exp of each token's weights is taken relative to their maximum. Only what the
    # neighbours carry is computed: V is much larger than K.
    result_QV.scatter_reduce_(1, tokens_QK, log_weights_QK, "amax")
    peak_QK = result_QV.gather(1, tokens_QK)
    relative_QK = (log_weights_QK - peak_QK).masked_fill_(is_missing_QK, -_INF)
    total_QV = torch.zeros(shape, device=device)
    total_QV.scatter_add_(1, tokens_QK, relative_QK.exp_())
    # Neighbours of one token all write the same sum; −inf + log 0 is −inf.
    return result_QV.scatter_(1, tokens_QK, peak_QK + total_QV.gather(1, tokens_QK).log_())


class Few(NamedTuple):
    """What the neighbours of one query say: something of few tokens, nothing of all others.

    Generation asks one query at a time. What takes time then are operations, not arithmetic, and
    what is done to all of V where K would do: numpy's operations take a third of the time of
    torch's, and V is much larger than K.
    """

    tokens: np.ndarray[Any, Any]
    """(K,) the neighbours'; some occur again."""
    weights: np.ndarray[Any, Any]
    """(K,) that of the token in float64, the same wherever it occurs again; none is 0."""
    total: float
    """p(token) = weight ÷ total."""
    vocab_size: int
    """V."""

    def log_probs(self) -> Tensor:
        """(1, V) float32, −inf for the tokens that it says nothing of."""
        result_1V = np.full((1, self.vocab_size), -_INF, dtype=np.float32)
        result_1V[0, self.tokens] = np.log(self.weights / self.total)
        return torch.from_numpy(result_1V)

    def add_to(self, mixed: Tensor, lmbda: float) -> None:
        """Add λ·p to exp(mixed), of (..., V) numbers, in place."""
        mixed_V = mixed.numpy().reshape(-1)
        probs_K = np.exp(mixed_V[self.tokens], dtype=np.float64)
        probs_K += self.weights * (lmbda / self.total)
        mixed_V[self.tokens] = np.log(probs_K)  # a token that occurs again is written twice alike


def said_by_few(
    similarity_1K: Tensor, tokens_1K: Tensor, temperature: float, vocab_size: int
) -> Few | None:
    """`knn_log_probs` of one query on the CPU, without gradients; None of other things.

    Nor where a neighbour is missing, or so far away that float64 does not hold its weight in full,
    or carries a token that is none.
    """
    is_plain = similarity_1K.dtype == torch.float32 and not similarity_1K.requires_grad
    if similarity_1K.shape[0] != 1 or similarity_1K.device.type != "cpu" or not is_plain:
        return None
    return few_of(similarity_1K.numpy()[0], tokens_1K.numpy()[0], temperature, vocab_size)


def few_of(score_K: Any, tokens_K: Any, temperature: float, vocab_size: int) -> Few | None:
    """`said_by_few` of (K,) arrays, float32 and integers."""
    temperature = check_temperature(temperature)
    peak = score_K.max()
    if peak == -_INF:
        return None
    scaled_K = np.subtract(score_K, peak, dtype=np.float64)
    scaled_K /= temperature
    if scaled_K.min() <= _LEAST_SCORE:  # also of a missing hit
        return None
    weight_K = np.exp(scaled_K)
    total_V = np.bincount(tokens_K, weight_K)
    if len(total_V) > vocab_size:
        return None
    return Few(tokens_K, total_V[tokens_K], float(weight_K.sum()), vocab_size)


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


def mix(
    lm: Tensor,
    memories: Sequence[Tensor | Few],
    lmbdas: Sequence[float],
    has_hit: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Log of the mixture: log((1−Σλ_i)·exp(lm) + Σ λ_i·exp(memory_i)).

    Args:
        lm: (...) log-probabilities of the language model.
        memories: of each memory, log-probabilities of the same shape, −inf allowed; or what few
            neighbours say, where `lm` is (..., V) of one query, without gradients.
        lmbdas: λ_i ≥ 0 of each, Σλ_i < 1. A memory of λ 0 changes nothing.
        has_hit: for each memory None, or bools broadcastable to `lm`: where False the memory had
            nothing to say (no hit), is −inf, and its share is the model's.

    Returns:
        (...) float32. Where all memories are −inf: log(1−Σλ_i) + lm, and `lm` itself without a hit.

    Example:

        >>> certain, even = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])
        >>> mix(even.log(), [certain.log()], [0.2]).exp()
        tensor([0.6000, 0.4000])
        >>> mix(even.log(), [certain.log(), certain.flip(0).log()], [0.2, 0.1]).exp()
        tensor([0.5500, 0.4500])
    """
    hits = [None] * len(memories) if has_hit is None else has_hit
    terms = [t for t in zip(memories, lmbdas, hits, strict=True) if t[1] > 0]
    mixed = lm.float()
    if terms:
        mixed = _plus(mixed, _log_rest([(lmbda, hit) for _, lmbda, hit in terms]))
    for memory, lmbda, _ in terms:
        if isinstance(memory, Few):
            memory.add_to(mixed, lmbda)
        else:
            mixed = _log_add(mixed, _plus(memory.float(), math.log(lmbda)))
    return mixed


def _plus(logs: Tensor, share: float | Tensor) -> Tensor:
    """Their sum.

    In a step of generation, which is where a small tensor is made in inference mode, each operation
    runs once, and numpy's are the quicker ones to begin.
    """
    is_step = logs.is_inference() and logs.device.type == "cpu" and logs.numel() <= _SMALL
    if is_step and isinstance(share, float) and type(logs) is Tensor:
        return torch.from_numpy(logs.numpy() + np.float32(share))
    return logs + share


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b), whose gradient is 0 where both are −inf; that of logaddexp is NaN."""
    if not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return torch.logaddexp(a, b)
    nothing = (a == -_INF) & (b == -_INF)
    sums = torch.logaddexp(a.masked_fill(nothing, 0.0), b.masked_fill(nothing, 0.0))
    return sums.masked_fill(nothing, -_INF)


def _log_rest(shares: Sequence[tuple[float, Tensor | None]]) -> float | Tensor:
    """log(1 − Σ λ_i) over the memories that have a hit: the model's own share."""
    sure = math.fsum([lmbda for lmbda, hit in shares if hit is None])
    unsure = [(lmbda, hit) for lmbda, hit in shares if hit is not None]
    if not unsure:
        return math.log1p(-sure)
    taken = functools.reduce(torch.add, (hit.double() * lmbda for lmbda, hit in unsure))
    return torch.log1p(-sure - taken).float()


def mix_distributions(
    lm_V: Tensor, memories_V: Sequence[Tensor], lmbdas: Sequence[float]
) -> Tensor:
    """`mix` of whole distributions (..., V); a memory's row of only −inf leaves its share."""
    return mix(lm_V, memories_V, lmbdas, [has_hit(memory_V) for memory_V in memories_V])


def has_hit(memory_V: Tensor) -> Tensor | None:
    """Which rows (..., 1) a memory says something of; None where it is known to be all of them."""
    most = memory_V.detach().amax(dim=-1, keepdim=True)
    # Shares that are numbers spare half of the small operations of a step; on a GPU, to look
    # would be to wait for it.
    if most.device.type == "cpu" and most.numel():
        least = most if most.numel() == 1 else most.min()
        if least.item() > -_INF:
            return None
    return most > -_INF


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
