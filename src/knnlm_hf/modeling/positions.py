"""Which positions of a forward have logits, as transformers' `logits_to_keep` says.

Shape suffixes: B batch, T position, D hidden dimension.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor


def inputs_of(arguments: dict[str, Any]) -> Any:
    """The forward's token ids, or its embeddings where it was given those."""
    ids = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if ids is None else ids


def kept(names: Collection[str], arguments: dict[str, Any], states_BTD: Tensor) -> Tensor:
    """Of all positions those that have logits.

    Args:
        names: the arguments that the model's forward takes.
        arguments: those it is given.
        states_BTD: something of every position.
    """
    if "logits_to_keep" not in names:
        return states_BTD
    return _slice(states_BTD, arguments.get("logits_to_keep", 0))


def _slice(states_BTD: Tensor, keep: Any) -> Tensor:
    """Select positions.

    Args:
        states_BTD: (B, T, D).
        keep: the last n (an int; 0 or None: all), 2-D positions per row, a 2-D mask, which gives
            (number of True, D), or else any index of the positions: most often a 1-D tensor.
    """
    if keep is None or isinstance(keep, int):
        return states_BTD[:, -keep:] if keep and keep != states_BTD.shape[1] else states_BTD
    if isinstance(keep, Tensor):
        keep = keep.to(states_BTD.device)
        if keep.dim() == 2 and keep.dtype == torch.bool:
            return states_BTD[keep]
        if keep.dim() == 2:
            return torch.take_along_dim(states_BTD, keep[..., None], dim=1)
    return states_BTD[:, keep]
