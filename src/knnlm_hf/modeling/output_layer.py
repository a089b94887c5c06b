"""W_sm · h_sm in a step of generation, as fast as a head's product.

The model's own output layer is a large part of a step for one token: it reads V × D numbers, like a
head of one row per token, and gains as much by being multiplied as that is (see `memory.product`).
A wrapper has the layer as an object of another class, `StepLinear`; the model keeps its own.
Outside the wrapper's steps, and in `disable_retrieval()`, both work alike, to the bit.
"""

from __future__ import annotations

from contextvars import ContextVar

import torch
from torch import Tensor, nn

from knnlm_hf.memory.product import is_quick, times_rows

_LARGE = 1 << 20
"""Numbers in its rows; fewer stay in the cache, and the usual product is as fast."""
_in_step: ContextVar[nn.Module | None] = ContextVar("knnlm_hf_in_step", default=None)


class StepLinear(nn.Linear):
    """A linear layer that multiplies a few states the quick way while it is `InStep`."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`."""
        if torch.compiler.is_compiling() or _in_step.get() is not self:
            return super().forward(input)
        states, weight = input.shape[:-1].numel(), self.weight
        if input.dtype != weight.dtype or not _is_plain(weight) or not is_quick(states, weight):
            return super().forward(input)
        product = times_rows(input.reshape(-1, input.shape[-1]), weight)
        if self.bias is not None:
            product = product + self.bias
        return product.reshape(*input.shape[:-1], -1).contiguous()


def _is_plain(weight: Tensor) -> bool:
    """Not quantised, sparse or distributed, which are linear in ways of their own."""
    return type(weight) in (nn.Parameter, Tensor) and weight.layout == torch.strided


def for_steps(layer: nn.Module) -> nn.Module:
    """The same layer as a `StepLinear`; itself where it is none that could gain.

    Same in all: weights, hooks, and whatever is changed on either later.
    """
    if type(layer) is not nn.Linear or layer.weight.numel() < _LARGE:
        return layer
    view = object.__new__(StepLinear)
    object.__setattr__(view, "__dict__", layer.__dict__)
    return view


class InStep:
    """Let `layer` be quick while the block is open, in this thread or context only."""

    def __init__(self, layer: nn.Module | None) -> None:
        self._layer = layer

    def __enter__(self) -> None:
        self._token = _in_step.set(self._layer)

    def __exit__(self, *_: object) -> None:
        _in_step.reset(self._token)
