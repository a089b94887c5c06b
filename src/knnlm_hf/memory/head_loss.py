"""The head's training loss, without its logits: −log of the target's share of all rows.

    loss = mean_q [ logsumexp_r s_qr − logsumexp_{r ∈ rows(token_q)} s_qr ],  s_qr = h_q · w_r + b_r

The (Q, R) logits would be the largest tensor of the training by far: 4,096 × 150,771 floats are
2.5 GB, and autograd keeps two of them. Here they exist for a chunk of queries at a time, and the
gradient is taken in the same pass, while a chunk's softmax is at hand: three matrix products per
chunk (logits, gradient of h, gradient of W) as in the plain version, where recomputing the logits
in the backward pass would need four. Of the alternatives, library kernels of this kind run on CUDA
only, and torch.compile does not fuse a matrix product with the softmax over its columns.

Shape suffixes: Q query, R row, D dimension, M rows of one token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = 1 << 23
"""Logits held at a time: 32 MB in float32."""


def head_loss(
    hidden_QD: Tensor, rows_RD: Tensor, bias_R: Tensor | None, target_rows_QM: Tensor
) -> Tensor:
    """Mean negative log-likelihood of the targets, in nats; see the module's formula.

    Args:
        hidden_QD: (Q, D) states, divided by the temperature.
        rows_RD: (R, D) the head's rows.
        bias_R: (R,) or None.
        target_rows_QM: (Q, M) the rows of each query's target, −1 where it has fewer; at least
            one each.

    Returns:
        A scalar in float32 (float64 for float64 input). Matrix products run in the inputs' dtype,
        or in autocast's; sums are kept in float32. Its gradient is exact; it cannot be
        differentiated twice.
    """
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden_QD, rows_RD, bias_R, target_rows_QM
    )
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_QD: Tensor, rows_RD: Tensor, bias_R: Tensor | None, target_rows_QM: Tensor
    ) -> Tensor:
        wants_h, wants_w, wants_b, _ = ctx.needs_input_grad
        queries, count = hidden_QD.shape[0], rows_RD.shape[0]
        exact = torch.float64 if rows_RD.dtype == torch.float64 else torch.float32
        compute = _compute_dtype(hidden_QD)
        weight_RD = rows_RD.to(compute)
        grad_h = torch.empty_like(hidden_QD) if wants_h else None
        grad_w = torch.zeros_like(rows_RD, dtype=exact) if wants_w else None
        grad_b = torch.zeros(count, dtype=exact, device=rows_RD.device) if wants_b else None
        total = torch.zeros((), dtype=exact, device=rows_RD.device)
        step = max(1, _CHUNK_ELEMENTS // count)
        for start in range(0, queries, step):
            part = slice(start, start + step)
            states_qD = hidden_QD[part].to(compute)
            logits_qR = (states_qD @ weight_RD.T).to(exact)
            if bias_R is not None:
                logits_qR += bias_R
            all_q1 = logits_qR.logsumexp(1, keepdim=True)
            rows_qM = target_rows_QM[part]
            own_qM = logits_qR.gather(1, rows_qM.clamp(min=0))
            own_qM = own_qM.masked_fill(rows_qM < 0, -torch.inf)
            target_q1 = own_qM.logsumexp(1, keepdim=True)
            total += (all_q1 - target_q1).sum()
            if not (wants_h or wants_w or wants_b):
                continue
            # d loss / d logits = softmax over all rows − softmax over the target's rows.
            slope_qR = logits_qR.sub_(all_q1).exp_()
            slope_qR.scatter_add_(1, rows_qM.clamp(min=0), -(own_qM - target_q1).exp())
            slope_qR /= queries
            if grad_b is not None:
                grad_b += slope_qR.sum(0)
            slope_qR = slope_qR.to(compute)
            if grad_h is not None:
                grad_h[part] = slope_qR @ weight_RD
            if grad_w is not None and compute == exact:
                grad_w.addmm_(slope_qR.T, states_qD)
            elif grad_w is not None:
                grad_w += slope_qR.T @ states_qD
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
        return found[0], found[1], found[2] if ctx.has_bias else None, None


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype
