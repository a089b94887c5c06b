"""Whether tensors that were made in inference mode are left behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def nothing_stays_marked() -> Iterator[None]:
    """Of all tensors made inside the block none that is left may bear the mark of that mode."""
    gc.freeze()  # what is there already need not be looked at
    try:
        yield
        gc.collect()
        left = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and o.is_inference()]
        assert not left
    finally:
        gc.unfreeze()
