"""Train a memory on a datastore: its keys and values are the training set, no model is run.

One recipe for every head: AdamW without weight decay, cosine schedule with a short warm-up,
held-out entries for early stopping. Everything random follows from the seed.

Shape suffixes: Q query (entry), D dimension.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from knnlm_hf.datastore import DatastoreReader, atomic
from knnlm_hf.datastore.atomic import file_sha256
from knnlm_hf.errors import KNNLMError, SettingError, first_line
from knnlm_hf.memory.schedule import cosine_rate
from knnlm_hf.progress import bar
from knnlm_hf.types import check_count

_RUN = 256  # consecutive entries that are read together
_BUFFER_RUNS = 1024  # runs shuffled with each other: 262,144 entries
_HELD_OUT_EVERY = 50  # of so many runs, one is held out
_MOST_HELD_OUT = 200  # runs
_STATE = "state.json"  # of a checkpoint
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a head is trained; the defaults are one recipe for every number of rows."""

    epochs: int = 5
    """Passes over the datastore, ≥ 1."""
    lr: float = 2e-3
    """Peak learning rate of AdamW, > 0."""
    batch_size: int = 2048
    """Entries per step."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises."""
    patience: int = 2
    """Epochs without a better held-out loss after which training stops."""
    dtype: str = "float32"
    """Of the matrix products: float32, or bfloat16 (sums stay in float32)."""
    negatives: int | None = None
    """Tokens drawn at each step to stand for all that are not in its batch (see `sampled_loss`);
    None: all of them, the exact loss. Held-out losses are exact either way."""
    seed: int = 0
    """Of initialisation, order and held-out entries."""

    def check(self) -> None:
        """Raise `SettingError` for a value out of range."""
        for name in ("epochs", "batch_size", "patience"):
            check_count(name, getattr(self, name))
        if self.negatives is not None:
            check_count("negatives", self.negatives)
        if not 0 < self.lr < math.inf or not 0 <= self.warmup < 1:
            raise SettingError(
                f"lr is {self.lr!r} and warmup {self.warmup!r}, expected lr > 0, 0 <= warmup < 1"
            )
        if self.dtype not in _DTYPES:
            raise SettingError(f"dtype is {self.dtype!r}, expected one of {', '.join(_DTYPES)}")


@dataclass(frozen=True)
class Trained:
    """What training did; kept with the head."""

    recipe: Recipe
    epochs: int
    """Epochs that were run."""
    held_out_loss: float
    """Best mean −log p of the held-out entries, in nats."""
    entries: int
    """Entries trained on."""
    store: str
    """Digest of the datastore."""
    teacher: dict[str, Any] | None = None
    """α and the kNN memory that it was distilled from; None: trained on next tokens alone."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


class Batch(NamedTuple):
    """Some entries of a store."""

    keys: Tensor
    """(Q, D) float32."""
    tokens: Tensor
    """(Q,) int64."""
    ids: Tensor
    """(Q,) int64, the numbers of the entries."""


class Entries:
    """The entries of a store in a shuffled order, a part of them held out.

    Runs of consecutive entries are read in random order into a buffer, which is shuffled: each read
    is sequential, memory is one buffer, and an entry's batch is drawn from hundreds of places.
    """

    def __init__(self, store: DatastoreReader, seed: int) -> None:
        live = store.live
        if live < 2:
            raise KNNLMError(f"{store.path} has {live} entries, expected 2 or more to train")
        self.store, self.seed = store, seed
        # Runs of live entries: those of removed documents are skipped as if they were not there.
        starts = torch.arange(0, live, min(_RUN, max(1, live // 8)))
        self.run = int(starts[1] - starts[0]) if len(starts) > 1 else live
        order = starts[torch.randperm(len(starts), generator=self._generator(-1))]
        held = min(_MOST_HELD_OUT, max(1, len(starts) // _HELD_OUT_EVERY))
        self.held_out_runs, self.runs = order[:held], order[held:]

    def __len__(self) -> int:
        """Entries trained on."""
        return len(self._ids(self.runs))

    @property
    def trained_ids(self) -> Tensor:
        """(n,) int64, the numbers of the entries that are trained on."""
        return self._ids(self.runs)

    @property
    def held_out_ids(self) -> Tensor:
        """(n,) int64, the numbers of the held-out entries."""
        return self._ids(self.held_out_runs)

    def epoch(self, number: int, batch_size: int) -> Iterator[Batch]:
        """Batches of all entries trained on, in an order of this epoch's own."""
        generator = self._generator(number)
        runs = self.runs[torch.randperm(len(self.runs), generator=generator)]
        left = torch.empty(0, dtype=torch.int64)
        for part in torch.split(runs, _BUFFER_RUNS):
            ids = torch.cat([left, self._ids(part)])
            ids = ids[torch.randperm(len(ids), generator=generator)]
            whole = len(ids) - len(ids) % batch_size
            for start in range(0, whole, batch_size):
                yield self._read(ids[start : start + batch_size])
            left = ids[whole:]
        if len(left):
            yield self._read(left)

    def held_out(self, batch_size: int) -> Iterator[Batch]:
        """Batches of the held-out entries."""
        for batch in torch.split(self.held_out_ids, batch_size):
            yield self._read(batch)

    def _ids(self, runs: Tensor) -> Tensor:
        ranks = (runs[:, None] + torch.arange(self.run)).reshape(-1)
        return self.store.nth_live(ranks[ranks < self.store.live])

    def _read(self, ids_Q: Tensor) -> Batch:
        keys_QD = self.store.keys[ids_Q].float()
        if not bool(keys_QD.isfinite().all()):
            raise KNNLMError(f"{self.store.path}: a key is not finite: build the store again")
        return Batch(keys_QD, self.store.values[ids_Q].long(), ids_Q)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number + 1)


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
            and store; removed at the end.
        progress: show loss and perplexity on stderr.

    Raises:
        KNNLMError: keys that are not finite, a loss that is not, a checkpoint of something else.
    """
    recipe.check()
    entries = Entries(store, recipe.seed)
    run = _Run(head, entries, recipe, teacher, None if checkpoint is None else Path(checkpoint))
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
                shown.update(task, rate=f"loss {value:.3f} · perplexity {math.exp(value):,.1f}")
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
        checkpoint: Path | None,
    ) -> None:
        self.head, self.entries, self.recipe, self.checkpoint = head, entries, recipe, checkpoint
        self.teacher = teacher
        self.parameters = dict(head.named_parameters())
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), recipe.lr, weight_decay=0.0, fused=True
        )
        self.steps = recipe.epochs * math.ceil(len(entries) / recipe.batch_size)
        self.epoch = self.done = self.stale = 0
        self.best_loss = math.inf
        self.best: dict[str, Tensor] = {}
        if checkpoint is not None and (checkpoint / _STATE).is_file():
            self._load(checkpoint)

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
            with atomic.explaining(self.checkpoint, "the checkpoint"):
                self._save(self.checkpoint)

    def finish(self, store: DatastoreReader) -> Trained:
        """Put the best weights into the head, and remove the checkpoint."""
        with torch.no_grad():
            for name, best in self.best.items():
                self.parameters[name].copy_(best)
        self.head.eval()
        if self.checkpoint is not None:
            for name in (_STATE, f"{self.epoch}.safetensors"):
                atomic.discard(self.checkpoint / name)
        entries, teacher = len(self.entries), self.teacher
        return Trained(self.recipe, self.epoch, self.best_loss, entries, store.digest, teacher)

    def _here(self, batch: Batch) -> Batch:
        return Batch(batch.keys.to(self.device), batch.tokens.to(self.device), batch.ids)

    def _autocast(self) -> Any:
        dtype = _DTYPES[self.recipe.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _identity(self) -> dict[str, Any]:
        shapes = {name: list(p.shape) for name, p in self.parameters.items()}
        return {
            "recipe": asdict(self.recipe),
            "store": self.entries.store.digest,
            "parameters": shapes,
            "teacher": self.teacher,
        }

    def _save(self, folder: Path) -> None:
        """Tensors under this epoch's name first, then the state that names them."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"now.{name}": p.detach().contiguous() for name, p in self.parameters.items()}
        tensors |= {f"best.{name}": p for name, p in self.best.items()}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state[p].items():
                tensors[f"optimizer.{name}.{key}"] = value.detach().contiguous()
        path = folder / f"{self.epoch}.safetensors"
        state = {
            **self._identity(), "epoch": self.epoch, "done": self.done,
            "stale": self.stale, "best_loss": self.best_loss, "tensors": path.name,
            "sha256": atomic.write_tensors(path, tensors),
        }  # fmt: skip
        state["check"] = _checksum(state)
        atomic.write_bytes(folder / _STATE, json.dumps(state, indent=2).encode())
        for old in folder.glob("*.safetensors"):
            if old != path:
                atomic.discard(old)

    def _load(self, folder: Path) -> None:
        try:
            state = json.loads((folder / _STATE).read_text())
            path = folder / Path(state["tensors"]).name
            if state.pop("check") != _checksum(state) or file_sha256(path) != state["sha256"]:
                raise ValueError("a checksum is another one")
            tensors = load_file(path, device=str(self.device))
            found = {name: state[name] for name in self._identity()}
        except Exception as error:
            raise KNNLMError(
                f"{folder}: the checkpoint is damaged ({first_line(error)}): "
                "remove it to start anew"
            ) from error
        for name, expected in self._identity().items():
            if found[name] != expected:
                raise KNNLMError(
                    f"{folder}: this checkpoint has {name} {found[name]}, expected {expected}: "
                    "train with the same settings, or remove it to start anew"
                )
        self.epoch, self.done, self.stale = state["epoch"], state["done"], state["stale"]
        self.best_loss = state["best_loss"]
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[f"now.{name}"])
                self.best[name] = tensors[f"best.{name}"]
                self.optimizer.state[p] = {
                    key.removeprefix(f"optimizer.{name}."): value
                    for key, value in tensors.items()
                    if key.startswith(f"optimizer.{name}.")
                }


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


def recipe_with(recipe: Recipe | None, changes: dict[str, Any]) -> Recipe:
    """The recipe with some fields changed; None stands for the default one.

    Raises:
        SettingError: a field that a recipe does not have.
    """
    unknown = changes.keys() - Recipe.__dataclass_fields__.keys()
    if unknown:
        names = ", ".join(Recipe.__dataclass_fields__)
        raise SettingError(f"unknown setting {', '.join(sorted(unknown))}: a recipe has {names}")
    return replace(recipe or Recipe(), **changes)


def _checksum(state: dict[str, Any]) -> str:
    """Sha-256 of a checkpoint's state, without its checksum: the same once it is read back."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
