"""Where a prediction comes from: the neighbours of each position, their weights and their text.

Shape suffixes: T position, K neighbour, D hidden dimension, V vocabulary.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from knnlm_hf.capture import capturing
from knnlm_hf.errors import DatastoreError, KNNLMError, SettingError
from knnlm_hf.interpolation import knn_weights, mix_distributions
from knnlm_hf.modeling.mixture import memory_log_probs


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


@dataclass(frozen=True)
class Explanation:
    """What model and memory say at one position."""

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
    memory_log_prob: float
    """log P(predicted) of the memory alone; −inf where no neighbour carries it."""
    neighbours: list[Neighbour] = field(default_factory=list)
    """The nearest entries, nearest first."""


@torch.no_grad()
def explain(knn: Any, input_ids: Any, top: int = 5, tokenizer: Any = None) -> list[Explanation]:
    """Explain the prediction after each token of one text; see `KNNLMForCausalLM.explain`."""
    memory = knn.memory
    if not (hasattr(memory, "search") and hasattr(memory, "store")):
        raise KNNLMError(
            f"this memory ({type(memory).__name__}) has no neighbours to show: expected a KNNMemory"
        )
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise SettingError(f"top is {top!r}, expected a number of neighbours, 1 or more")
    ids_T = torch.as_tensor(input_ids, device=knn.device)
    if ids_T.dim() == 2 and ids_T.shape[0] == 1:
        ids_T = ids_T[0]
    if ids_T.dim() != 1 or not ids_T.numel():
        raise KNNLMError(
            f"input_ids has shape {tuple(ids_T.shape)}, expected one text: (T,) or (1, T), T >= 1"
        )
    return _explain(knn, ids_T, top, tokenizer or getattr(memory.store, "tokenizer", None))


def _explain(knn: Any, ids_T: Tensor, top: int, tokenizer: Any) -> list[Explanation]:
    memory = knn.memory
    with knn.disable_retrieval(), capturing(knn.capture_point) as heard:
        logits = knn(input_ids=ids_T[None], use_cache=False, return_dict=True).logits
    states_BTD = heard.states(1)
    if states_BTD is None:
        raise KNNLMError(f"the forward never reached layer {knn.capture_point.layer!r}")
    states_TD = states_BTD[0]
    lm_TV = log_softmax(logits[0].float(), dim=-1)
    memory_TV = memory_log_probs(states_TD, memory, lm_TV)
    mixed_TV = mix_distributions(lm_TV, memory_TV, knn.lmbda)
    best_T = mixed_TV.argmax(dim=-1)
    near = memory.search(states_TD)
    weights_TK = knn_weights(near.similarity, memory.temperature).exp()
    explanations = []
    for t, best in enumerate(best_T.tolist()):
        following = int(ids_T[t + 1]) if t + 1 < len(ids_T) else None
        hits = zip(weights_TK[t], near.similarity[t], near.ids[t], near.tokens[t], strict=True)
        explanations.append(
            Explanation(
                position=t,
                token=following,
                token_text=_text(tokenizer, following),
                predicted=best,
                predicted_text=_text(tokenizer, best),
                log_prob=float(mixed_TV[t, best]),
                lm_log_prob=float(lm_TV[t, best]),
                memory_log_prob=float(memory_TV[t, best]),
                neighbours=[
                    _neighbour(memory.store, tokenizer, *map(Tensor.item, hit))
                    for hit, _ in zip(hits, range(top), strict=False)
                    if hit[2] >= 0
                ],
            )
        )
    return explanations


def _neighbour(
    store: Any, tokenizer: Any, weight: Any, similarity: Any, entry: Any, token: Any
) -> Neighbour:
    context = None
    if tokenizer is not None:
        with suppress(DatastoreError):  # a subsample has no text around its entries
            context = str(tokenizer.decode(store.context(entry)))
    return Neighbour(
        weight, similarity, entry, token, _text(tokenizer, token), context, store.document(entry)
    )


def _text(tokenizer: Any, token: int | None) -> str | None:
    return None if tokenizer is None or token is None else str(tokenizer.decode([token]))
