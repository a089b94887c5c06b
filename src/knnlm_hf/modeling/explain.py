"""Where a prediction comes from: the neighbours of each position, their weights and their text.

Shape suffixes: T position, K neighbour, D hidden dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from knnlm_hf.capture import Collector, Listening
from knnlm_hf.errors import DatastoreError, KNNLMError
from knnlm_hf.interpolation import knn_weights
from knnlm_hf.memory.text import Reader, reads
from knnlm_hf.modeling.mixture import memory_answer, mix_answers
from knnlm_hf.types import check_count, one_or_all
from knnlm_hf.windows import check_window, windows

_POSITIONS = 256  # whose distributions over the vocabulary are held at a time


@dataclass(frozen=True)
class Neighbour:
    """One entry of a datastore, or of the text itself, as seen from one position."""

    weight: float
    """Its share of the memory's distribution, in [0, 1]; the weights of all k hits sum to 1."""
    similarity: float
    """−‖q−k‖² or q·k: larger is nearer."""
    entry: int
    """Its number in the datastore; in the text itself the position of its state."""
    token: int
    """The token that followed there."""
    token_text: str | None
    """The same as text, if there is a tokenizer."""
    context: str | None
    """The text around it in its document; None without a tokenizer, or in a subsample."""
    document: int | None
    """The corpus item it comes from; None: it is of the text itself."""
    memory: int = 0
    """Which memory it is of: its number in `knn.memories`."""
    rank: int = 1
    """Its place among the k hits of its memory; 1 is the nearest."""


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
    token_log_prob: float | None = None
    """log P(token) of the mixture; None at the end of the text, as the next two."""
    token_lm_log_prob: float | None = None
    """log P(token) of the model alone."""
    token_memory_log_prob: float | tuple[float, ...] | None = None
    """log P(token) of the memory alone, of several the tuple."""
    neighbours: list[Neighbour] = field(default_factory=list)
    """The entries that weigh most of each memory that has any, heaviest first: of a `KNNMemory` the
    nearest."""
    carriers: list[Neighbour] = field(default_factory=list)
    """Those of all k that carry `token` (at the end of the text: `predicted`), likewise."""


@torch.no_grad()
def explain(
    knn: Any,
    input_ids: Any,
    top: int = 5,
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
) -> list[Explanation]:
    """Explain the prediction after each token of one text; see `KNNLMForCausalLM.explain`."""
    if not any(map(_has_neighbours, knn.memories)):
        kinds = ", ".join(type(memory).__name__ for memory in knn.memories)
        raise KNNLMError(f"this memory ({kinds}) has no neighbours to show: expected a KNNMemory")
    check_count("top", top)
    ids_T = torch.as_tensor(input_ids)
    if ids_T.dim() == 2 and ids_T.shape[0] == 1:
        ids_T = ids_T[0]
    if ids_T.dim() != 1 or not ids_T.numel():
        raise KNNLMError(
            f"input_ids has shape {tuple(ids_T.shape)}, expected one text: (T,) or (1, T), T >= 1"
        )
    size, step = check_window(window, stride, knn.config.get_text_config(decoder=True))
    tokenizer = tokenizer or kept_tokenizer(knn.memories)
    readers = [Reader(memory) for memory in knn.memories]
    explanations: list[Explanation] = []
    for lm_TV, states in _passes(knn, ids_T, size, step):
        first = len(explanations)
        following_T = _following(ids_T, first, len(lm_TV))
        memories = [
            reader.read(states_TD, following_T, torch.zeros_like(following_T))
            for reader, states_TD in zip(readers, states, strict=True)
        ]
        explanations += _explain(memories, knn.lmbdas, lm_TV, states, ids_T, first, top, tokenizer)
    return explanations


def kept_tokenizer(memories: Iterable[Any]) -> Any:
    """The tokenizer that the first datastore keeps which keeps one; None without."""
    stores = (getattr(memory, "store", None) for memory in memories)
    kept = (getattr(store, "tokenizer", None) for store in stores)
    return next((one for one in kept if one is not None), None)


def _has_neighbours(memory: Any) -> bool:
    return hasattr(memory, "search") and (hasattr(memory, "store") or reads(memory))


def _following(ids_T: Tensor, first: int, count: int) -> Tensor:
    """The tokens after `count` positions; −1 after the text's last."""
    following_T = ids_T[first + 1 : first + 1 + count].long()
    return torch.cat([following_T, following_T.new_full((count - len(following_T),), -1)])


class OwnText:
    """The text that is explained, asked as a datastore is of its own."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def context(self, i: int, before: int = 16, after: int = 8) -> list[int]:
        """Token ids around the one after position `i`; see `DatastoreReader.context`."""
        return self.ids[1 + max(0, i - before) : i + after + 2]

    def document(self, i: int) -> None:
        """No item of any corpus."""


def place_name(document: int | None) -> str:
    """What to call the document that a neighbour is of."""
    return "this text" if document is None else f"document {document}"


def origin(memory: Any, ids: list[int]) -> Any:
    """Where a memory's neighbours stand: its datastore, or the text `ids` itself."""
    return memory.store if hasattr(memory, "store") else OwnText(ids)


def _passes(
    knn: Any, ids_T: Tensor, window: int, stride: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Log-probabilities (t, V) and states (t, D) of all positions in order, some at a time."""
    # What follows the last token is predicted too: a stand-in makes it a target.
    for piece in windows([*ids_T.tolist(), 0], 0, window, stride):
        logits_TV, states = _forward(knn, torch.from_numpy(piece.tokens).long().to(knn.device))
        news = [torch.split(each[-piece.new :], _POSITIONS) for each in (logits_TV, *states)]
        for logits_tV, *states in zip(*news, strict=True):
            yield log_softmax(logits_tV.float(), dim=-1), states


def _forward(knn: Any, ids_T: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The model's logits, (T, V), and the states of each memory, (T, D)."""
    heard = [Collector(point) for point in knn.capture_points]
    with knn.disable_retrieval(), Listening(heard):
        logits = knn(input_ids=ids_T[None], use_cache=False, return_dict=True).logits
    states = []
    for one in heard:
        states_BTD = one.states(1)
        if states_BTD is None:
            raise KNNLMError(f"the forward never reached layer {one.point.layer!r}")
        states.append(states_BTD[0])
    return logits[0], states


def _explain(
    memories: list[Any],
    lmbdas: tuple[float, ...],
    lm_TV: Tensor,
    states: list[Tensor],
    ids_T: Tensor,
    first: int,
    top: int,
    tokenizer: Any,
) -> list[Explanation]:
    """Explain the positions from `first` on, as many as `lm_TV` has."""
    answers = [
        memory_answer(states_TD, memory, lm_TV)
        for memory, states_TD in zip(memories, states, strict=True)
    ]
    mixed_TV = mix_answers(lm_TV, answers, lmbdas)

    def said(t: int, token: int) -> tuple[float, float, Any]:
        each = [float(answer.log_probs[t, token]) for answer in answers]
        return float(mixed_TV[t, token]), float(lm_TV[t, token]), one_or_all(each)

    predicted = mixed_TV.argmax(dim=-1).tolist()
    following = ids_T[first + 1 : first + 1 + len(predicted)].tolist()
    wanted = following + predicted[len(following) :]  # the text's last token is followed by none
    hits = _hits(memories, states, wanted, ids_T.tolist(), top, tokenizer)
    explanations = []
    for t, best in enumerate(predicted):
        token = following[t] if t < len(following) else None
        log_prob, lm, memory = said(t, best)
        own: tuple[Any, Any, Any] = (None, None, None) if token is None else said(t, token)
        explanations.append(
            Explanation(
                position=first + t,
                token=token,
                token_text=_text(tokenizer, token),
                predicted=best,
                predicted_text=_text(tokenizer, best),
                log_prob=log_prob,
                lm_log_prob=lm,
                memory_log_prob=memory,
                token_log_prob=own[0],
                token_lm_log_prob=own[1],
                token_memory_log_prob=own[2],
                neighbours=hits[t][0],
                carriers=hits[t][1],
            )
        )
    return explanations


def _hits(
    memories: list[Any],
    states: list[Tensor],
    wanted: list[int],
    ids: list[int],
    top: int,
    tokenizer: Any,
) -> list[tuple[list[Neighbour], list[Neighbour]]]:
    """At each position the heaviest entries of every memory, and the heaviest with `wanted`."""
    hits: list[tuple[list[Neighbour], list[Neighbour]]] = [([], []) for _ in wanted]
    for number, (memory, states_TD) in enumerate(zip(memories, states, strict=True)):
        if not _has_neighbours(memory):
            continue
        store, near = origin(memory, ids), memory.search(states_TD)
        scores_TK = memory.scored(near) if hasattr(memory, "scored") else near.similarity
        weights_TK, ranks_TK = (
            knn_weights(scores_TK, memory.temperature)
            .exp()
            .sort(dim=1, descending=True, stable=True)
        )
        columns = [column.gather(1, ranks_TK).cpu() for column in near]
        columns = [weights_TK.cpu(), *columns, ranks_TK.cpu()]
        for t, (nearest, carriers) in enumerate(hits):
            row = [column[t] for column in columns]
            found = (row[2] >= 0).nonzero()[:top, 0]
            carrying = (row[3] == wanted[t]).nonzero()[:top, 0]
            nearest += _neighbours(store, number, row, found, tokenizer)
            carriers += _neighbours(store, number, row, carrying, tokenizer)
    return hits


def _neighbours(
    store: Any, memory: int, row: list[Tensor], places_K: Tensor, tokenizer: Any
) -> Iterator[Neighbour]:
    """The hits at these places of a row of weights, similarities, ids, tokens and ranks."""
    hits = zip(*(column[places_K].tolist() for column in row), strict=True)
    for weight, similarity, entry, token, rank in hits:
        context = None
        if tokenizer is not None:
            with suppress(DatastoreError):  # a subsample has no text around its entries
                context = str(tokenizer.decode(store.context(entry)))
        yield Neighbour(
            weight,
            similarity,
            entry,
            token,
            _text(tokenizer, token),
            context,
            store.document(entry),
            memory,
            rank + 1,
        )


def _text(tokenizer: Any, token: int | None) -> str | None:
    return None if tokenizer is None or token is None else str(tokenizer.decode([token]))
