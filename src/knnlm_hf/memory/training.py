"""Train a memory on a datastore: its keys and values are the training set, no model is run.

One recipe for every head: AdamW without weight decay, cosine schedule with a short warm-up,
held-out entries for early stopping. Everything random follows from the seed.

Shape suffixes: Q query (entry), D dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knnlm_hf.datastore import DatastoreReader
from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.memory.checkpoint import Checkpoint
from knnlm_hf.memory.entries import Batch, Entries
from knnlm_hf.memory.recipe import DTYPES, Recipe, Trained
from knnlm_hf.memory.schedule import cosine_rate
from knnlm_hf.progress import bar

_PROGRESS = ("epoch", "done", "stale", "best_loss")  # of a checkpoint


def train(
    head: nn.Module,
    store: DatastoreReader,
    recipe: Recipe,
    *,
    loss: Callable[[Batch], Tensor] | None = None,
    teacher: dict[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Trained:
    """Train `head` in place on the entries of `store`; leave it with its best weights.

    Args:
        head: a module; `head(keys, tokens)` is its mean loss in nats, unless `loss` is given.
        store: keys and values.
        recipe: how.
        loss: what is trained on instead, of a batch on the head's device (its `ids` stay on the
            CPU); held-out loss stays the head's own.
        teacher: plain data that says what `loss` was distilled from; kept in `Trained`.
        checkpoint: folder to write after every epoch and to continue from, with the same recipe
            and store. It stays when training is over, and the same call then does nothing but take
            its weights; remove the folder once the head is saved.
        progress: show loss and perplexity on stderr.

    Raises:
        KNNLMError: keys that are not finite, a loss that is not, a checkpoint of something else.
    """
    recipe.check()
    entries = Entries(store, recipe.seed)
    run = _Run(head, entries, recipe, teacher, checkpoint)
    objective = loss or (lambda batch: head(batch.keys, batch.tokens))
    with _sampling(head, recipe.negatives), bar(progress) as shown:
        task = shown.add_task("training", total=recipe.epochs * len(entries), rate="")
        shown.advance(task, run.epoch * len(entries))
        while run.epoch < recipe.epochs and run.stale < recipe.patience:
            head.train()
            torch.manual_seed(recipe.seed + run.epoch)  # dropout of a resumed run
            for batch in entries.epoch(run.epoch, recipe.batch_size):
                value = run.step(objective, batch)
                shown.advance(task, len(batch.ids))
                perplexity = math.exp(min(value, 700))
                shown.update(task, rate=f"loss {value:.3f} · perplexity {perplexity:,.1f}")
            run.end_epoch()
    return run.finish(store)


@contextmanager
def _sampling(head: nn.Module, negatives: int | None) -> Iterator[None]:
    """Inside the block the head's training loss takes in so many other tokens."""
    if negatives is None:
        yield
        return
    if not hasattr(head, "negatives"):
        raise SettingError(
            f"a {type(head).__name__} has no sampled loss: leave negatives out (found {negatives})"
        )
    with_negatives: Any = head
    with_negatives.negatives = negatives
    try:
        yield
    finally:
        with_negatives.negatives = None


class _Run:
    """The state of one training: weights, optimizer, schedule, best so far."""

    def __init__(
        self,
        head: nn.Module,
        entries: Entries,
        recipe: Recipe,
        teacher: dict[str, Any] | None,
        checkpoint: str | Path | None,
    ) -> None:
        self.head, self.entries, self.recipe, self.teacher = head, entries, recipe, teacher
        self.parameters = dict(head.named_parameters())
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), recipe.lr, weight_decay=0.0, fused=True
        )
        self.steps = recipe.epochs * math.ceil(len(entries) / recipe.batch_size)
        self.epoch = self.done = self.stale = 0
        self.best_loss = math.inf
        self.best: dict[str, Tensor] = {}
        self.checkpoint = None
        if checkpoint is not None:
            identity = {
                "recipe": asdict(recipe),
                "store": entries.store.digest,
                "parameters": {name: list(p.shape) for name, p in self.parameters.items()},
                "teacher": teacher,
            }
            self.checkpoint = Checkpoint(checkpoint, identity, self.parameters, self.optimizer)
            self._resume(self.checkpoint)

    def step(self, objective: Callable[[Batch], Tensor], batch: Batch) -> float:
        """One optimizer step; return its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * cosine_rate(self.done, self.steps, self.recipe.warmup)
        with self._autocast():
            loss = objective(self._here(batch))
        if not bool(loss.isfinite()):
            raise KNNLMError(
                f"the loss became {loss.item()} at step {self.done}: use a smaller lr than "
                f"{self.recipe.lr}"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return float(loss.item())

    def end_epoch(self) -> None:
        """Measure on the held-out entries, keep the best weights, write the checkpoint."""
        self.epoch += 1
        loss = held_out_loss(self.head, self.entries, self.recipe.batch_size)
        self.stale = 0 if loss < self.best_loss else self.stale + 1
        if loss < self.best_loss:
            self.best_loss = loss
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        if self.checkpoint is not None:
            progress = {name: getattr(self, name) for name in _PROGRESS}
            self.checkpoint.save(self.epoch, progress, self.best)

    def finish(self, store: DatastoreReader) -> Trained:
        """Put the best weights into the head."""
        with torch.no_grad():
            for name, best in self.best.items():
                self.parameters[name].copy_(best)
        self.head.eval()
        entries, teacher = len(self.entries), self.teacher
        return Trained(self.recipe, self.epoch, self.best_loss, entries, store.digest, teacher)

    def _resume(self, checkpoint: Checkpoint) -> None:
        found = checkpoint.load()
        if found is not None:
            progress, self.best = found
            for name in _PROGRESS:
                setattr(self, name, progress[name])

    def _here(self, batch: Batch) -> Batch:
        return Batch(batch.keys.to(self.device), batch.tokens.to(self.device), batch.ids)

    def _autocast(self) -> Any:
        dtype = DTYPES[self.recipe.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def held_out_loss(head: nn.Module, entries: Entries, batch_size: int) -> float:
    """Mean loss of the head on the entries held out, in nats; leaves it in evaluation mode."""
    head.eval()
    device = next(head.parameters()).device
    total, count = 0.0, 0
    for keys_QD, tokens_Q, _ in entries.held_out(batch_size):
        loss = float(head(keys_QD.to(device), tokens_Q.to(device)))
        total, count = total + loss * len(tokens_Q), count + len(tokens_Q)
    return total / count
