"""Train a language model on a stream of tokens: the study's own models, and the example's.

AdamW, cosine schedule with a short warm-up, early stopping on validation, checkpoints. The stream
is cut into windows anew in each epoch, at another offset, in another order; all of it follows from
the seed, so a killed run continues to the same weights on the same device.

Shape suffixes: N token of the stream, B window of a batch, T position, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from knnlm_hf.errors import KNNLMError
from knnlm_hf.memory.checkpoint import Checkpoint
from knnlm_hf.memory.recipe import DTYPES
from knnlm_hf.memory.schedule import cosine_rate
from knnlm_hf.progress import bar
from knnlm_hf.study.lm_recipe import LMRecipe, LMTrained
from knnlm_hf.types import check_count


class LMBatch(NamedTuple):
    """Windows of the stream, on the model's device."""

    tokens: Tensor
    """(B, T+1) int64: T inputs, and the token after each."""
    starts: Tensor
    """(B,) int64, position in the stream of each first input; on the CPU."""


Loss = Callable[[Any, LMBatch], Tensor]
"""Mean loss of a model on a batch, in nats."""


def stream(documents: Sequence[Any]) -> Tensor:
    """(N,) int64: documents one after the other."""
    parts = [np.asarray(part, dtype=np.int64) for part in documents]
    return torch.from_numpy(np.concatenate(parts))


def next_token_loss(model: Any, batch: LMBatch) -> Tensor:
    """Mean −log p of the next token over all positions: the usual loss."""
    logits_BTV = model(input_ids=batch.tokens[:, :-1]).logits
    return nn.functional.cross_entropy(
        logits_BTV.flatten(0, 1).float(), batch.tokens[:, 1:].flatten()
    )


@torch.no_grad()
def mean_loss(model: Any, tokens_N: Tensor, *, window: int, batch_size: int = 16) -> float:
    """Mean −log p of each token but the first, in nats, in windows that do not overlap."""
    was_training = model.training
    model.eval()
    total = 0.0
    whole = (len(tokens_N) - 1) // window
    starts_n = torch.arange(whole) * window
    groups = [(starts_b, window) for starts_b in torch.split(starts_n, batch_size)]
    rest = len(tokens_N) - 1 - whole * window
    if rest:
        groups.append((torch.tensor([whole * window]), rest))
    for starts_b, length in groups:
        if len(starts_b):
            batch = _batch(tokens_N, starts_b, length, model.device)
            total += float(next_token_loss(model, batch)) * len(starts_b) * length
    model.train(was_training)
    return total / (len(tokens_N) - 1)


