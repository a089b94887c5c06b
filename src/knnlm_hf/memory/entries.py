"""The entries of a datastore as a training set: shuffled, a part of them held out.

Shape suffixes: Q query (entry), D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from knnlm_hf.datastore import DatastoreReader
from knnlm_hf.errors import KNNLMError
from knnlm_hf.types import is_finite

_RUN = 256  # consecutive entries that are read together
_BUFFER_RUNS = 1024  # runs shuffled with each other: 262,144 entries
_HELD_OUT_EVERY = 50  # of so many runs, one is held out
_MOST_HELD_OUT = 200  # runs


class Batch(NamedTuple):
    """Some entries of a store."""

    keys: Tensor
    """(Q, D) float32."""
    tokens: Tensor
    """(Q,) int64."""
    ids: Tensor
    """(Q,) int64, the numbers of the entries."""


class Entries:
    """The entries of a store in a shuffled order, a part of them held out.

    Runs of consecutive entries are read in random order into a buffer, which is shuffled: each read
    is sequential, memory is one buffer, and an entry's batch is drawn from hundreds of places.
    """

    def __init__(self, store: DatastoreReader, seed: int) -> None:
        live = store.live
        if live < 2:
            raise KNNLMError(f"{store.path} has {live} entries, expected 2 or more to train")
        self.store, self.seed = store, seed
        # Runs of live entries: those of removed documents are skipped as if they were not there.
        starts = torch.arange(0, live, min(_RUN, max(1, live // 8)))
        self.run = int(starts[1] - starts[0]) if len(starts) > 1 else live
        order = starts[torch.randperm(len(starts), generator=self._generator(-1))]
        held = min(_MOST_HELD_OUT, max(1, len(starts) // _HELD_OUT_EVERY))
        self.held_out_runs, self.runs = order[:held], order[held:]

    def __len__(self) -> int:
        """Entries trained on."""
        return len(self._ids(self.runs))

    @property
    def trained_ids(self) -> Tensor:
        """(n,) int64, the numbers of the entries that are trained on."""
        return self._ids(self.runs)

    @property
    def held_out_ids(self) -> Tensor:
        """(n,) int64, the numbers of the held-out entries."""
        return self._ids(self.held_out_runs)

    def epoch(self, number: int, batch_size: int) -> Iterator[Batch]:
        """Batches of all entries trained on, in an order of this epoch's own."""
        generator = self._generator(number)
        runs = self.runs[torch.randperm(len(self.runs), generator=generator)]
        left = torch.empty(0, dtype=torch.int64)
        for part in torch.split(runs, _BUFFER_RUNS):
            ids = torch.cat([left, self._ids(part)])
            ids = ids[torch.randperm(len(ids), generator=generator)]
            whole = len(ids) - len(ids) % batch_size
            for start in range(0, whole, batch_size):
                yield self._read(ids[start : start + batch_size])
            left = ids[whole:]
        if len(left):
            yield self._read(left)

    def held_out(self, batch_size: int) -> Iterator[Batch]:
        """Batches of the held-out entries."""
        for batch in torch.split(self.held_out_ids, batch_size):
            yield self._read(batch)

    def _ids(self, runs: Tensor) -> Tensor:
        ranks = (runs[:, None] + torch.arange(self.run)).reshape(-1)
        return self.store.nth_live(ranks[ranks < self.store.live])

    def _read(self, ids_Q: Tensor) -> Batch:
        keys_QD = self.store.keys[ids_Q].float()
        if not is_finite(keys_QD):
            raise KNNLMError(f"{self.store.path}: a key is not finite: build the store again")
        return Batch(keys_QD, self.store.values[ids_Q].long(), ids_Q)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number + 1)
