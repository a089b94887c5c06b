"""Many forwards of one model, two at a time where that is faster.

On a CPU two threads with half of a batch each are faster than both on one whole batch: small
operations are not divided, and no thread waits for the other at every one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import nn

from knnlm_hf.capture import has_other_hooks
from knnlm_hf.parallel import two_at_a_time

T = TypeVar("T")
R = TypeVar("R")


def rows_at_once(model: nn.Module, batch_size: int) -> int:
    """Rows of each forward, so that two at a time take no more memory than one whole in float32.

    That is half of a batch each; in half precision all of it, of which larger products gain.
    """
    if not can_share(model):
        return batch_size
    size = max(parameter.dtype.itemsize for parameter in model.parameters())
    return max(1, batch_size * 2 // max(size, 2))


def run(model: nn.Module, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """work(item) of every item, in order, each item a forward of `model`.

    Args:
        model: what `work` runs; see `can_share`.
        work: it may run in two threads at once.
        items: taken in order, here, and no more than are worked on.
    """
    return two_at_a_time(work, items) if can_share(model) else map(work, items)


def can_share(model: nn.Module) -> bool:
    """Whether two threads may run the model at once, and gain by it.

    Not where a forward writes to the model: transformers' own models do not, but for rotary
    frequencies that follow the length and recurrent states; of other code nothing is known. Nor
    where somebody's hooks may remember what passed last, where accelerate moves weights, where
    torch compiles, nor under autocast, which is a thread's own.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if not on_cpu or torch.get_num_threads() < 2 or torch.is_autocast_enabled("cpu"):
        return False
    is_known = type(model).__module__.startswith("transformers.models.")
    return is_known and not has_other_hooks(model) and not any(map(_changes, model.modules()))


def _changes(module: nn.Module) -> bool:
    """Whether a forward writes to the module, or is compiled on the way."""
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        return True
    ropes = getattr(module, "rope_type", None)
    kinds = ropes.values() if isinstance(ropes, dict) else [ropes]
    if any("dynamic" in str(kind) or kind == "longrope" for kind in kinds):
        return True
    return hasattr(module, "recurrent_states")
