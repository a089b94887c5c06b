"""The datastore as a memory that also counts the words before: neighbours that read alike.

A near state may stand after other words, and its next token is then worth less. Xu, He, Neubig and
Hellendoorn (2022, arXiv 2110.02870) give neighbours of the same surroundings (a project, a topic)
a learned bonus; here what is the same is the text just before.

Shape suffixes: Q query, K neighbour, M place before the query, nearest first; S place in a text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from knnlm_hf.datastore import DatastoreReader
from knnlm_hf.errors import KNNLMError
from knnlm_hf.memory.kinds import register
from knnlm_hf.memory.knn import KNNMemory
from knnlm_hf.memory.text import Text
from knnlm_hf.types import Neighbors, check_count, check_match_weight

_LONGEST = 64


@register
class HybridMemory(KNNMemory):
    """`KNNMemory` whose neighbours weigh more the more tokens they share with the query before it.

        p(w | h) = Σ_{i ∈ kNN(h), value_i = w} softmax(s_i / t + γ·m_i)_i

    The search is the same, by the states alone. m_i counts equal tokens from the query's last one
    backwards until the first that differs, `match_length` at most: the weight of an entry is
    multiplied by e^γ for each. γ=0 is `KNNMemory`.

    It has to be shown the text, as `CacheMemory` is: in a forward the tokens given there and, with
    a KV cache, those before, whose states are kept in that cache (D numbers per token). Without a
    text (`log_probs` of bare states, distillation) no entry matches. A text's first token, which is
    the value of no entry, never matches, neither in the datastore nor in the query.

    Args:
        store, k, temperature, metric, index, rescore: as of `KNNMemory`.
        match_length: most tokens that count, 1 to 64.
        match_weight: γ, 0 to 8. 1 is a start; `tune` fits it.

    Raises:
        KNNLMError: the store is a subsample, whose entries lack the text before them; and what
            `KNNMemory` raises.
        SettingError: an argument out of range.
    """

    kind: ClassVar[str] = "hybrid"

    def __init__(
        self,
        store: DatastoreReader | str | Path,
        k: int = 1024,
        temperature: float | None = None,
        metric: str = "l2",
        index: Any = "auto",
        rescore: bool = False,
        *,
        match_length: int = 3,
        match_weight: float = 1.0,
    ) -> None:
        self.size = check_count("match_length", match_length, most=_LONGEST)
        self.match_weight = match_weight
        self._before_QM: Tensor | None = None
        super().__init__(store, k, temperature, metric, index, rescore)
        if self.store.manifest.subsample is not None:
            raise KNNLMError(
                f"{self.store.path}: a subsample keeps single entries, not the text before them: "
                "use the datastore it was drawn from, or a KNNMemory"
            )
        self._room = _room(self.store, match_length)

    def __repr__(self) -> str:
        own = f", match_length={self.match_length}, match_weight={self.match_weight})"
        return super().__repr__().replace("KNNMemory", "HybridMemory", 1)[:-1] + own

    @property
    def match_length(self) -> int:
        """Most tokens that count; as much of a text has to be kept, its `size`."""
        return self.size

    @property
    def match_weight(self) -> float:
        """γ: each shared token multiplies a neighbour's weight by e^γ."""
        return self._match_weight

    @match_weight.setter
    def match_weight(self, match_weight: float) -> None:
        self._match_weight = check_match_weight(match_weight)

    def reading(self, text: Text, rows: Tensor, places: Tensor) -> Self:
        """This memory with a text in front of it, to be asked of some states of that text.

        Args:
            text: as far as it was read, the queries' own states included.
            rows: (Q,) the row of `text` in which each query stands that will be asked, in order.
            places: (Q,) and its place there.
        """
        reader = self._twin()
        reader._before_QM = _before(text, rows.reshape(-1), places.reshape(-1), self.match_length)
        return reader

    def matches(self, ids_QK: Tensor) -> Tensor | None:
        """m of the entries `ids_QK`, (Q, K) uint8, of the queries `reading` was told of.

        None without a text.

        Raises:
            KNNLMError: another number of queries.
        """
        before_QM = self._text_before(len(ids_QK))
        if before_QM is None:
            return None
        if len(ids_QK) == 1 and ids_QK.device.type == "cpu":
            return torch.from_numpy(self._matches_of_one(ids_QK[0].numpy(), before_QM))[None]
        ids_n = ids_QK.to("cpu").reshape(-1)
        alike_QK = (ids_n >= 0).view(ids_QK.shape)
        ids_n = ids_n.clamp(min=0)
        count_QK = torch.zeros(ids_QK.shape, dtype=torch.uint8)
        room_QK = self._room.index_select(0, ids_n).view(ids_QK.shape)
        for back, token_Q in enumerate(before_QM.to("cpu", torch.int32).unbind(1), start=1):
            # Entry i − 1 is the token before entry i's, where both are of one document.
            earlier_n = (ids_n - back).clamp_(min=0)
            value_QK = self.store.values.index_select(0, earlier_n).view(ids_QK.shape)
            alike_QK &= value_QK == token_Q[:, None]
            alike_QK &= room_QK >= back
            count_QK += alike_QK
        return count_QK.to(ids_QK.device)

    def _text_before(self, queries: int) -> Tensor | None:
        """(Q, M) what `reading` was told stands before so many queries; None without a text."""
        if self._before_QM is not None and len(self._before_QM) != queries:
            raise KNNLMError(f"{queries} queries, but {len(self._before_QM)} places in a text")
        return self._before_QM

    def _matches_of_one(self, ids_K: Any, before_1M: Tensor) -> Any:
        """`matches` of one query: all places at a time, by numpy, whose operations are quicker."""
        before_M = before_1M[0].cpu().numpy()
        back_M = np.arange(1, len(before_M) + 1)
        earlier_KM = np.maximum(ids_K[:, None] - back_M, 0)
        alike_KM = self.store.values.numpy().take(earlier_KM) == before_M
        alike_KM &= np.where(ids_K < 0, 0, self._room.numpy().take(ids_K))[:, None] >= back_M
        return np.logical_and.accumulate(alike_KM, axis=1).sum(axis=1, dtype=np.uint8)

    def scored(self, near: Neighbors) -> Tensor:
        """s + t·γ·m, of which the softmax is taken."""
        matches_QK = self.matches(near.ids) if self.match_weight else None
        if matches_QK is None:
            return near.similarity
        return near.similarity + matches_QK * (self.temperature * self.match_weight)

    def _scored_one(self, similarity_K: Any, ids_K: Any) -> Any:
        before_1M = self._text_before(1) if self.match_weight else None
        if before_1M is None:
            return similarity_K
        matches_K = self._matches_of_one(ids_K, before_1M).astype(np.float32)
        return similarity_K + matches_K * np.float32(self.temperature * self.match_weight)

    def _options(self) -> dict[str, Any]:
        own = {"match_length": self.match_length, "match_weight": self.match_weight}
        return super()._options() | own


def _room(store: DatastoreReader, most: int) -> Tensor:
    """(N,) uint8: how many entries of its document stand before each, `most` at most."""
    starts = store.document_starts
    ends = torch.cat([starts[1:], starts.new_tensor([len(store)])])
    room_N = torch.full((len(store),), most, dtype=torch.uint8)
    for place in range(most):
        at = starts + place
        room_N[at[at < ends]] = place
    return room_N


def _before(text: Text, rows_Q: Tensor, places_Q: Tensor, length: int) -> Tensor:
    """(Q, M) the tokens before each query's next one, the last first; −1 where there is none."""
    _, values_BS, parts_BS, _ = text
    if len(places_Q) == 1 and values_BS.device.type == "cpu":
        return _before_one(values_BS, parts_BS, int(rows_Q), int(places_Q), length)
    places_QM = places_Q[:, None] - torch.arange(1, length + 1, device=places_Q.device)
    is_there_QM = places_QM >= 0
    at_QM = rows_Q[:, None], places_QM.clamp(min=0)
    is_there_QM &= parts_BS[at_QM] == parts_BS[rows_Q, places_Q][:, None]
    return values_BS[at_QM].long().masked_fill(~is_there_QM, -1)


def _before_one(values_BS: Tensor, parts_BS: Tensor, row: int, place: int, length: int) -> Tensor:
    """`_before` of one query, by numpy, whose operations are quicker."""
    low = max(0, place - length)
    parts_M = parts_BS[row].numpy()[low : place + 1]
    before_1M = np.full((1, length), -1)
    there = slice(0, place - low)
    before_1M[0, there] = values_BS[row].numpy()[low:place][::-1]
    before_1M[0, there][parts_M[-2::-1] != parts_M[-1]] = -1
    return torch.from_numpy(before_1M)
