"""The trained memories of a study: one recipe for all, each trained once, scored on kept states.

All heads learn from the same entries: those whose tokens are predicted in windows spread evenly
over the training text, so that what the model itself says of these entries costs a pass over
these windows only. With the whole budget these are all entries of the datastore.

Shape suffixes: N entry, n entry trained on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from knnlm_hf.build import Datastore
from knnlm_hf.memory.head import Head
from knnlm_hf.memory.kinds import class_of
from knnlm_hf.memory.multi_embedding import MultiEmbeddingHead
from knnlm_hf.memory.recipe import Recipe
from knnlm_hf.scores import TokenScores
from knnlm_hf.study.forward import forwards, rows_of, spread
from knnlm_hf.study.measure import Measured, measure
from knnlm_hf.study.retrieval import with_memory
from knnlm_hf.study.study import Split, Study
from knnlm_hf.windows import Window

_STEPS = 250  # of a small budget, by which its batches are sized
_SMALLEST_BATCH = 64
_HEAD_SPEED = 2.1e10
"""Entries × rows × dimensions that training takes in a second, on two cores."""
_BFLOAT16_SPEED = 1.9
"""Times as fast, where the processor has it."""
_DISTINCT = 0.35
"""Distinct tokens of a batch of text, as a share of it."""


class ChosenEntries(Datastore):
    """Some entries of a store, to be trained on; as if all others were removed.

    Args:
        store: the datastore.
        ids_n: which, ascending.
    """

    def __init__(self, store: Datastore, ids_n: Tensor) -> None:
        super().__init__(store.path, store.manifest)
        self._ids_n = ids_n
        self._digest = store.digest
        if len(ids_n) < store.live:
            self._digest += "-" + hashlib.sha256(ids_n.numpy().tobytes()).hexdigest()

    @property
    def live(self) -> int:
        """Entries that are there."""
        return len(self._ids_n)

    def nth_live(self, ranks: Tensor) -> Tensor:
        """Numbers of the entries of these ranks."""
        return self._ids_n[ranks]

    @property
    def digest(self) -> str:
        """Identifies the store and the choice."""
        return self._digest


@dataclass(frozen=True)
class TrainedHead:
    """A head of a study."""

    name: str
    """For people, and unlike that of any other head."""
    head: Head


def recipe(study: Study) -> Recipe:
    """How every head of the study is trained: the default recipe, cut to the budget."""
    settings, entries = study.settings, _entries(study)
    usual = replace(
        MultiEmbeddingHead.usual, seed=settings.seed, negatives=settings.head_negatives,
        dtype=settings.head_dtype,
    )  # fmt: skip
    budget = settings.head_tokens
    if budget is None:
        epochs, examples = usual.epochs, entries
    else:
        epochs = min(usual.epochs, max(1, round(budget / entries)))
        examples = min(entries, max(1, budget // epochs))
    batch = 2 ** int(math.log2(max(1.0, epochs * examples / _STEPS)))
    size = min(usual.batch_size, max(_SMALLEST_BATCH, batch))
    return replace(usual, epochs=epochs, batch_size=size)


def suited(how: Recipe, kind: type[Head]) -> Recipe:
    """The recipe for a kind of head: at its usual rate, with negatives where it can have them."""
    negatives = how.negatives if hasattr(kind, "negatives") else None
    return replace(how, lr=kind.usual.lr, negatives=negatives)


def is_cut(study: Study) -> bool:
    """Whether the budget does not let a head see the whole training text once."""
    budget = study.settings.head_tokens
    return budget is not None and budget < _entries(study)


def said_of(study: Study) -> str:
    """The budget in words, for an experiment's sentence."""
    rows, epochs = train_rows(study), recipe(study).epochs
    passes = "once" if epochs == 1 else f"{epochs} times"
    return f"heads saw {sum(row.new for row in rows):,} of {_entries(study):,} entries {passes}"


def some(study: Study, settings: list[Any]) -> list[Any]:
    """The settings of a sweep that are tried: the first few, at least two, of a quick study."""
    most = study.settings.most_settings
    return settings if most is None else settings[: max(2, most)]


def entries(study: Study, layer: str) -> ChosenEntries:
    """The entries of a layer's datastore that heads are trained on."""
    chosen, position, ids = set(map(_place, train_rows(study))), 0, []
    for row in rows_of(study.text("train").documents, study.window, study.stride):
        if _place(row) in chosen:
            ids.append(torch.arange(position, position + row.new))
        position += row.new
    return ChosenEntries(study.store(layer), torch.cat(ids))


def train_rows(study: Study) -> list[Window]:
    """The windows of the training text whose predictions heads are trained on."""
    rows = rows_of(study.text("train").documents, study.window, study.stride)
    budget = study.settings.head_tokens
    return spread(rows, None if budget is None else budget // recipe(study).epochs)


def lm_log_probs(study: Study) -> Tensor:
    """(n,) float32, log P_LM of the token of each of the `entries`; computed once."""
    rows = train_rows(study)

    def make(path: Path) -> None:
        heard = forwards(
            study.model, rows, [], batch_size=study.settings.batch_size, show=study.show
        )
        save_file({"lm_log_probs": torch.cat([one.log_probs for one in heard])}, path)

    inputs = {
        "model": study.model_digest, "text": study.text("train").digest,
        "predictions": sum(row.new for row in rows),
    }  # fmt: skip
    return load_file(study.keep("evaluations", "base-train", inputs, make))["lm_log_probs"]


def trained(study: Study, layer: str, kind: str, name: str, **settings: Any) -> TrainedHead:
    """A head of the study, trained once.

    Args:
        study: what it is trained on, and how long.
        layer: att or ffn.
        kind: of head, as `memory.kinds` knows it.
        name: for people.
        settings: arguments of the head; plain data, or tensors.
    """
    fit = partial(_train_on, class_of(kind, Head), study.show, settings)
    plain = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in settings.items()}
    return fitted(study, layer, name, {"kind": kind, "settings": plain}, fit)


def fitted(
    study: Study,
    layer: str,
    name: str,
    inputs: dict[str, Any],
    fit: Callable[[ChosenEntries, Recipe], Head],
) -> TrainedHead:
    """A head that is trained in its own way, once: `inputs` are all that makes it differ."""
    chosen, how = entries(study, layer), recipe(study)
    inputs = inputs | {"entries": chosen.digest, "recipe": asdict(how)}

    def make(path: Path) -> None:
        fit(chosen, how).save_pretrained(path)

    path = study.keep("heads", f"{name}-{layer}", inputs, make)
    return TrainedHead(path.name, Head.from_pretrained(path))


def scores(study: Study, split: Split, trained: TrainedHead) -> TokenScores:
    """The split beside a head, computed once from the kept states."""
    evaluation = study.evaluation(split)
    head = trained.head

    @torch.no_grad()
    def make(path: Path) -> None:
        found = head.token_log_probs(evaluation.states[head.layer], evaluation.tokens.long())
        save_file({"log_probs": found.float().cpu()}, path)

    inputs = {"head": trained.name, "evaluation": evaluation.digest}
    path = study.keep("head_scores", f"{trained.name}-{split}", inputs, make)
    return with_memory(evaluation, load_file(path)["log_probs"])


def measured(study: Study, name: str, trained: TrainedHead) -> Measured:
    """A head's λ fitted on valid, and what the mixture gives on test."""
    return measure(name, scores(study, "valid", trained), scores(study, "test", trained))


def device() -> str:
    """Where heads are trained: as `Head.train_on` chooses."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def seconds(study: Study, rows: float, layers: int = 1, *, sampled: bool = True) -> float:
    """What training so many rows costs on two cores, and scoring them; an estimate.

    Args:
        study: whose budget and width count.
        rows: of the head.
        layers: on how many layers it is trained.
        sampled: whether the study's negatives spare it some of the rows.
    """
    width: int = study.model.config.get_text_config(decoder=True).hidden_size
    epochs, budget = Recipe().epochs, study.settings.head_tokens
    whole = epochs * _entries(study)
    examples = whole if budget is None else min(whole, budget)
    negatives, dtype = study.settings.head_negatives, study.settings.head_dtype
    if sampled and negatives is not None:
        taken = negatives + recipe(study).batch_size * _DISTINCT
        rows *= min(1.0, taken / study.vocab_size)
    speed = _HEAD_SPEED * (_BFLOAT16_SPEED if dtype == "bfloat16" else 1)
    return layers * examples * rows * width / speed


def _entries(study: Study) -> int:
    return sum(max(0, len(part) - 1) for part in study.text("train").documents)


def _place(row: Window) -> tuple[int, int]:
    return row.document, row.start


def _train_on(
    cls: type[Head], show: bool, settings: dict[str, Any], store: ChosenEntries, how: Recipe
) -> Head:
    head: Head = cls.train_on(store, recipe=suited(how, cls), progress=show, **settings)
    return head
