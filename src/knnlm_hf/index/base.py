"""What every index is: keys that can be searched, nearest first."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from knnlm_hf.errors import KNNLMError, SearchIndexError
from knnlm_hf.types import Metric, check_k, check_metric

if TYPE_CHECKING:
    from knnlm_hf.datastore.removal import Removed
    from knnlm_hf.parallel import HandOver

R = TypeVar("R")
_SPARE = 16  # candidates beyond k, and beyond a quarter more, where entries are removed


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """What is known of a built index; kept beside it as `index.json`."""

    spec: str
    """What was asked for: `auto`, `exact` or a factory string."""
    factory: str
    """What was built: `exact` or a factory string, perhaps ending in `Refine(keys)`."""
    metric: Metric
    dim: int
    entries: int
    digest: str
    """Identifies the store's contents that were indexed."""
    nprobe: int | None
    """Inverted lists visited per query; None where the index has no lists."""
    seed: int
    bytes: int
    """Size of the index file."""
    sha256: str
    """Checksum of the index file; empty for `exact`, which has none."""
    built_at: str
    """UTC, ISO 8601."""
    faiss_version: str
    """Empty for `exact`."""
    trained: int
    """Entries that it was trained on, or a sample of them; later ones were only added."""
    self_check: dict[str, float] = field(default_factory=dict)
    """See `selfcheck.self_check`."""

    @property
    def bytes_per_entry(self) -> float:
        """Size of the index file ÷ N."""
        return self.bytes / max(self.entries, 1)

    @property
    def temperature(self) -> float | None:
        """The suggested t, from the self-check's similarities of this index."""
        return self.self_check.get("temperature")

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {**asdict(self), "bytes_per_entry": self.bytes_per_entry}


