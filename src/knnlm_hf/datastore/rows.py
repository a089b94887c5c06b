"""The keys of all shards as one array of rows, mapped from the disk."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm_hf.datastore.mapping import prefetch


class Rows:
    """(N, D) rows that lie in several tensors; all but the last have the same number of rows."""

    def __init__(self, parts: list[Tensor]) -> None:
        """`parts`: (n_i, D) each, at least one."""
        self._parts = parts
        self._part_rows = parts[0].shape[0]
        # numpy has no bfloat16: the same bytes as integers.
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parts[0].dtype.itemsize]
        self._arrays = [part.view(integer).numpy() for part in parts]
        self._count = sum(part.shape[0] for part in parts)

    @property
    def dim(self) -> int:
        """D."""
        return self._parts[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored rows."""
        return self._parts[0].dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self._count, self.dim

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, ids: Any) -> Tensor:
        """Rows in stored dtype: (D,) for an int, (n, D) for a slice, else (*shape of ids, D).

        An int and a slice count from the end where negative; every other id is in [0, N).

        Raises:
            IndexError: an id out of range, or ids that are no integers.
        """
        if isinstance(ids, slice):
            return self._slice(ids)
        if not isinstance(ids, Tensor):
            if hasattr(ids, "__index__") and not getattr(ids, "ndim", 0):
                return self._row(operator.index(ids))
            ids = torch.as_tensor(ids)
            ids = ids.long() if ids.numel() == 0 else ids
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise IndexError(f"row numbers are of type {ids.dtype}, expected integers")
        flat = ids.reshape(-1).to("cpu", torch.int64)
        return self._gather(flat).reshape(*ids.shape, self.dim)

    def blocks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """All rows in order as (number of the first, (≤ size, D) view), without copying them."""
        first = 0
        for part in self._parts:
            for block in torch.split(part, size):
                yield first, block
                first += block.shape[0]

    def prefetch(self) -> None:
        """Bring the rows into memory now, if they lie in files: for random access to follow."""
        for part in self._parts:
            if part.device.type == "cpu":
                prefetch(part.view(torch.uint8).numpy())

    def _row(self, i: int) -> Tensor:
        if not -self._count <= i < self._count:
            raise IndexError(f"row {i} is out of range: there are {self._count}")
        part, row = divmod(i % self._count, self._part_rows)
        return self._parts[part][row]

    def _slice(self, rows: slice) -> Tensor:
        start, stop, step = rows.indices(self._count)
        first_part = start // self._part_rows
        if step == 1 and start < stop <= (first_part + 1) * self._part_rows:
            offset = first_part * self._part_rows
            return self._parts[first_part][start - offset : stop - offset]  # a view
        return self._gather(
            torch.arange(start, stop, step)
            if (stop - start) * step > 0
            else torch.empty(0, dtype=torch.int64)
        )

    def _gather(self, ids_n: Tensor) -> Tensor:
        if ids_n.numel() == 0:
            return self._parts[0].new_empty((0, self.dim))
        if len(self._parts) == 1:
            try:
                return self._parts[0].index_select(0, ids_n)  # which looks at the range itself
            except IndexError:
                self._check_range(ids_n)
                raise
        self._check_range(ids_n)
        # Part by part in numpy, which allocates large arrays with far fewer page faults than torch.
        part_n = ids_n // self._part_rows
        order_n = part_n.argsort()
        local_n = (ids_n - part_n * self._part_rows)[order_n].numpy()
        counts = part_n.bincount(minlength=len(self._parts)).tolist()
        found_nD = np.empty((len(local_n), self.dim), self._arrays[0].dtype)
        first = 0
        for array, count in zip(self._arrays, counts, strict=True):
            if count:
                some = slice(first, first + count)
                found_nD[order_n[some].numpy()] = array.take(local_n[some], axis=0)
            first += count
        return torch.from_numpy(found_nD).view(self.dtype)

    def _check_range(self, ids_n: Tensor) -> None:
        low, high = (int(bound) for bound in ids_n.aminmax())
        if low < 0 or high >= self._count:
            wrong = low if low < 0 else high
            raise IndexError(f"row {wrong} is out of range: there are {self._count}")
