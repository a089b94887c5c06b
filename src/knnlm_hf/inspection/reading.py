"""A text as a model and its memories read it: per token, and as a whole."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from knnlm_hf.corpus import documents
from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.inspection.contexts import Contexts
from knnlm_hf.inspection.pieces import pieces, shown
from knnlm_hf.modeling.explain import Explanation, Neighbour, kept_tokenizer
from knnlm_hf.scores import exp
from knnlm_hf.types import check_count


@dataclass(frozen=True)
class Token:
    """A token that was predicted, and what each said of it."""

    number: int
    """Its place in the text; the first token is 0, and is never predicted."""
    id: int
    text: str
    """Its part of the text; "" where a character ends in a later token."""
    lm: float
    """log P of it, the model's, in nats."""
    memory: float
    """The memory's; of several, that of their weighted mean Σ λ_i P_i / Σ λ_i."""
    memories: tuple[float, ...]
    """Of each memory."""
    mixture: float
    guess: str
    """The mixture's likeliest token here."""
    guess_log_prob: float
    neighbours: list[Neighbour]
    """The nearest, and the nearest that carry the token, by memory and rank."""

    @property
    def ratio(self) -> float:
        """log P_memory − log P_LM: above 0 the memory predicted it better."""
        return 0.0 if self.memory == self.lm else self.memory - self.lm

    @property
    def gain(self) -> float:
        """log P_mixture − log P_LM."""
        return self.mixture - self.lm

    @property
    def carriers(self) -> list[Neighbour]:
        """Those neighbours that carry the token."""
        return [near for near in self.neighbours if near.token == self.id]


@dataclass(frozen=True)
class Reading:
    """A text, read."""

    first: str
    """Its first token, which nothing predicts."""
    tokens: list[Token]
    """All others, in order."""
    is_cut: bool
    """Whether the text went on."""
    lmbdas: tuple[float, ...]
    memories: tuple[Any, ...]
    contexts: Contexts

    @property
    def base_perplexity(self) -> float:
        """exp of the mean −log P per token, of the model alone."""
        return self._perplexity(lambda token: token.lm)

    @property
    def memory_perplexity(self) -> float:
        """Of the memory alone; ∞ where it gives a token no probability."""
        return self._perplexity(lambda token: token.memory)

    @property
    def perplexity(self) -> float:
        """Of the mixture."""
        return self._perplexity(lambda token: token.mixture)

    @property
    def oracle_perplexity(self) -> float:
        """If each token took the better of model and memory."""
        return self._perplexity(lambda token: max(token.lm, token.memory))

    def _perplexity(self, log_prob: Callable[[Token], float]) -> float:
        return exp(-math.fsum(map(log_prob, self.tokens)) / len(self.tokens))

    def documents(self) -> list[tuple[int, int | None, int, float]]:
        """Documents by what they gave: (memory, document, tokens carried, share).

        The share of a document in one token is the part of the mixture's probability that comes
        from its entries among `carriers`, λ_i · Σ weights / P(token), and is summed over tokens.
        """
        given: dict[tuple[int, int | None], dict[int, float]] = {}
        for token in self.tokens:
            for near in token.carriers:
                whole = math.exp(max(token.mixture, -700.0))
                share = self.lmbdas[near.memory] * near.weight / whole
                shares = given.setdefault((near.memory, near.document), {})
                shares[token.number] = shares.get(token.number, 0.0) + share
        rows = [(*of, len(shares), math.fsum(shares.values())) for of, shares in given.items()]
        return sorted(rows, key=lambda row: (-row[3], row[:2]))


def read(
    knn: Any,
    text_or_ids: Any,
    tokenizer: Any = None,
    *,
    top: int = 5,
    limit: int = 2048,
    window: int | None = None,
    stride: int | None = None,
) -> Reading:
    """Read a text, or its beginning; see `explanation_page` for the arguments."""
    check_count("top", top)
    if check_count("limit", limit) < 2:
        raise SettingError(f"limit is {limit}, expected 2 tokens or more: the first is only read")
    tokenizer = tokenizer or kept_tokenizer(knn.memories)
    if tokenizer is None:
        raise KNNLMError("no tokenizer was given, and the datastore keeps none: pass tokenizer=…")
    for memory in knn.memories:
        if hasattr(memory, "check_tokenizer"):
            memory.check_tokenizer(tokenizer)
    ids, is_cut = _beginning(knn, text_or_ids, tokenizer, limit)
    texts = pieces(ids, tokenizer)
    # What follows the last token is predicted by nobody here: it has no place in the text.
    explained = knn.explain(ids, top, tokenizer, window, stride)[:-1]
    tokens = [
        _token(said, ids[said.position + 1], texts[said.position + 1], knn.lmbdas)
        for said in explained
    ]
    contexts = Contexts(knn.memories, ids, tokenizer)
    return Reading(texts[0], tokens, is_cut, knn.lmbdas, knn.memories, contexts)


def _beginning(knn: Any, text_or_ids: Any, tokenizer: Any, limit: int) -> tuple[list[int], bool]:
    """The first tokens of a text, `limit` at most, and whether there are more."""
    if isinstance(text_or_ids, Tensor) and text_or_ids.dim() == 2 and len(text_or_ids) == 1:
        text_or_ids = text_or_ids[0]
    config = knn.config.get_text_config(decoder=True)
    ids: list[int] = []
    for piece in documents([text_or_ids], tokenizer, vocab_size=config.vocab_size):
        ids += piece.tokens.tolist()
        if len(ids) > limit:
            return ids[:limit], True
    return ids, False


def _token(said: Explanation, id: int, text: str, lmbdas: Sequence[float]) -> Token:
    own: Any = said.token_log_prob, said.token_lm_log_prob, said.token_memory_log_prob
    mixture, lm, each = own  # not None: only at the text's end nothing follows
    memories = each if isinstance(each, tuple) else (each,)
    return Token(
        number=said.position + 1,
        id=id,
        text=text,
        lm=lm,
        memory=_together(memories, lmbdas),
        memories=memories,
        mixture=mixture,
        guess=shown(said.predicted_text or str(said.predicted)),
        guess_log_prob=said.log_prob,
        neighbours=_ordered(said.neighbours + said.carriers),
    )


def _together(log_probs: Sequence[float], lmbdas: Sequence[float]) -> float:
    """log of the mean of probabilities, weighted by λ; a plain mean where every λ is 0."""
    weights = lmbdas if any(lmbdas) else [1.0] * len(lmbdas)
    terms = [
        log_prob + math.log(weight / math.fsum(weights))
        for log_prob, weight in zip(log_probs, weights, strict=True)
        if weight > 0
    ]
    return functools.reduce(_log_add, terms)


def _log_add(a: float, b: float) -> float:
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _ordered(neighbours: Iterable[Neighbour]) -> list[Neighbour]:
    """Each once, by memory and rank."""
    by_place = {(near.memory, near.rank): near for near in neighbours}
    return [by_place[place] for place in sorted(by_place)]
