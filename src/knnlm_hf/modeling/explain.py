"""Where a prediction comes from: the neighbours of each position, their weights and their text.

Shape suffixes: T position, K neighbour, D hidden dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from knnlm_hf.capture import Collector, listening
from knnlm_hf.errors import DatastoreError, KNNLMError, SettingError
from knnlm_hf.interpolation import knn_weights, mix_distributions
from knnlm_hf.modeling.mixture import memory_log_probs
from knnlm_hf.types import one_or_all


@dataclass(frozen=True)
class Neighbour:
    """One entry of the datastore, as seen from one position."""

    weight: float
    """Its share of the memory's distribution, in [0, 1]; the weights of all k hits sum to 1."""
    similarity: float
    """−‖q−k‖² or q·k: larger is nearer."""
    entry: int
    """Its number in the datastore."""
    token: int
    """The token that followed there."""
    token_text: str | None
    """The same as text, if there is a tokenizer."""
    context: str | None
    """The text around it in its document; None without a tokenizer, or in a subsample."""
    document: int
    """The corpus item it comes from."""
    memory: int = 0
    """Which memory it is of: its number in `knn.memories`."""


@dataclass(frozen=True)
class Explanation:
    """What model and memories say at one position."""

    position: int
    """Of the token after which is predicted, counted from 0."""
    token: int | None
    """The token that follows in the text; None at its end."""
    token_text: str | None
    predicted: int
    """The mixture's likeliest next token."""
    predicted_text: str | None
    log_prob: float
    """log P(predicted) of the mixture, in nats."""
    lm_log_prob: float
    """log P(predicted) of the model alone."""
    memory_log_prob: float | tuple[float, ...]
    """log P(predicted) of the memory alone, of several the tuple; −inf where no neighbour carries
    it."""
    neighbours: list[Neighbour] = field(default_factory=list)
    """The nearest entries of each memory that has any, nearest first."""


@torch.no_grad()
def explain(knn: Any, input_ids: Any, top: int = 5, tokenizer: Any = None) -> list[Explanation]:
    """Explain the prediction after each token of one text; see `KNNLMForCausalLM.explain`."""
    searching = [memory for memory in knn.memories if _has_neighbours(memory)]
    if not searching:
        kinds = ", ".join(type(memory).__name__ for memory in knn.memories)
        raise KNNLMError(f"this memory ({kinds}) has no neighbours to show: expected a KNNMemory")
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise SettingError(f"top is {top!r}, expected a number of neighbours, 1 or more")
    ids_T = torch.as_tensor(input_ids, device=knn.device)
    if ids_T.dim() == 2 and ids_T.shape[0] == 1:
        ids_T = ids_T[0]
    if ids_T.dim() != 1 or not ids_T.numel():
        raise KNNLMError(
            f"input_ids has shape {tuple(ids_T.shape)}, expected one text: (T,) or (1, T), T >= 1"
        )
    return _explain(knn, ids_T, top, tokenizer or getattr(searching[0].store, "tokenizer", None))


def _has_neighbours(memory: Any) -> bool:
    return hasattr(memory, "search") and hasattr(memory, "store")


def _explain(knn: Any, ids_T: Tensor, top: int, tokenizer: Any) -> list[Explanation]:
    lm_TV, states = _forward(knn, ids_T)
    memories_TV = [
        memory_log_probs(states_TD, memory, lm_TV)
        for memory, states_TD in zip(knn.memories, states, strict=True)
    ]
    mixed_TV = mix_distributions(lm_TV, memories_TV, knn.lmbdas)
    found: list[list[Neighbour]] = [[] for _ in ids_T]
    for number, (memory, states_TD) in enumerate(zip(knn.memories, states, strict=True)):
        if _has_neighbours(memory):
            for t, near in enumerate(_neighbours(memory, number, states_TD, top, tokenizer)):
                found[t] += near
    explanations = []
    for t, best in enumerate(mixed_TV.argmax(dim=-1).tolist()):
        following = int(ids_T[t + 1]) if t + 1 < len(ids_T) else None
        explanations.append(
            Explanation(
                position=t,
                token=following,
                token_text=_text(tokenizer, following),
                predicted=best,
                predicted_text=_text(tokenizer, best),
                log_prob=float(mixed_TV[t, best]),
                lm_log_prob=float(lm_TV[t, best]),
                memory_log_prob=one_or_all([float(each_TV[t, best]) for each_TV in memories_TV]),
                neighbours=found[t],
            )
        )
    return explanations


def _forward(knn: Any, ids_T: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The model's log-probabilities, (T, V), and the states of each memory, (T, D)."""
    heard = [Collector(point) for point in knn.capture_points]
    with knn.disable_retrieval(), listening(heard):
        logits = knn(input_ids=ids_T[None], use_cache=False, return_dict=True).logits
    states = []
    for one in heard:
        states_BTD = one.states(1)
        if states_BTD is None:
            raise KNNLMError(f"the forward never reached layer {one.point.layer!r}")
        states.append(states_BTD[0])
    return log_softmax(logits[0].float(), dim=-1), states


def _neighbours(
    memory: Any, number: int, states_TD: Tensor, top: int, tokenizer: Any
) -> Iterator[list[Neighbour]]:
    """The nearest entries of each position."""
    near = memory.search(states_TD)
    weights_TK = knn_weights(near.similarity, memory.temperature).exp()
    columns = weights_TK, near.similarity, near.ids, near.tokens
    for hits in zip(*(column[:, :top].tolist() for column in columns), strict=True):
        yield [
            _neighbour(memory.store, tokenizer, number, *hit)
            for hit in zip(*hits, strict=True)
            if hit[2] >= 0
        ]


def _neighbour(
    store: Any,
    tokenizer: Any,
    memory: int,
    weight: float,
    similarity: float,
    entry: int,
    token: int,
) -> Neighbour:
    context = None
    if tokenizer is not None:
        with suppress(DatastoreError):  # a subsample has no text around its entries
            context = str(tokenizer.decode(store.context(entry)))
    text, document = _text(tokenizer, token), store.document(entry)
    return Neighbour(weight, similarity, entry, token, text, context, document, memory)


def _text(tokenizer: Any, token: int | None) -> str | None:
    return None if tokenizer is None or token is None else str(tokenizer.decode([token]))
