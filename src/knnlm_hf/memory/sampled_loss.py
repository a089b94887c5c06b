"""Sampled softmax: a training step in which a few tokens stand for all the others.

    Z(h) = Σ_{w in the batch} e^{s_w}  +  (others / drawn) · Σ_{w drawn} e^{s_w}

The targets of the whole batch, among them nearly all frequent tokens, are in the sum for every
query; of the other tokens some are drawn, uniformly and without repetition, and each counts for
others / drawn. The expectation of Z is the whole softmax's denominator, and a step costs rows in
proportion to the tokens it takes in. Rows that were not drawn get no gradient.

Shape suffixes: Q query, R row, D dimension, T target, M rows of one token, V vocabulary, C token
taken in, r row taken in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from knnlm_hf.memory.head_loss import head_loss


def sampled_loss(
    hidden_QD: Tensor,
    rows_RD: Tensor,
    bias_R: Tensor | None,
    rows_of: Callable[[Tensor], Tensor],
    tokens_QT: Tensor,
    weights_QT: Tensor | None,
    *,
    vocab_size: int,
    negatives: int | None,
) -> Tensor:
    """`head_loss` over the rows of the batch's targets and of `negatives` other tokens.

    Args:
        hidden_QD, weights_QT: as for `head_loss`.
        rows_RD, bias_R, rows_of, tokens_QT, vocab_size, negatives: as for `sampled_rows`.
    """
    rows_rD, bias_r, targets_QTM = sampled_rows(
        rows_RD, bias_R, rows_of, tokens_QT, vocab_size=vocab_size, negatives=negatives
    )
    return head_loss(hidden_QD, rows_rD, bias_r, targets_QTM, weights_QT)


def sampled_rows(
    rows_RD: Tensor,
    bias_R: Tensor | None,
    rows_of: Callable[[Tensor], Tensor],
    tokens_QT: Tensor,
    *,
    vocab_size: int,
    negatives: int | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The rows taken in: themselves (r, D), their bias (r,), and the targets' (Q, T, M) among them.

    The bias of a drawn token's rows has log of how many tokens it stands for in it.

    Args:
        rows_RD, bias_R: of the head.
        rows_of: tokens (...) → their rows (..., M), −1 where a token has fewer.
        tokens_QT: the targets.
        vocab_size: V.
        negatives: tokens drawn, by torch's global generator; all others where they are no more;
            None: every row as it is, the exact loss.
    """
    if negatives is None:
        return rows_RD, bias_R, rows_of(tokens_QT)
    tokens_C, log_count_C = taken_in(tokens_QT, vocab_size, negatives)
    rows_CM = rows_of(tokens_C)
    is_row_CM = rows_CM >= 0
    rows_r = rows_CM[is_row_CM]
    bias_r = log_count_C[:, None].expand_as(rows_CM)[is_row_CM]
    if bias_R is not None:
        bias_r = bias_R.index_select(0, rows_r) + bias_r
    place_R = rows_r.new_full((len(rows_RD),), -1)
    place_R[rows_r] = torch.arange(len(rows_r), device=rows_r.device)
    targets_QTM = rows_of(tokens_QT)
    targets_QTM = torch.where(targets_QTM < 0, -1, place_R[targets_QTM.clamp(min=0)])
    return rows_RD.index_select(0, rows_r), bias_r, targets_QTM


def taken_in(tokens: Tensor, vocab_size: int, negatives: int) -> tuple[Tensor, Tensor]:
    """The tokens in the denominator, (C,), and log of how many tokens each stands for, (C,)."""
    is_target_V = torch.zeros(vocab_size, dtype=torch.bool, device=tokens.device)
    is_target_V[tokens.reshape(-1)] = True
    targets_c, others_c = is_target_V.nonzero()[:, 0], (~is_target_V).nonzero()[:, 0]
    order_c = torch.randperm(len(others_c), device=tokens.device)[:negatives]
    share = len(others_c) / max(1, len(order_c))
    log_count_C = torch.zeros(len(targets_c) + len(order_c), device=tokens.device)
    log_count_C[len(targets_c) :] = torch.tensor(share).log()
    return torch.cat([targets_c, others_c[order_c]]), log_count_C
