"""Where a head's training starts: at the model's own output embeddings instead of at chance.

A captured state lies in the space that the model's output layer reads, or close to it, so that W_sm
is already a fair guess of a head's rows: a head that starts there needs a fraction of the training.
Its scale is fitted first, since the state may not have passed the model's last norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from knnlm_hf.datastore import DatastoreReader
from knnlm_hf.errors import SettingError

if TYPE_CHECKING:
    from knnlm_hf.memory.head import Head

_SAMPLE = 2048  # entries by which the scale is chosen
_SCALES = [2 ** (step / 2) for step in range(-8, 9)]


@torch.no_grad()
def start_from(head: Head, model: Any, store: DatastoreReader) -> None:
    """Set the head's rows to the model's output embeddings, at the scale that fits the store best.

    Args:
        head: a head with `start_rows`, in place.
        model: the model that built the store.
        store: a sample of its entries is read.

    Raises:
        SettingError: a kind of head that has no such start, a model without output embeddings of
            the head's width.
        ModelMismatchError: not the model that built the store.
    """
    start_rows = getattr(head, "start_rows", None)
    if start_rows is None:
        raise SettingError(f"a head of kind {head.kind!r} cannot start from a model: leave it out")
    store.check_model(model)
    start_rows(output_rows(model, head.vocab_size, head.hidden_size).to(head.device, head.dtype))
    ids_Q = store.nth_live(torch.linspace(0, store.live - 1, min(_SAMPLE, store.live)).long())
    keys_QD, tokens_Q = store.keys[ids_Q].float(), store.values[ids_Q].long()
    rows_RD: Tensor = head.get_parameter("weight")
    start_RD = rows_RD.clone()
    losses = []
    for scale in _SCALES:
        rows_RD.copy_(start_RD * scale)
        losses.append(float(-head.token_log_probs(keys_QD, tokens_Q).mean()))
    rows_RD.copy_(start_RD * _SCALES[losses.index(min(losses))])


def output_rows(model: Any, vocab_size: int, hidden_size: int) -> Tensor:
    """(V, D): what the model's output layer multiplies its last state with, W_sm."""
    get: Any = getattr(model, "get_output_embeddings", lambda: None)
    weight: Any = getattr(get(), "weight", None)
    if weight is None or weight.dim() != 2 or weight.shape[1] != hidden_size:
        found = "none" if weight is None else f"{tuple(weight.shape)}"
        raise SettingError(
            f"{type(model).__name__} has output embeddings of shape {found}, expected "
            f"({vocab_size}, {hidden_size}) to start a head from"
        )
    if weight.shape[0] < vocab_size:
        raise SettingError(
            f"{type(model).__name__} has {weight.shape[0]} output embeddings, the head has "
            f"{vocab_size} tokens: it is not the store's model"
        )
    return torch.as_tensor(weight.detach()[:vocab_size])
