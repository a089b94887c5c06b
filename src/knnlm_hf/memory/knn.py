"""The datastore as a memory: M · softmax(mask_k(W_ds ⊗ h_ds) / t)."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from knnlm_hf.datastore import DatastoreReader
from knnlm_hf.errors import KNNLMError, SearchIndexError, SettingError
from knnlm_hf.index import (
    ExactIndex,
    SearchIndex,
    available_memory,
    open_index,
    rescore,
    wrap_index,
)
from knnlm_hf.interpolation import Few, default_temperature, few_of, said_by_all
from knnlm_hf.memory.kinds import register
from knnlm_hf.memory.knn_files import KNNFiles
from knnlm_hf.memory.neighbours import NeighbourMemory
from knnlm_hf.parallel import HandOver
from knnlm_hf.types import Metric, Neighbors, check_k, check_metric, check_temperature

_log = logging.getLogger(__name__)
_CUSTOM = "custom"
_MANY_ENTRIES = 1_000_000  # above this, exact search without having been asked for is worth a word


@register
class KNNMemory(KNNFiles, NeighbourMemory):
    """The k nearest entries of a datastore, as a distribution over their next tokens.

        p(w | h) = Σ_{i ∈ kNN(h), value_i = w} softmax(s_i / t)_i,   s_i = −‖h − key_i‖² or h·key_i

    The three mask × score modes of the paper (section 6): index mask and index score (any
    approximate `index`), index mask and real score (`rescore=True`), real mask and real score
    (`index="exact"`).

    Args:
        store: a datastore, its path, or its Hub dataset id.
        k: neighbours per query, ≥ 1; the paper uses 1024.
        temperature: t > 0, in units of the similarity. None: from the index's self-check (see
            `interpolation.default_temperature`); `tune` fits it.
        metric: `l2` (similarity −‖q−k‖²) or `ip` (q·k). Their temperatures are not comparable.
        index: `auto` (the store's built index of that metric, exact search if there is none),
            `exact`, a FAISS factory string that was built, a `SearchIndex`, or a `faiss.Index`
            whose ids are the store's entry numbers.
        rescore: replace the index's similarities by the true ones, from the stored keys.

    Raises:
        SettingError: k, temperature or metric out of range.
        DatastoreError: the store is missing, unfinished or damaged.
        SearchIndexError: the index is missing, stale, of another metric or another size.
    """

    kind: ClassVar[str] = "knn"

    def __init__(
        self,
        store: DatastoreReader | str | Path,
        k: int = 1024,
        temperature: float | None = None,
        metric: str = "l2",
        index: Any = "auto",
        rescore: bool = False,
    ) -> None:
        self.metric: Metric = check_metric(metric)
        if temperature is not None:
            temperature = check_temperature(temperature)
        self.store = store if isinstance(store, DatastoreReader) else DatastoreReader.open(store)
        self.k = k
        self.rescore = rescore
        self.index_name = index if isinstance(index, str) else _CUSTOM
        try:
            self.index = self._find_index(index)
        except SearchIndexError:
            grown = store if isinstance(store, DatastoreReader) else DatastoreReader.open(store)
            if grown.manifest.shards == self.store.manifest.shards:
                raise
            self.store = grown  # in between
            self.index = self._find_index(index)
        if self.rescore or self.index.scores_are_exact:
            self._prefetch_keys()
        self._temperature = temperature
        self._found_later: Callable[[], Neighbors] | None = None

    def __repr__(self) -> str:
        return (
            f"KNNMemory({str(self.store.path)!r}, k={self.k}, temperature={self._temperature}, "
            f"metric={self.metric!r}, index={self.index_name!r}, rescore={self.rescore})"
        )

    @property
    def layer(self) -> str:
        """The layer whose states are the keys."""
        return self.store.layer

    @property
    def hidden_size(self) -> int:
        """D, the width of the keys."""
        return self.store.dim

    @property
    def vocab_size(self) -> int:
        """V of the model that built the store."""
        return self.store.vocab_size

    @property
    def k(self) -> int:
        """Neighbours per query."""
        return self._k

    @k.setter
    def k(self, k: int) -> None:
        self._k = check_k(k, len(self.store))

    def search(
        self, queries: Tensor, k: int | None = None, *, exclude: Tensor | None = None
    ) -> Neighbors:
        """The k nearest entries of each query, nearest first.

        Args:
            queries: (Q, D), any float dtype and device.
            k: neighbours to return; default: the memory's own.
            exclude: (Q,) entry numbers (−1: none). A query that comes from the datastore's own
                text must not find itself; it is dropped by number, not by rank.

        Returns:
            `Neighbors` of (Q, k) tensors on the queries' device; missing hits −inf, −1, −1.
            Entries of removed documents are never among them.
        """
        return self._found(queries, self.k if k is None else check_k(k, len(self.store)), exclude)

    def searching(self, hidden: Tensor, hand_over: HandOver) -> Self:
        """This memory, the neighbours of some states (..., D) being found, to be asked of those.

        What has to wait for them waits when it is asked. No text is needed for the search.

        Args:
            hidden: the states.
            hand_over: has another thread do the long part.
        """
        queries = hidden.reshape(-1, hidden.shape[-1])
        self._check_queries(queries)

        def neighbours(similarity_QK: Tensor, ids_QK: Tensor) -> Neighbors:
            similarity_QK = self._rescored(queries, similarity_QK, ids_QK)
            return Neighbors(similarity_QK, ids_QK, self._tokens(ids_QK))

        twin = self._twin()
        twin._found_later = self.index.begin(
            queries, self.k, self.store.removed, hand_over, neighbours
        )
        return twin

    def _twin(self) -> Self:
        """A copy to be asked of some states; what is taken from the data is taken here, once."""
        self._temperature = self.temperature
        return copy.copy(self)

    def _near(self, hidden: Tensor) -> Neighbors:
        if self._found_later is not None:
            return self._found_later()
        if type(self).search is not KNNMemory.search:  # somebody's own, to be seen here too
            return super()._near(hidden)
        return self._found(hidden.reshape(-1, hidden.shape[-1]), self.k, ordered=False)

    def said_of_one(self, hidden: Tensor) -> Few | Tensor:
        """As of any memory; in arrays from end to end where the index finds them so."""
        found, queries = None, hidden.detach().reshape(-1, hidden.shape[-1])
        self._check_queries(queries)
        is_own = type(self).__module__.startswith(f"{__package__}.")  # no ways of somebody's
        is_usual = is_own and isinstance(self.index, SearchIndex) and len(queries) == 1
        is_all = self._found_later is None and not self.rescore and self.store.removed is None
        if is_usual and is_all:
            found = self.index.search_one(queries, self.k)
        if found is None:
            return super().said_of_one(hidden)
        similarity_K, ids_K = found
        score_K, tokens_K = self._scored_one(similarity_K, ids_K), self._values(ids_K)
        few = few_of(score_K, tokens_K, self.temperature, self.vocab_size)
        if few is not None:
            return few
        found_1K = torch.from_numpy(score_K)[None], torch.from_numpy(tokens_K)[None]
        log_probs_1V = said_by_all(*found_1K, self.temperature, self.vocab_size)
        return log_probs_1V.view(*hidden.shape[:-1], self.vocab_size)

    def _scored_one(self, similarity_K: Any, ids_K: Any) -> Any:
        """`scored` of one query, in arrays."""
        return similarity_K

    def _found(
        self, queries: Tensor, k: int, exclude: Tensor | None = None, ordered: bool = True
    ) -> Neighbors:
        """`search`; of those that are not `ordered` none is left out, so `exclude` is None."""
        self._check_queries(queries)
        wanted = k if exclude is None else k + 1
        similarity_QK, ids_QK = self.index.search(
            queries, wanted, self.store.removed, ordered=ordered
        )
        similarity_QK = self._rescored(queries, similarity_QK, ids_QK)
        if exclude is not None:
            is_self_QK = ids_QK == exclude.to(ids_QK.device)[:, None]
            similarity_QK = similarity_QK.masked_fill(is_self_QK, -torch.inf)
            ids_QK = ids_QK.masked_fill(is_self_QK, -1)
        if exclude is not None or (self.rescore and ordered):
            similarity_QK, order_QK = similarity_QK.sort(dim=1, descending=True, stable=True)
            similarity_QK, ids_QK = similarity_QK[:, :k], ids_QK.gather(1, order_QK[:, :k])
        return Neighbors(similarity_QK, ids_QK, self._tokens(ids_QK))

    def _rescored(self, queries: Tensor, similarity_QK: Tensor, ids_QK: Tensor) -> Tensor:
        """The similarities, true ones where `rescore` asks for them and the index has none."""
        if not self.rescore or self.index.scores_are_exact:
            return similarity_QK
        return rescore(queries, ids_QK, self.store.keys, self.metric)

    def check_model(self, model: Any) -> None:
        """Raise `ModelMismatchError` unless the store was built with (a cast of) this model."""
        self.store.check_model(model)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise `ModelMismatchError` unless the store's text was read with this tokenizer."""
        self.store.check_tokenizer(tokenizer)

    def settings(self) -> dict[str, Any]:
        """Everything but the store, as plain data: what `save_pretrained` keeps.

        Raises:
            KNNLMError: the index is an object that this memory was given, not one of the store's.
        """
        return {"kind": self.kind, **self._options(), "temperature": self.temperature}

    def _options(self) -> dict[str, Any]:
        """Of the constructor."""
        return {
            "k": self.k,
            "temperature": self._temperature,
            "metric": self.metric,
            "index": self._named_index(),
            "rescore": self.rescore,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return copy.copy(self)

    def __copy__(self) -> Self:
        """A second memory with settings of its own on the same store and index."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as its store's path and settings; the other process opens the files itself."""
        make = functools.partial(type(self), str(self.store.path.resolve()), **self._options())
        return make, ()

    def _named_index(self) -> str:
        if self.index_name == _CUSTOM:
            raise KNNLMError(
                "this memory was given an index object, which cannot be saved or pickled with it: "
                "build one in the store with store.build_index(...) and name it"
            )
        return self.index_name

    def _find_index(self, index: Any) -> SearchIndex:
        if not isinstance(index, str):
            return wrap_index(index, self.metric, entries=len(self.store), dim=self.store.dim)
        if index == "exact":
            return ExactIndex(self.store.keys, self.metric)
        built = open_index(
            self.store.keys,
            self.store.path / "indexes",
            spec=index,
            metric=self.metric,
            digest=self.store.manifest.rows_digest,
        )
        if built is not None:
            return built
        if index != "auto":
            raise SearchIndexError(
                f"{self.store.path} has no index {index!r} for metric {self.metric!r}: build it "
                f"with store.build_index({index!r}, metric={self.metric!r}), or use index='exact'"
            )
        if len(self.store) > _MANY_ENTRIES:
            _log.warning(
                "%s has no index for metric %r: searching its %d entries exactly, which is slow. "
                "Build one with store.build_index('auto', metric=%r).",
                self.store.path, self.metric, len(self.store), self.metric,
            )  # fmt: skip
        return ExactIndex(self.store.keys, self.metric)

    def _prefetch_keys(self) -> None:
        """Bring the keys into memory where they fit: rescoring reads them in random order."""
        size = len(self.store) * self.store.dim * self.store.dtype.itemsize
        if size < available_memory() / 2:
            self.store.keys.prefetch()

    def _tokens(self, ids_QK: Tensor) -> Tensor:
        """The values of the entries `ids_QK`; −1 for a missing hit, never the last entry's."""
        on_host_QK = ids_QK.to("cpu")
        if len(on_host_QK) == 1:  # where numpy's operations are the quicker ones
            return torch.from_numpy(self._values(on_host_QK.numpy())).to(ids_QK.device)
        has_missing = on_host_QK.numel() > 0 and int(on_host_QK.min()) < 0
        known_QK = on_host_QK.clamp(min=0) if has_missing else on_host_QK
        tokens_n = self.store.values.index_select(0, known_QK.reshape(-1)).long()
        tokens_QK = tokens_n.view_as(on_host_QK)
        if has_missing:
            tokens_QK.masked_fill_(on_host_QK < 0, -1)
        return tokens_QK.to(ids_QK.device)

    def _values(self, ids: Any) -> Any:
        """`_tokens` of an array of ids."""
        tokens = self.store.values.numpy().take(ids).astype(np.int64)
        if ids.size and ids.min() < 0:
            tokens[ids < 0] = -1
        return tokens

    def _temperature_from_data(self) -> float:
        info = self.index.info
        if info is not None and info.temperature is not None:
            return float(info.temperature)
        if self.store.live < 2:
            return 1.0
        generator = torch.Generator().manual_seed(0)
        sample_Q = self.store.nth_live(torch.randint(self.store.live, (64,), generator=generator))
        near = self.search(self.store.keys[sample_Q].float(), exclude=sample_Q)
        try:
            return check_temperature(default_temperature(near.similarity))
        except SettingError as error:
            raise KNNLMError(
                f"no temperature can be taken from {self.store.path}: give one ({error})"
            ) from error
