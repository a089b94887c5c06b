"""What a study knows of its neighbours: searches, each made once, as TokenScores.

Shape suffixes: N token, Q query, K neighbour, D dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from knnlm_hf.memory import Evidence, KNNMemory
from knnlm_hf.scores import TokenScores
from knnlm_hf.study.forward import Evaluation
from knnlm_hf.study.indexes import KeptIndex
from knnlm_hf.study.parts import SIZES, nearest_of
from knnlm_hf.study.search import Found, Search, load_found, neighbours, save_found
from knnlm_hf.study.study import Split, Study


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
    index = KeptIndex(study, study.store(layer), metric, search, part)
    inputs = {
        "evaluation": evaluation.digest, "index": index.inputs, "layer": layer,
        "k": study.settings.k, "tokens": None if rows is None else len(rows),
    }  # fmt: skip

    def make(path: Path) -> None:
        queries_QD, targets_Q = evaluation.states[layer], evaluation.tokens
        if rows is not None:
            queries_QD, targets_Q = queries_QD[rows], targets_Q[rows]
        found = neighbours(
            index.open(), index.keys, index.values_N, queries_QD, targets_Q, study.settings.k,
            device=study.model.device, show=study.show,
        )  # fmt: skip
        save_found(found, path)

    path = study.keep("neighbours", f"{index.name}-{split}", inputs, make)
    found = load_found(path, "real" if real else "index")
    return table(evaluation, found, rows, index.temperature)


def scores_by_size(
    study: Study, split: Split, *, layer: str = "att", metric: str = "l2"
) -> Iterator[tuple[float, TokenScores]]:
    """Yield (size, TokenScores) for every size of `parts.SIZES`: each part is searched once."""
    found: Found | None = None
    evaluation = study.evaluation(split)
    t = temperature(study, layer, metric, "auto", 0)
    for part, size in enumerate(SIZES):
        (one,) = scores(study, split, layer=layer, metric=metric, part=part).memories
        assert one.similarity is not None
        assert one.is_target is not None
        mine = one.similarity, one.is_target
        found = mine if found is None else nearest_of(found, mine)
        yield size, table(evaluation, found, None, t)


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
    index = KeptIndex(study, store, "l2", "auto").open()
    return KNNMemory(store, k=study.settings.k, temperature=temperature, index=index)


def temperature(
    study: Study, layer: str, metric: str, search: Search, part: int | None = None
) -> float:
    """The temperature that the self-check of an index suggests."""
    return KeptIndex(study, study.store(layer), metric, search, part).temperature