def train_lm(
    model: Any,
    tokens_N: Tensor,
    valid_N: Tensor | None = None,
    recipe: LMRecipe | None = None,
    *,
    window: int,
    loss: Loss = next_token_loss,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> LMTrained:
    """Train a causal language model in place, where it is; leave it in evaluation mode.

    Args:
        model: with its initial weights.
        tokens_N: (N,) the training stream, see `stream`.
        valid_N: tokens for early stopping: the weights that predict them best are kept. None: all
            epochs are made, and the last weights kept.
        recipe: how.
        window: inputs per window, T; shorter where the stream is.
        loss: what is trained on; validation is always by the next token.
        checkpoint: folder to write at every measurement and to continue from, with the same recipe
            and tokens. It stays when training is over, and the same call then does nothing but take
            its weights; remove the folder once the model is saved.
        progress: show loss and perplexity on stderr.

    Raises:
        SettingError: a setting out of range.
        KNNLMError: fewer than 2 tokens, a loss that is not finite, a checkpoint of something else.
    """
    recipe = recipe or LMRecipe()
    recipe.check()
    for name, tokens in (("training", tokens_N), ("validation", valid_N)):
        if tokens is not None and len(tokens) < 2:
            raise KNNLMError(f"the {name} text has {len(tokens)} tokens, expected 2 or more")
    run = _Run(model, tokens_N, valid_N, recipe, window, checkpoint)
    with bar(progress) as shown:
        task = shown.add_task("training", total=run.steps, completed=run.now.step, rate="")
        for batch in run.batches():
            value = run.step(loss, batch)
            valid = run.now.best_loss
            best = "" if math.isinf(valid) else f" · validation {math.exp(min(valid, 700)):,.1f}"
            said = f"loss {value:.3f} · perplexity {math.exp(min(value, 700)):,.1f}{best}"
            shown.update(task, completed=run.now.step, rate=said)
    return run.finish()


@dataclass
class _Progress:
    """How far a training is."""

    step: int = 0
    tokens: int = 0
    stale: int = 0
    """Measurements since the best one."""
    best_loss: float = math.inf
    valid_loss: float = math.nan
    train_loss: float = math.nan


class _Run:
    """The state of one training."""

    def __init__(
        self,
        model: Any,
        tokens_N: Tensor,
        valid_N: Tensor | None,
        recipe: LMRecipe,
        window: int,
        checkpoint: str | Path | None,
    ) -> None:
        self.model, self.tokens_N, self.valid_N, self.recipe = model, tokens_N, valid_N, recipe
        self.window = min(check_count("window", window), len(tokens_N) - 1)
        # One window less than there are, where there are several, so that offsets can vary.
        self.rows = max(1, (len(tokens_N) - 1) // self.window - 1)
        self.per_epoch = math.ceil(self.rows / recipe.batch_size)
        self.steps = recipe.epochs * self.per_epoch
        self.every = max(1, self.per_epoch // recipe.evaluations)
        streams = [tokens_N] if valid_N is None else [tokens_N, valid_N]
        self.digests = [hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in streams]
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        decayed = [p for p in self.parameters.values() if p.dim() > 1]
        others = [p for p in self.parameters.values() if p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))
        self.now = _Progress()
        self.best: dict[str, Tensor] = {}
        self.checkpoint = None
        if checkpoint is not None:
            identity = {
                "recipe": asdict(recipe),
                "window": self.window,
                "tokens": self.digests,
                "parameters": {name: list(p.shape) for name, p in self.parameters.items()},
            }
            self.checkpoint = Checkpoint(checkpoint, identity, self.parameters, self.optimizer)
            found = self.checkpoint.load()
            if found is not None:
                self.now, self.best = _Progress(**found[0]), found[1]
        self.sum = self.count = 0.0

    def batches(self) -> Iterator[LMBatch]:
        """The batches that are left, until training is over."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.now.step)
        self.model.train(self.recipe.dropout)
        while self.now.step < self.steps and not self._is_over():
            epoch, inside = divmod(self.now.step, self.per_epoch)
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
            slack = len(self.tokens_N) - 1 - self.rows * self.window
            offset = int(torch.randint(slack + 1, (1,), generator=generator))
            starts = offset + torch.randperm(self.rows, generator=generator) * self.window
            for starts_B in torch.split(starts, self.recipe.batch_size)[inside:]:
                yield _batch(self.tokens_N, starts_B, self.window, self.model.device)
                if self._is_over():
                    break

    def step(self, loss_of: Loss, batch: LMBatch) -> float:
        """One optimizer step, and a measurement where one is due; return the loss."""
        device, dtype = self.model.device.type, DTYPES[self.recipe.dtype]
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = loss_of(self.model, batch)
        if not bool(loss.isfinite()):
            raise KNNLMError(
                f"the loss became {loss.item()} at step {self.now.step}: use a smaller lr than "
                f"{self.recipe.lr}"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.clip)
        rate = self.recipe.lr * cosine_rate(self.now.step, self.steps, self.recipe.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.now.step += 1
        self.now.tokens += batch.tokens[:, 1:].numel()
        value = loss.item()
        self.sum, self.count = self.sum + value, self.count + 1
        if self.now.step % self.every == 0 or self.now.step == self.steps:
            self._measure()
        return value

    def finish(self) -> LMTrained:
        """Put the weights that are kept into the model."""
        with torch.no_grad():
            for name, best in self.best.items():
                self.parameters[name].copy_(best)
        self.model.eval()
        return LMTrained(
            self.recipe, self.now.step, self.now.tokens, self.now.train_loss,
            self.now.best_loss if self.best else self.now.valid_loss, self._is_over(),
        )  # fmt: skip

    def _is_over(self) -> bool:
        return self.recipe.patience is not None and self.now.stale >= self.recipe.patience

    def _measure(self) -> None:
        now = self.now
        now.train_loss, self.sum, self.count = self.sum / self.count, 0.0, 0.0
        if self.valid_N is not None:
            now.valid_loss = mean_loss(
                self.model, self.valid_N, window=self.window, batch_size=self.recipe.batch_size
            )
            is_better = now.valid_loss < now.best_loss
            now.stale = 0 if is_better else now.stale + 1
            if is_better:
                now.best_loss = now.valid_loss
            if is_better and self.recipe.patience is not None:
                self.best = {n: p.detach().clone() for n, p in self.parameters.items()}
        if self.checkpoint is not None:
            self.checkpoint.save(now.step, asdict(now), self.best)
        torch.manual_seed(self.recipe.seed * 1_000_003 + now.step)  # dropout of a resumed run


def _batch(tokens_N: Tensor, starts_B: Tensor, window: int, device: Any) -> LMBatch:
    rows_BT = tokens_N[starts_B[:, None] + torch.arange(window + 1)]
    return LMBatch(rows_BT.to(device, torch.int64), starts_B)