class SearchIndex(ABC):
    """Keys that can be searched.

    `search` checks and casts once for all kinds; a kind implements `_search` on float32.
    """

    info: IndexInfo | None = None
    """What is known of the index if it was built by `build_index`; None otherwise."""

    scores_are_exact: bool = False
    """Whether similarities are those of the stored keys, and need no rescoring."""

    def __init__(self, metric: str, dim: int) -> None:
        self.metric: Metric = check_metric(metric)
        self.dim = dim

    @abstractmethod
    def __len__(self) -> int:
        """N, the number of keys."""

    @abstractmethod
    def _search(self, queries_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """`search` for float32, finite, contiguous queries; Q ≥ 1."""

    def _search_unordered(self, queries_QD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The same neighbours, for a sum over them; a kind that sorts last need not do it here."""
        return self._search(queries_QD, k)

    @property
    def takes_all_cores(self) -> bool:
        """Whether a search for a single query gains by all cores, which then are not to spare."""
        return False

    @property
    def temperature(self) -> float | None:
        """The temperature that the index's own self-check suggests; None where there is none."""
        return None if self.info is None else self.info.temperature

    def search(
        self,
        queries_QD: Tensor,
        k: int,
        removed: Removed | None = None,
        *,
        ordered: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Find the k nearest keys of each query, nearest first.

        Args:
            queries_QD: (Q, D), of any floating dtype, on any device.
            k: how many, ≥ 1; may exceed N.
            removed: entries that must not be found; the k nearest others are.
            ordered: False where any order of the k will do, which is faster.

        Returns:
            similarity (Q, k) float32, −‖q−k‖² for `l2` and q·k for `ip`; ids (Q, k) int64. Both on
            the queries' device. A missing hit has similarity −inf and id −1, and stands last.

        Raises:
            SettingError: k < 1.
            SearchIndexError: the queries are not (Q, D).
            KNNLMError: the queries are not finite.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.search(queries_QD, k, removed, ordered=ordered)
        k, queries_QD = check_k(k), self._checked(queries_QD)
        if queries_QD.shape[0] == 0:
            return missing(0, k, queries_QD.device)
        if torch.is_autocast_enabled(queries_QD.device.type):
            with torch.autocast(queries_QD.device.type, enabled=False):
                return self.search(queries_QD, k, removed, ordered=ordered)
        if removed is not None:
            return self._search_live(queries_QD, k, removed)
        return self._search(queries_QD, k) if ordered else self._search_unordered(queries_QD, k)

    def search_one(self, query_1D: Tensor, k: int) -> tuple[Any, Any] | None:
        """`search` for one query in a step of generation, among all entries and in any order.

        Args:
            query_1D: (1, D), without gradients.
            k: at least 1, which is not checked again.

        Returns:
            similarity and ids as (K,) arrays; None of a kind that has no shorter way for one.
        """
        return None

    def begin(
        self,
        queries_QD: Tensor,
        k: int,
        removed: Removed | None,
        hand_over: HandOver,
        then: Callable[[Tensor, Tensor], R],
    ) -> Callable[[], R]:
        """Begin a `search` that need not be ordered, and return what waits for its result.

        Args:
            queries_QD, k, removed: as of `search`.
            hand_over: has another thread do it.
            then: makes the result of similarities and ids, in that thread too.
        """
        search = self._prepared(queries_QD, k, removed)
        return hand_over(lambda: then(*search())).result

    def _prepared(
        self, queries_QD: Tensor, k: int, removed: Removed | None
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """What is handed over to `begin` such a search; a kind may do a part of it here."""
        return functools.partial(self.search, queries_QD, k, removed, ordered=False)

    def _checked(self, queries_QD: Tensor) -> Tensor:
        """The queries as float32 one behind the other, or an error of `search`."""
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.dim:
            raise SearchIndexError(
                f"queries have the shape {tuple(queries_QD.shape)}, "
                f"the index holds {self.dim}-d keys: expected (Q, {self.dim})"
            )
        queries_QD = queries_QD.float().contiguous()
        check_finite(queries_QD)
        return queries_QD

    def _search_live(self, queries_QD: Tensor, k: int, removed: Removed) -> tuple[Tensor, Tensor]:
        """`search` among what is not removed, by any index: ask for more until k of them are live.

        A kind that can leave entries out while it searches does better.
        """
        similarity_QK, ids_QK = missing(len(queries_QD), k, queries_QD.device)
        most = min(len(self), k + removed.entries)
        wanted = min(most, k + max(_SPARE, k // 4))
        rows_R = torch.arange(len(queries_QD), device=queries_QD.device)
        while len(rows_R):
            found_RM, found_ids_RM = self._search(queries_QD[rows_R], wanted)
            has_more_R = found_ids_RM[:, -1] >= 0
            is_live_RM = (found_ids_RM >= 0) & ~removed.covers(found_ids_RM)
            found_RM = found_RM.masked_fill(~is_live_RM, -torch.inf)
            found_ids_RM = found_ids_RM.masked_fill(~is_live_RM, -1)
            order_RM = (~is_live_RM).byte().argsort(dim=1, stable=True)[:, :k]  # the dead last
            width = order_RM.shape[1]
            similarity_QK[rows_R, :width] = found_RM.gather(1, order_RM)
            ids_QK[rows_R, :width] = found_ids_RM.gather(1, order_RM)
            if wanted == most:
                break
            rows_R = rows_R[(is_live_RM.sum(dim=1) < k) & has_more_R]
            wanted = min(most, 2 * wanted)
        return similarity_QK, ids_QK


def check_finite(states: Tensor) -> None:
    """Raise `KNNLMError` unless all states to be compared are finite."""
    # A finite sum has finite terms: one operation where almost always one is enough.
    if not math.isfinite(states.sum()) and not states.isfinite().all():
        raise KNNLMError(
            "the hidden states to search with are not finite (NaN or inf): the model overflowed"
            " in its dtype; run it in bfloat16 or float32"
        )


def missing(rows: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Similarities and ids of `rows` queries that found nothing: −inf and −1, (rows, k)."""
    similarity = torch.full((rows, k), -torch.inf, device=device)
    return similarity, torch.full((rows, k), -1, dtype=torch.int64, device=device)
