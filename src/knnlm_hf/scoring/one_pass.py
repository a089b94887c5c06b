"""One pass of a model over a corpus: what it and its memories say of each batch's new tokens."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from knnlm_hf import capture
from knnlm_hf.corpus import documents
from knnlm_hf.errors import KNNLMError
from knnlm_hf.memory import evidence
from knnlm_hf.memory.text import Reader
from knnlm_hf.modeling import KNNLMForCausalLM
from knnlm_hf.progress import track
from knnlm_hf.scores import TokenScores
from knnlm_hf.scoring.own_entries import OwnEntries, has_entries
from knnlm_hf.types import check_count
from knnlm_hf.windows import Batch, batches, check_window


class OnePass:
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
        for memory in self.scorer.memories:
            if tokenizer is not None and hasattr(memory, "check_tokenizer"):
                memory.check_tokenizer(tokenizer)

    @property
    def words(self) -> int | None:
        """Words of the corpus, where it was text; whole once the pass is over."""
        return self.documents.words

    def __iter__(self) -> Iterator[TokenScores]:
        windows = batches(self.documents, self.window, self.stride, self.batch_size)
        with capture.evaluating(self.model):
            for batch in track(
                windows, "scoring", lambda b: int(b.is_new.sum()), show=self.progress
            ):
                yield self.scorer.score(batch)


class _Scorer:
    """One model with its memories, scoring one batch at a time."""

    def __init__(self, model: Any, exclude_self: bool) -> None:
        self.model = model
        self.memories: tuple[Any, ...] = ()
        self.lmbdas: tuple[float, ...] = ()
        self.points: tuple[capture.CapturePoint, ...] = ()
        if isinstance(model, KNNLMForCausalLM):
            self.memories, self.lmbdas = model.memories, model.lmbdas
            self.points = model.capture_points
        for point in self.points:
            capture.arm(model, point)
        self.readers = [Reader(memory) for memory in self.memories]
        self.own_entries = OwnEntries(self.memories) if exclude_self else None
        accepted = inspect.signature(model.forward).parameters
        self.can_slice = "logits_to_keep" in accepted
        self.has_cache = "use_cache" in accepted

    @torch.no_grad()
    def score(self, batch: Batch) -> TokenScores:
        """What the model and its memories say of the batch's new tokens."""
        is_new_BT = batch.is_new
        targets_N = batch.targets[is_new_BT]
        rows_N, columns_N = is_new_BT.nonzero(as_tuple=True)
        documents_N = batch.documents.int()[rows_N]
        own = self.own_entries
        own_N = None if own is None else own.take(targets_N, documents_N)
        begun = time.perf_counter()
        lm_N, hidden_ND = self._forward(batch, targets_N)
        modelled = time.perf_counter()
        found = []
        for memory, reader, states_ND in zip(self.memories, self.readers, hidden_ND, strict=True):
            asked = reader.read(states_ND, targets_N, documents_N)
            own_n = own_N if has_entries(memory) else None
            found.append(evidence(asked, states_ND, targets_N, own_n).cpu())
        done = time.perf_counter()
        return TokenScores(
            lm_log_probs=lm_N.cpu(),
            tokens=targets_N.int(),
            documents=documents_N,
            context=columns_N.int() + 1,
            memories=tuple(found),
            lmbdas=self.lmbdas,
            model_seconds=modelled - begun,
            memory_seconds=done - modelled,
        )

    def _forward(self, batch: Batch, targets_N: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities of the new predictions, row by row, and the states for each memory."""
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
        heard = [capture.Collector(point) for point in self.points]
        with base(), capture.Listening(heard):
            logits_BtV = self.model(**kwargs).logits
        is_kept_Bt = batch.is_new[:, kept_T]
        lm_N = -functional.cross_entropy(
            logits_BtV[is_kept_Bt.to(logits_BtV.device)].float(),
            targets_N.to(logits_BtV.device),
            reduction="none",
        )
        rows = batch.input_ids.shape[0]
        return lm_N, [_new_states(one, rows, kept_T, is_kept_Bt) for one in heard]


def _new_states(heard: capture.Collector, rows: int, kept_T: Tensor, is_kept_Bt: Tensor) -> Tensor:
    """The states (N, D) of the new predictions among those that were heard."""
    hidden_BtD = heard.states(rows)
    if hidden_BtD is None:
        raise KNNLMError(f"the model's forward never reached its memory's layer {heard.point}")
    if hidden_BtD.shape[1] != is_kept_Bt.shape[1]:  # `final` comes sliced already
        hidden_BtD = hidden_BtD[:, kept_T.to(hidden_BtD.device)]
    return hidden_BtD[is_kept_Bt.to(hidden_BtD.device)]
