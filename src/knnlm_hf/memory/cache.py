"""The text itself as a memory: what was just read, searched like a datastore.

The neural cache of Grave, Joulin and Usunier (2017, arXiv 1612.04426), with the datastore's
equation: names and phrases that a text has used before come back. Khandelwal et al. (2020) add one
to kNN-LM (table 2).

Shape suffixes: B text, S place in a text, Q query, K neighbour, D hidden dimension.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.index.base import check_finite, missing
from knnlm_hf.memory.kinds import register
from knnlm_hf.memory.neighbours import NeighbourMemory
from knnlm_hf.memory.text import Text
from knnlm_hf.types import (
    MOST_K,
    Metric,
    Neighbors,
    check_count,
    check_k,
    check_metric,
    check_temperature,
)

_QUERIES = 256
"""Queries compared at a time: with their own `size` entries before them, so S may be any."""


@register
class CacheMemory(NeighbourMemory):
    """The k nearest of the last `size` states of the text being read, each with its next token.

        p(w | h_i) = Σ_{j ∈ kNN(h_i), token_{j+1} = w} softmax(s_ij / t)_j,   i − size ≤ j < i

    It needs no datastore, no training and no file. Its entries are those of the query's own text,
    and none other: rows of a batch, documents of a corpus and packed sequences do not see each
    other. Where the text has just begun it says nothing, and its share is the model's.

    In a forward it reads the tokens given there and, with a KV cache, those given before: its
    states are kept in that cache, so `generate` reorders, crops and drops them with it, and they
    take D numbers per token of it. A model whose state is no `Cache` of transformers (RWKV) is read
    one forward at a time. `score`, `perplexity`, `tune` and `explain` read whole documents, beyond
    the model's window.

    Args:
        hidden_size: D.
        vocab_size: V.
        layer: whose states are compared: `att`, `ffn` or a module path (`final` is known only
            where there are logits, which is not the whole text).
        size: entries of the text that are remembered, ≥ 1.
        k: neighbours per query, ≥ 1.
        temperature: t > 0, in units of the similarity. None: √D, a start; `tune` fits it.
        metric: `l2` or `ip`.

    Raises:
        SettingError: an argument out of range.
    """

    kind: ClassVar[str] = "cache"

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        layer: str = "att",
        size: int = 4096,
        k: int = 1024,
        temperature: float | None = None,
        metric: str = "l2",
    ) -> None:
        self._hidden_size = check_count("hidden_size", hidden_size)
        self._vocab_size = check_count("vocab_size", vocab_size)
        if not isinstance(layer, str):
            raise SettingError(f"layer is {layer!r}, expected a name")
        self._layer = layer
        self.size = check_count("size", size)
        self.metric: Metric = check_metric(metric)
        self.k = k
        self._temperature = None if temperature is None else check_temperature(temperature)
        self._text: Text | None = None
        self._asked: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, model: Any, layer: str = "att", **settings: Any) -> Self:
        """One for the states of `model` at `att` or `ffn`; settings are the constructor's.

        Another layer may have another width: give it to the constructor.
        """
        config = model.config.get_text_config(decoder=True)
        return cls(config.hidden_size, config.vocab_size, layer=layer, **settings)

    def __repr__(self) -> str:
        return (
            f"CacheMemory({self.hidden_size}, {self.vocab_size}, layer={self.layer!r}, "
            f"size={self.size}, k={self.k}, temperature={self._temperature}, "
            f"metric={self.metric!r})"
        )

    @property
    def layer(self) -> str:
        """The layer whose states are compared."""
        return self._layer

    @property
    def hidden_size(self) -> int:
        """D, the width of the states."""
        return self._hidden_size

    @property
    def vocab_size(self) -> int:
        """V of the model."""
        return self._vocab_size

    @property
    def k(self) -> int:
        """Neighbours per query."""
        return self._k

    @k.setter
    def k(self, k: int) -> None:
        self._k = check_k(k, min(self.size, MOST_K))

    def _temperature_from_data(self) -> float:
        return math.sqrt(self.hidden_size)

    @property
    def summary(self) -> str:
        """It in a few words, for cards."""
        return f"the last {self.size:,} tokens of the text itself"

    def reading(self, text: Text, rows: Tensor, places: Tensor) -> Self:
        """This memory with a text in front of it, to be asked of some states of that text.

        Args:
            text: as far as it was read, the queries' own states included.
            rows: (Q,) the row of `text` in which each query stands that will be asked, in order.
            places: (Q,) and its place there: it finds entries before that only.
        """
        reader = copy.copy(self)
        reader._text, reader._asked = text, (rows.reshape(-1), places.reshape(-1))
        return reader

    def search(
        self, queries: Tensor, k: int | None = None, *, exclude: Tensor | None = None
    ) -> Neighbors:
        """The k nearest earlier states of each query's text, nearest first.

        Args:
            queries: (Q, D), those that `reading` was told of. Without a text nothing is found.
            k: neighbours to return; default: the memory's own.
            exclude: not for this memory, whose queries never find themselves.

        Returns:
            `Neighbors` of (Q, k) tensors; `ids` are places in the text, `Text.first` added.

        Raises:
            KNNLMError: states that are not finite, or of another width or number.
        """
        k = self.k if k is None else check_k(k, min(self.size, MOST_K))
        if exclude is not None:
            raise KNNLMError("exclude: a CacheMemory has no entries of a datastore to leave out")
        self._check_queries(queries)
        similarity_QK, ids_QK, tokens_QK = self._found(queries, k)
        more = (0, k - ids_QK.shape[1])
        return Neighbors(
            pad(similarity_QK, more, value=-torch.inf),
            pad(ids_QK, more, value=-1),
            pad(tokens_QK, more, value=-1),
        )

    def _near(self, hidden: Tensor) -> Neighbors:
        queries_QD = hidden.reshape(-1, hidden.shape[-1])
        self._check_queries(queries_QD)
        return self._found(queries_QD, self.k)

    @torch.no_grad()
    def _found(self, queries_QD: Tensor, k: int) -> Neighbors:
        """`search`, no wider than the most that a query finds, but 1."""
        if self._text is None or self._asked is None:
            return _nothing(queries_QD, 1)
        rows_Q, places_Q = self._asked
        if len(rows_Q) != len(queries_QD):
            raise KNNLMError(f"{len(queries_QD)} queries, but {len(rows_Q)} places in the text")
        check_finite(queries_QD)
        rows = sorted(set(rows_Q.tolist()))
        with torch.autocast(queries_QD.device.type, enabled=False):
            if len(rows) == 1 and len(queries_QD) <= _QUERIES:  # while generating
                return self._before(queries_QD, rows[0], places_Q, k)
            near = _nothing(queries_QD, min(k, self._text.keys.shape[1]))
            for row in rows:
                for mine_q in (rows_Q == row).nonzero()[:, 0].split(_QUERIES):
                    found = self._before(queries_QD[mine_q], row, places_Q[mine_q], k)
                    for column_QK, found_qK in zip(near, found, strict=True):
                        column_QK[mine_q, : found_qK.shape[1]] = found_qK
            return near

    def _before(self, queries_QD: Tensor, row: int, places_Q: Tensor, k: int) -> Neighbors:
        """What queries in one row find before them, at most k."""
        assert self._text is not None
        keys_BSD, values_BS, parts_BS, first = self._text
        low = max(0, int(places_Q.min()) - self.size)
        near = slice(low, int(places_Q.max()))
        values_S = values_BS[row, near]
        is_token_S = (values_S >= 0) & (values_S < self.vocab_size)
        ids_S = is_token_S.nonzero()[:, 0] + low
        if not len(ids_S):
            return _nothing(queries_QD, 1)
        values_S = values_BS[row, ids_S]
        is_entry_QS = (ids_S < places_Q[:, None]) & (ids_S >= places_Q[:, None] - self.size)
        is_entry_QS &= parts_BS[row, ids_S] == parts_BS[row, places_Q][:, None]
        similarity_QS = similarities(queries_QD, keys_BSD[row, ids_S], self.metric)
        check_finite(similarity_QS)
        similarity_QS.masked_fill_(~is_entry_QS, -torch.inf)
        similarity_QK, where_QK = similarity_QS.topk(min(k, len(values_S)), dim=1)
        is_missing_QK = similarity_QK == -torch.inf
        return Neighbors(
            similarity_QK,
            (ids_S[where_QK] + first).masked_fill_(is_missing_QK, -1),
            values_S[where_QK].long().masked_fill_(is_missing_QK, -1),
        )

    def settings(self) -> dict[str, Any]:
        """All of it, as plain data."""
        return {
            "kind": self.kind,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "layer": self.layer,
            "size": self.size,
            "k": self.k,
            "temperature": self.temperature,
            "metric": self.metric,
        }

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write nothing: a saved model keeps the settings, and there is nothing else."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **settings: Any,
    ) -> Self:
        """One of these settings; nothing is read from `source`."""
        return cls(**settings)


def _nothing(queries_QD: Tensor, k: int) -> Neighbors:
    """What queries find where there is nothing."""
    similarity_QK, ids_QK = missing(len(queries_QD), k, queries_QD.device)
    return Neighbors(similarity_QK, ids_QK, torch.full_like(ids_QK, -1))


def similarities(queries_QD: Tensor, keys_SD: Tensor, metric: Metric) -> Tensor:
    """(Q, S) float32: −‖q−k‖² or q·k of all pairs, by a matrix product.

    For l2 both are moved to the keys' mean first: the digits of ‖q‖² and ‖k‖² would drown those of
    their difference.
    """
    queries_QD, keys_SD = queries_QD.float(), keys_SD.float()
    if metric == "ip":
        return queries_QD @ keys_SD.T
    centre_D = keys_SD.mean(dim=0) if len(keys_SD) else 0.0
    queries_QD, keys_SD = queries_QD - centre_D, keys_SD - centre_D
    norms_QS = queries_QD.square().sum(1)[:, None] + keys_SD.square().sum(1)
    return (2 * (queries_QD @ keys_SD.T)).sub_(norms_QS).clamp_(max=0)
