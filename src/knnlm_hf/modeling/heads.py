"""Memories that are modules (trained heads): no submodules of the wrapper, yet they follow it.

They go where it goes and keep their own dtype: rounding a head to the model's half precision would
lose what it learned and save little, for its sums are in float32 anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def heads(memories: Iterable[Any]) -> list[nn.Module]:
    """Those of `memories` that are modules."""
    return [memory for memory in memories if isinstance(memory, nn.Module)]


def bring(memories: Iterable[Any], model: Any) -> None:
    """Move heads to where `model` makes its logits, unless its weights are nowhere yet.

    They are in training or in evaluation as it is.
    """
    weight = getattr(model.get_output_embeddings(), "weight", None)
    for head in heads(memories):
        head.train(model.training)
        if weight is not None and not weight.is_meta:
            head.to(weight.device)


def follow(memories: Iterable[Any], fn: Callable[[Tensor], Tensor]) -> None:
    """Move heads to the device to which `fn`, of `nn.Module._apply`, takes the model's weights."""
    for head in heads(memories):
        head._apply(lambda tensor: _moved(tensor, fn))  # type: ignore[no-untyped-call]


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    device = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device
    if device == tensor.device:
        return tensor
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
