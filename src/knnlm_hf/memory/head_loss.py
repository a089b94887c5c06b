"""The head's training loss, without its logits: −log of the targets' share of all rows.

    loss = mean_q Σ_t a_qt [ logsumexp_r s_qr − logsumexp_{r ∈ rows(token_qt)} s_qr ]
    s_qr = h_q · w_r + b_r

With one target of weight 1 that is the next token's negative log-likelihood; with a teacher's
probabilities as weights it is the cross-entropy to the teacher.

The (Q, R) logits would be the largest tensor of the training by far: 4,096 × 150,771 floats are
2.5 GB, and autograd keeps two of them. Here they exist for a block of queries at a time, and the
gradient is taken in the same pass, while a block's softmax is at hand: three matrix products
(logits, gradient of h, gradient of W) as in the plain version, where recomputing the logits in the
backward pass would need four. Blocks have two sizes: the softmax works on few queries, whose logits
stay in cache; their slopes are collected for more queries, so that the gradient of W is read and
written seldom. Of the alternatives, library kernels of this kind run on CUDA only, and
torch.compile does not fuse a matrix product with the softmax over its columns.

Shape suffixes: Q query, R row, D dimension, T target, M rows of one token; lower case: a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_SOFTMAX_LOGITS, _FEWEST_SOFTMAX = 1 << 20, 64  # logits worked on at a time: 4 MB; queries at least
_SLOPES, _FEWEST_SLOPES = 1 << 22, 256  # slopes collected for the gradients; queries at least


def head_loss(
    hidden_QD: Tensor,
    rows_RD: Tensor,
    bias_R: Tensor | None,
    target_rows: Tensor,
    weights_QT: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy to the targets, in nats; see the module's formula.

    Args:
        hidden_QD: (Q, D) states, divided by the temperature.
        rows_RD: (R, D) the head's rows.
        bias_R: (R,) or None.
        target_rows: (Q, M) the rows of each query's target, or (Q, T, M) of each of its T targets;
            −1 where a token has fewer, at least one each.
        weights_QT: (Q, T) a_qt ≥ 0, 0 for a target that only fills the row; None: 1 each. No
            gradient flows into them.

    Returns:
        A scalar in float32 (float64 for float64 input). Matrix products run in the inputs' dtype,
        or in autocast's; sums are kept in float32. Its gradient is exact; it cannot be
        differentiated twice.
    """
    rows_QTM = target_rows if target_rows.dim() == 3 else target_rows[:, None]
    if weights_QT is None:
        weights_QT = hidden_QD.new_ones(rows_QTM.shape[:2], dtype=torch.float32)
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden_QD, rows_RD, bias_R, rows_QTM, weights_QT
    )
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_QD: Tensor,
        rows_RD: Tensor,
        bias_R: Tensor | None,
        target_rows_QTM: Tensor,
        weights_QT: Tensor,
    ) -> Tensor:
        wants_h, wants_w, wants_b = ctx.needs_input_grad[:3]
        queries, count = hidden_QD.shape[0], rows_RD.shape[0]
        exact = torch.float64 if rows_RD.dtype == torch.float64 else torch.float32
        compute = _compute_dtype(hidden_QD)
        weight_RD = rows_RD.to(compute)
        grad_h = torch.empty_like(hidden_QD) if wants_h else None
        grad_w = torch.zeros_like(rows_RD, dtype=exact) if wants_w else None
        grad_b = torch.zeros(count, dtype=exact, device=rows_RD.device) if wants_b else None
        wants_slopes = wants_h or wants_w or wants_b
        total = torch.zeros((), dtype=exact, device=rows_RD.device)
        many = max(_FEWEST_SLOPES, _SLOPES // count)
        few = max(_FEWEST_SOFTMAX, _SOFTMAX_LOGITS // count)
        if wants_slopes:
            slopes_qR = weight_RD.new_empty(min(many, queries), count)
        for start in range(0, queries, many):
            states_qD = hidden_QD[start : start + many].to(compute)
            for first in range(0, len(states_qD), few):
                block = slice(first, min(first + few, len(states_qD)))
                part = slice(start + first, start + block.stop)
                logits_qR = (states_qD[block] @ weight_RD.T).to(exact)
                if bias_R is not None:
                    logits_qR += bias_R
                weights_qT = weights_QT[part].to(exact)
                total += _softmax_loss(
                    logits_qR, target_rows_QTM[part], weights_qT, queries, wants_slopes
                )
                if grad_b is not None:
                    grad_b += logits_qR.sum(0)
                if wants_slopes:
                    slopes_qR[block] = logits_qR
            if grad_h is not None:
                grad_h[start : start + many] = slopes_qR[: len(states_qD)] @ weight_RD
            if grad_w is not None and compute == exact:
                grad_w.addmm_(slopes_qR[: len(states_qD)].T, states_qD)
            elif grad_w is not None:
                grad_w += slopes_qR[: len(states_qD)].T @ states_qD
        ctx.save_for_backward(
            *(None if g is None else g.to(x.dtype) for g, x in
              ((grad_h, hidden_QD), (grad_w, rows_RD), (grad_b, bias_R)) if x is not None),
        )  # fmt: skip
        ctx.has_bias = bias_R is not None
        return total / queries

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        is_one = bool(grad == 1)  # the usual case: no second copy of the largest gradient
        found = [g if g is None or is_one else g * grad for g in ctx.saved_tensors]
        return found[0], found[1], found[2] if ctx.has_bias else None, None, None


def _softmax_loss(
    logits_qR: Tensor, rows_qTM: Tensor, weights_qT: Tensor, queries: int, wants_slopes: bool
) -> Tensor:
    """Summed loss of a block; its logits become d (mean loss) / d logits where that is wanted.

    The slope is the softmax over all rows less that over each target's rows, by their weights.
    """
    rows_qn = rows_qTM.flatten(1).clamp(min=0)
    own_qTM = logits_qR.gather(1, rows_qn).view(rows_qTM.shape)
    own_qTM = own_qTM.masked_fill(rows_qTM < 0, -torch.inf)
    target_qT = own_qTM.logsumexp(2)
    peak_q1 = logits_qR.amax(1, keepdim=True)
    total_q1 = logits_qR.sub_(peak_q1).exp_().sum(1, keepdim=True)
    all_q1 = peak_q1 + total_q1.log()
    loss = (weights_qT * (all_q1 - target_qT)).sum()
    if wants_slopes:
        weights_qT = weights_qT / queries
        logits_qR.mul_(weights_qT.sum(1, keepdim=True) / total_q1)
        share_qTM = (own_qTM - target_qT[..., None]).exp() * weights_qT[..., None]
        logits_qR.scatter_add_(1, rows_qn, -share_qTM.flatten(1))
    return loss


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype
