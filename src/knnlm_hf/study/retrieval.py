"""What a study knows of its neighbours: indexes and searches, each made once, as TokenScores.

Shape suffixes: N entry or token, Q query, K neighbour, D dimension.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knnlm_hf.build import Datastore
from knnlm_hf.errors import SearchIndexError
from knnlm_hf.index import SearchIndex, build_index, open_index
from knnlm_hf.memory import Evidence, KNNMemory
from knnlm_hf.scores import TokenScores
from knnlm_hf.study.forward import Evaluation
from knnlm_hf.study.parts import SIZES, ChosenRows, cut, nearest_of
from knnlm_hf.study.search import (
    NPROBE,
    Found,
    Search,
    codes_spec,
    load_found,
    neighbours,
    save_found,
)
from knnlm_hf.study.study import Split, Study
from knnlm_hf.study.workspace import digest
from knnlm_hf.types import KeyRows


def scores(
    study: Study,
    split: Split,
    *,
    layer: str = "att",
    metric: str = "l2",
    search: Search = "auto",
    real: bool = False,
    part: int | None = None,
    tokens: int | None = None,
    stride: int | None = None,
) -> TokenScores:
    """The kNN scores of a split, searched once and kept: any λ, t and k is arithmetic on them.

    Args:
        study: the model, texts and workspace.
        split: valid or test.
        layer: att or ffn.
        metric: l2 or ip.
        search: which index, see `study.search`.
        real: the true scores of the neighbours that the index found, in place of its own.
        part: search only this part of the datastore, see `study.parts`; None: all of it.
        tokens: score only so many tokens, spread over the evaluation; None: all of them.
        stride: new tokens per window, other than the study's.
    """
    evaluation = study.evaluation(split, stride=stride)
    rows = some_rows(len(evaluation), tokens)
    store = study.store(layer)
    inputs = {
        "evaluation": evaluation.digest, "store": store.digest, "layer": layer, "metric": metric,
        "search": search, "k": study.settings.k, "part": _part_inputs(study, part),
        "tokens": None if rows is None else len(rows),
    }  # fmt: skip

    def make(path: Path) -> None:
        keys, values_N = _entries(study, store, part)
        index = _index(study, store, metric, search, part)
        queries_QD, targets_Q = evaluation.states[layer], evaluation.tokens
        if rows is not None:
            queries_QD, targets_Q = queries_QD[rows], targets_Q[rows]
        found = neighbours(
            index, keys, values_N, queries_QD, targets_Q, study.settings.k,
            device=study.model.device, show=study.show,
        )  # fmt: skip
        save_found(found, path)

    name = "-".join([layer, metric, search, *([f"part{part}"] if part is not None else []), split])
    path = study.keep("neighbours", name, inputs, make)
    found = load_found(path, "real" if real else "index")
    return table(evaluation, found, rows, temperature(study, layer, metric, search, part))


def scores_by_size(study: Study, split: Split, *, layer: str = "att", metric: str = "l2") -> Any:
    """Yield (size, TokenScores) for every size of `parts.SIZES`: each part is searched once."""
    found: Found | None = None
    for part, size in enumerate(SIZES):
        one = scores(study, split, layer=layer, metric=metric, part=part)
        (kept,) = one.memories
        assert kept.similarity is not None
        assert kept.is_target is not None
        mine = kept.similarity, kept.is_target
        found = mine if found is None else nearest_of(found, mine)
        evaluation = study.evaluation(split)
        yield size, table(evaluation, found, None, temperature(study, layer, metric, "auto", 0))


def table(
    evaluation: Evaluation, found: Found, rows: Tensor | None, temperature: float
) -> TokenScores:
    """An evaluation and its neighbours as TokenScores."""
    columns = [
        evaluation.lm_log_probs, evaluation.tokens, evaluation.documents, evaluation.context,
    ]  # fmt: skip
    if rows is not None:
        columns = [column[rows] for column in columns]
    lm_log_probs, tokens, documents, context = columns
    return TokenScores(
        lm_log_probs=lm_log_probs, tokens=tokens, documents=documents, context=context,
        memories=(
            Evidence(similarity=found[0], is_target=found[1], temperature=temperature),
        ), lmbdas=(0.0,),
    )  # fmt: skip


def with_memory(evaluation: Evaluation, log_probs_N: Tensor) -> TokenScores:
    """An evaluation beside any other memory: its log-probability of each token, −inf allowed."""
    return TokenScores(
        lm_log_probs=evaluation.lm_log_probs, tokens=evaluation.tokens,
        documents=evaluation.documents, context=evaluation.context,
        memories=(Evidence(scores=log_probs_N),), lmbdas=(0.0,),
    )  # fmt: skip


def replaced(scores: TokenScores, log_probs_N: Tensor) -> TokenScores:
    """The same tokens beside a memory that gives them these log-probabilities."""
    return replace(scores, memories=(Evidence(scores=log_probs_N),), lmbdas=(0.0,))


def some_rows(count: int, tokens: int | None) -> Tensor | None:
    """Which of `count` tokens to score where only `tokens` may be: runs of 32, spread evenly."""
    if tokens is None or tokens >= count:
        return None
    runs = -(-count // 32)
    wanted = max(1, round(tokens / 32))
    starts = 32 * (torch.arange(wanted) * runs // wanted + runs // (2 * wanted)).clamp(max=runs - 1)
    rows = (starts[:, None] + torch.arange(32)).reshape(-1)
    chosen: Tensor = rows[rows < count]
    return chosen


def exact_tokens(study: Study, layer: str = "att") -> int:
    """Tokens of each split that exact search of the whole datastore may score, at least 32."""
    queries = study.settings.exact_comparisons / max(1, len(study.store(layer)))
    return max(32, int(queries / 2))


def memory(study: Study, temperature: float, layer: str = "att") -> KNNMemory:
    """The kNN memory (l2) that the scores are of: to be asked about other states than theirs."""
    store = study.store(layer)
    index = _index(study, store, "l2", "auto", None)
    return KNNMemory(store, k=study.settings.k, temperature=temperature, index=index)


def temperature(
    study: Study, layer: str, metric: str, search: Search, part: int | None = None
) -> float:
    """The temperature that the self-check of an index suggests."""
    suggested = _index(study, study.store(layer), metric, search, part).temperature
    return 1.0 if suggested is None else suggested


def _part_inputs(study: Study, part: int | None) -> dict[str, Any] | None:
    return None if part is None else {"seed": study.settings.seed, "part": part}


def _entries(study: Study, store: Datastore, part: int | None) -> tuple[KeyRows, Tensor]:
    if part is None:
        return store.keys, store.values
    ids_N = cut(len(store), study.settings.seed)[part]
    return ChosenRows(store.keys, ids_N), store.values[ids_N]


def _index(
    study: Study, store: Datastore, metric: str, search: Search, part: int | None
) -> SearchIndex:
    """The index of a datastore, or of a part of it: built once."""
    keys, values_N = _entries(study, store, part)
    spec: str = search
    if search == "codes":
        spec = codes_spec(len(keys), keys.dim)
    inputs = {
        "store": store.digest, "metric": metric, "spec": spec, "part": _part_inputs(study, part),
    }  # fmt: skip
    identity = digest(inputs)

    def make(path: Path) -> None:
        build_index(
            keys, values_N, path, spec, metric=metric, digest=identity, seed=study.settings.seed,
            nprobe=NPROBE if search == "codes" else None, progress=study.show,
        )  # fmt: skip

    name = "-".join([store.layer, metric, search, *([f"part{part}"] if part is not None else [])])
    path = study.keep("indexes", name, inputs, make)
    index = open_index(keys, path, spec=spec, metric=metric, digest=identity)
    if index is None:
        raise SearchIndexError(f"{path} holds no index: delete it, and run the study again")
    return index
