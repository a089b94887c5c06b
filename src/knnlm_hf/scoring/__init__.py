"""Corpus → TokenScores in one retrieval pass, and the perplexities that come of it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from knnlm_hf.scores import TokenScores
from knnlm_hf.scoring.one_pass import OnePass
from knnlm_hf.scoring.report import PerplexityReport, Sums

__all__ = ["PerplexityReport", "perplexity", "score"]


def score(
    model: Any,
    corpus: Any,
    *,
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    bos: bool | None = None,
    exclude_self: bool = False,
    progress: bool = True,
) -> TokenScores:
    """Score every token of a corpus but the first of each document, exactly once.

    Only the target's probability is computed on the memory's side: no (tokens, V) tensor. Every
    memory is asked once and its evidence kept; a table of N tokens and k neighbours takes 5·N·k
    bytes.

    Args:
        model: a `KNNLMForCausalLM`, or a plain causal model (then there is no memory to score).
        corpus: as for `Datastore.build`; one item is one document.
        tokenizer: needed where the corpus is text.
        window: input tokens per window; None: the model's longest context.
        stride: new tokens per window, 1 ≤ stride ≤ window, so each token after the first window
            is predicted from at least window − stride others; None: half the window.
        batch_size: windows per forward pass.
        bos: True puts the beginning-of-sequence token before each document.
        exclude_self: the corpus is the datastore's own (of several memories: of every one that
            searches), or whole documents from its beginning, removed ones too: entry i is not found
            by token i.
        progress: show a bar on stderr.

    Raises:
        CorpusError: a missing, empty or unfit corpus. SettingError: window or stride out of range.
        KNNLMError: `exclude_self` with another corpus than the store's, or with a subsample.
    """
    one_pass = OnePass(
        model, corpus, tokenizer=tokenizer, window=window, stride=stride,
        batch_size=batch_size, bos=bos, exclude_self=exclude_self, progress=progress,
    )  # fmt: skip
    return replace(TokenScores.concatenate(list(one_pass)), words=one_pass.words)


def perplexity(
    model: Any,
    corpus: Any,
    *,
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    bos: bool | None = None,
    exclude_self: bool = False,
    progress: bool = True,
) -> PerplexityReport:
    """Perplexity of a corpus under the mixture, the model and the memory, side by side.

    Like `score`, whose options it takes, but keeps sums only: its memory does not grow with the
    corpus. Sums are over all tokens, in float64: no mean of means, no dropped tail.
    """
    begun = time.perf_counter()
    one_pass = OnePass(
        model, corpus, tokenizer=tokenizer, window=window, stride=stride,
        batch_size=batch_size, bos=bos, exclude_self=exclude_self, progress=progress,
    )  # fmt: skip
    sums = Sums()
    for part in one_pass:
        sums.add(part)
    return sums.report(one_pass.words, time.perf_counter() - begun)
