"""Indexes of a datastore, or of a part of it, in the workspace: each built once.

Shape suffixes: N entry.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from knnlm_hf.build import Datastore
from knnlm_hf.errors import SearchIndexError
from knnlm_hf.index import SearchIndex, build_index, built_indexes, open_index
from knnlm_hf.study.parts import ChosenRows, cut
from knnlm_hf.study.search import NPROBE, Search, codes_spec
from knnlm_hf.study.study import Study
from knnlm_hf.study.workspace import digest
from knnlm_hf.types import KeyRows


class KeptIndex:
    """One index: built when it is first asked for, found in the workspace afterwards.

    Args:
        study: whose workspace it is kept in, and whose seed it is built with.
        store: the datastore.
        metric: l2 or ip.
        search: what kind, see `study.search`.
        part: only these entries, see `study.parts`; None: all.
    """

    def __init__(
        self, study: Study, store: Datastore, metric: str, search: Search, part: int | None = None
    ) -> None:
        self.study, self.metric, self.search, self.part = study, metric, search, part
        seed = study.settings.seed
        if part is None:
            self.keys: KeyRows = store.keys
            self.values_N = store.values
        else:
            ids_N = cut(len(store), seed)[part]
            self.keys, self.values_N = ChosenRows(store.keys, ids_N), store.values[ids_N]
        self.spec = codes_spec(len(self.keys), store.dim) if search == "codes" else search
        entries: dict[str, Any] = {
            "store": store.digest, "metric": metric, "spec": self.spec,
            "part": None if part is None else {"seed": seed, "part": part},
        }  # fmt: skip
        # An exact index has nothing random but its self-check's sample: one for all seeds.
        self.seed = 0 if search == "exact" else seed
        self.inputs = entries if search == "exact" else entries | {"seed": seed}
        self._digest = digest(entries)
        self.name = "-".join(
            [store.layer, metric, search, *([] if part is None else [f"part{part}"])]
        )

    @property
    def temperature(self) -> float:
        """The temperature that its self-check suggests."""
        ((_, info),) = built_indexes(self._folder)
        return 1.0 if info.temperature is None else info.temperature

    def open(self) -> SearchIndex:
        """The index, ready to search."""
        index = open_index(
            self.keys, self._folder, spec=self.spec, metric=self.metric, digest=self._digest
        )
        if index is None:
            raise SearchIndexError(
                f"{self._folder} holds no index: delete it, and run the study again"
            )
        return index

    @cached_property
    def _folder(self) -> Path:
        return self.study.keep("indexes", self.name, self.inputs, self._build)

    def _build(self, folder: Path) -> None:
        build_index(
            self.keys, self.values_N, folder, self.spec, metric=self.metric, digest=self._digest,
            seed=self.seed, nprobe=NPROBE if self.search == "codes" else None,
            progress=self.study.show,
        )  # fmt: skip
