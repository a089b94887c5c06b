"""Corpus → TokenScores in one retrieval pass, and the perplexities that come of it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from knnlm_hf import capture
from knnlm_hf.corpus import documents
from knnlm_hf.errors import KNNLMError
from knnlm_hf.interpolation import mix
from knnlm_hf.memory import Evidence, Memory, evidence
from knnlm_hf.modeling import KNNLMForCausalLM
from knnlm_hf.progress import track
from knnlm_hf.scores import TokenScores, exp
from knnlm_hf.types import check_count
from knnlm_hf.windows import Batch, batches, check_window


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

    Only the target's probability is computed on the memory's side: no (tokens, V) tensor. A table
    of N tokens and k neighbours takes 5·N·k bytes.

    Args:
        model: a `KNNLMForCausalLM`, or a plain causal model (then there is no memory to score).
        corpus: as for `Datastore.build`; one item is one document.
        tokenizer: needed where the corpus is text.
        window: input tokens per window; None: the model's longest context.
        stride: new tokens per window, 1 ≤ stride ≤ window, so each token after the first window
            is predicted from at least window − stride others; None: half the window.
        batch_size: windows per forward pass.
        bos: True puts the beginning-of-sequence token before each document.
        exclude_self: the corpus is the datastore's own: entry i is not found by token i.
        progress: show a bar on stderr.

    Raises:
        CorpusError: a missing, empty or unfit corpus. SettingError: window or stride out of range.
    """
    one_pass = _Pass(
        model, corpus, tokenizer=tokenizer, window=window, stride=stride,
        batch_size=batch_size, bos=bos, exclude_self=exclude_self, progress=progress,
    )  # fmt: skip
    return replace(TokenScores.concatenate(list(one_pass)), words=one_pass.words)


@dataclass(frozen=True, kw_only=True)
class PerplexityReport:
    """Perplexities of one corpus; each is exp of a mean over all its tokens."""

    perplexity: float
    """Of the mixture, per token."""
    nll: float
    """Mean negative log-likelihood of the mixture per token, in nats."""
    tokens: int
    """Tokens predicted: all but the first of each document."""
    base_perplexity: float
    """Of the model alone."""
    memory_perplexity: float | None
    """Of the memory alone, ∞ if it gives any token no probability; None without a memory."""
    oracle_perplexity: float | None
    """If each token took the better of model and memory; None without a memory."""
    words: int | None
    """Whitespace-separated words, where the corpus is text."""
    word_perplexity: float | None
    """Of the mixture per word: exp(total nll / words)."""
    base_word_perplexity: float | None
    """Of the model alone per word."""
    tokens_per_second: float
    """Tokens scored per second, everything included."""
    model_seconds: float
    """Of it, in the model."""
    memory_seconds: float
    """Of it, in the memory."""


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
    one_pass = _Pass(
        model, corpus, tokenizer=tokenizer, window=window, stride=stride,
        batch_size=batch_size, bos=bos, exclude_self=exclude_self, progress=progress,
    )  # fmt: skip
    sums = _Sums()
    for part in one_pass:
        sums.add(part)
    return sums.report(one_pass.words, time.perf_counter() - begun)


class _Sums:
    """Running sums of log-likelihoods over parts of a corpus."""

    def __init__(self) -> None:
        self.tokens = 0
        self.has_memory = False
        self.mixture = self.base = self.memory = self.oracle = 0.0
        self.model_seconds = self.memory_seconds = 0.0

    def add(self, part: TokenScores) -> None:
        self.tokens += len(part)
        base = part.lm_log_probs
        self.base += base.double().sum().item()
        self.model_seconds += part.model_seconds
        self.memory_seconds += part.memory_seconds
        self.has_memory = part.has_memory
        mixture = base
        if part.has_memory:
            memory = part.memory_log_probs()
            mixture = mix(base, memory, part.lmbda, part.has_hit)
            self.memory += memory.double().sum().item()
            self.oracle += torch.maximum(base, memory).double().sum().item()
        self.mixture += mixture.double().sum().item()

    def report(self, words: int | None, seconds: float) -> PerplexityReport:
        def perplexity(total: float) -> float:
            return exp(-total / self.tokens)

        def per_word(total: float) -> float | None:
            return exp(-total / words) if words else None

        return PerplexityReport(
            perplexity=perplexity(self.mixture),
            nll=-self.mixture / self.tokens,
            tokens=self.tokens,
            base_perplexity=perplexity(self.base),
            memory_perplexity=perplexity(self.memory) if self.has_memory else None,
            oracle_perplexity=perplexity(self.oracle) if self.has_memory else None,
            words=words,
            word_perplexity=per_word(self.mixture),
            base_word_perplexity=per_word(self.base),
            tokens_per_second=self.tokens / seconds,
            model_seconds=self.model_seconds,
            memory_seconds=self.memory_seconds,
        )


class _Pass:
    """One pass of a model over a corpus: iterate it for the scores of each batch of windows."""

    def __init__(
        self,
        model: Any,
        corpus: Any,
        *,
        tokenizer: Any,
        window: int | None,
        stride: int | None,
        batch_size: int,
        bos: bool | None,
        exclude_self: bool,
        progress: bool,
    ) -> None:
        config = model.config.get_text_config(decoder=True)
        self.model, self.progress = model, progress
        self.window, self.stride = check_window(window, stride, config)
        self.batch_size = check_count("batch_size", batch_size)
        self.documents = documents(
            corpus, tokenizer, vocab_size=config.vocab_size, bos=bos, config=config
        )
        self.scorer = _Scorer(model, exclude_self)
        check_tokenizer = getattr(self.scorer.memory, "check_tokenizer", None)
        if tokenizer is not None and check_tokenizer is not None:
            check_tokenizer(tokenizer)

    @property
    def words(self) -> int | None:
        """Words of the corpus, where it was text; whole once the pass is over."""
        return self.documents.words

    def __iter__(self) -> Iterator[TokenScores]:
        windows = batches(self.documents, self.window, self.stride, self.batch_size)
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in track(
                windows, "scoring", lambda b: int(b.is_new.sum()), show=self.progress
            ):
                yield self.scorer.score(batch)
        finally:
            self.model.train(was_training)


def _new_tokens(batch: Batch) -> int:
    return int(batch.is_new.sum())


class _Scorer:
    """One model with its memory, scoring one batch at a time."""

    def __init__(self, model: Any, exclude_self: bool) -> None:
        self.model = model
        self.memory: Memory | None = None
        self.lmbda, self.point = 0.0, None
        if isinstance(model, KNNLMForCausalLM):
            self.memory, self.lmbda = model.memory, model.lmbda
            self.point = model.capture_point
            capture.arm(model, self.point)
        if exclude_self and self.memory is None:
            raise KNNLMError("exclude_self needs a model with a datastore, found none")
        self.next_entry = 0 if exclude_self else None
        accepted = inspect.signature(model.forward).parameters
        self.can_slice = "logits_to_keep" in accepted
        self.has_cache = "use_cache" in accepted

    def score(self, batch: Batch) -> TokenScores:
        is_new_BT = batch.is_new
        targets_N = batch.targets[is_new_BT]
        rows_N, columns_N = is_new_BT.nonzero(as_tuple=True)
        begun = time.perf_counter()
        lm_N, hidden_ND = self._forward(batch, targets_N)
        modelled = time.perf_counter()
        found = Evidence()
        if self.memory is not None and hidden_ND is not None:
            found = evidence(self.memory, hidden_ND, targets_N, self._own_entries(len(targets_N)))
        done = time.perf_counter()
        return TokenScores(
            lm_log_probs=lm_N.cpu(),
            tokens=targets_N.int(),
            documents=batch.documents.int()[rows_N],
            context=columns_N.int() + 1,
            similarity=_host(found.similarity),
            is_target=_host(found.is_target),
            memory_scores=_host(found.log_probs),
            lmbda=self.lmbda,
            temperature=getattr(self.memory, "temperature", 1.0),
            model_seconds=modelled - begun,
            memory_seconds=done - modelled,
        )

    @torch.no_grad()
    def _forward(self, batch: Batch, targets_N: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and captured states of the batch's new predictions, row by row."""
        device = self.model.device
        kwargs: dict[str, Any] = {"input_ids": batch.input_ids.to(device)}
        if batch.attention_mask is not None:
            kwargs["attention_mask"] = batch.attention_mask.to(device)
        if self.has_cache:
            kwargs["use_cache"] = False
        kept_T = torch.arange(batch.is_new.shape[1])
        if self.can_slice:  # no output layer where no prediction is new
            kept_T = batch.is_new.any(dim=0).nonzero()[:, 0]
            if len(kept_T) < batch.is_new.shape[1]:
                kwargs["logits_to_keep"] = kept_T.to(device)
        base = getattr(self.model, "disable_retrieval", nullcontext)
        listening = nullcontext() if self.point is None else capture.capturing(self.point)
        with base(), listening as heard:
            logits_BtV = self.model(**kwargs).logits
        is_kept_Bt = batch.is_new[:, kept_T]
        lm_N = -functional.cross_entropy(
            logits_BtV[is_kept_Bt.to(logits_BtV.device)].float(),
            targets_N.to(logits_BtV.device),
            reduction="none",
        )
        if heard is None:
            return lm_N, None
        hidden_BtD = heard.states(batch.input_ids.shape[0])
        if hidden_BtD is None:
            raise KNNLMError(f"the model's forward never reached its memory's layer {self.point}")
        if hidden_BtD.shape[1] != is_kept_Bt.shape[1]:  # `final` comes sliced already
            hidden_BtD = hidden_BtD[:, kept_T.to(hidden_BtD.device)]
        return lm_N, hidden_BtD[is_kept_Bt.to(hidden_BtD.device)]

    def _own_entries(self, count: int) -> Tensor | None:
        if self.next_entry is None:
            return None
        self.next_entry += count
        return torch.arange(self.next_entry - count, self.next_entry)


def _host(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.cpu()
