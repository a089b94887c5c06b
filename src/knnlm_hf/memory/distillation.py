"""Train a head on what a kNN memory says of each entry, and on the entry's own next token.

    loss = α · (−log p_head(next)) + (1−α) · Σ_w p_kNN(w) · (−log p_head(w))

The kNN memory may not find the entry itself, so that its answer is that of a text it has not seen;
an entry that has no neighbour counts with its next token alone. The head is used as ever: nothing
of the teacher remains in it. After the distilled memories that followed the paper.

Shape suffixes: Q query (entry), T target.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from knnlm_hf.datastore import DatastoreReader
from knnlm_hf.errors import SettingError
from knnlm_hf.memory.entries import Batch
from knnlm_hf.memory.knn import KNNMemory
from knnlm_hf.memory.recipe import Recipe, Trained, recipe_with
from knnlm_hf.memory.soft_targets import SoftTargets, check_teacher
from knnlm_hf.memory.training import train

if TYPE_CHECKING:
    from knnlm_hf.memory.head import Head

Teacher = KNNMemory | SoftTargets | str | Path


def distilled_loss(
    head: Head, store: DatastoreReader, teacher: Teacher, alpha: float = 0.5, progress: bool = True
) -> tuple[Callable[[Batch], Tensor], dict[str, Any]]:
    """The loss of a batch as in the module's formula, and plain data that says of which teacher.

    Args:
        head: any head whose `forward` takes weights.
        store: what it is trained on.
        teacher: a kNN memory on that store, whose answers are then retrieved and kept beside it
            (see `SoftTargets.build`); or answers kept before, or their folder.
        alpha: α, the share of the next token's own loss, 0 … 1.
        progress: show progress on stderr.

    Raises:
        SettingError: α out of range, a teacher that is none of these.
        DatastoreError: a teacher of another store; targets that are unfinished or damaged.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise SettingError(f"alpha is {alpha!r}, expected 0 <= alpha <= 1")
    targets = soft_targets(store, teacher, progress)

    def loss(batch: Batch) -> Tensor:
        value: Tensor = head(batch.keys, *mixed_targets(batch, targets, alpha))
        return value

    return loss, {"alpha": alpha} | targets.about()


def soft_targets(store: DatastoreReader, teacher: Teacher, progress: bool = True) -> SoftTargets:
    """The teacher's answers for every entry of `store`: kept ones, or asked for now."""
    if isinstance(teacher, KNNMemory):
        return SoftTargets.build(store, teacher, progress=progress)
    if isinstance(teacher, str | Path):
        teacher = SoftTargets.open(teacher)
    if not isinstance(teacher, SoftTargets):
        raise SettingError(
            f"teacher is a {type(teacher).__name__}, expected a KNNMemory, or SoftTargets and "
            "their folder"
        )
    check_teacher(store, teacher.manifest.store, f"{teacher.path} holds soft targets of a store")
    return teacher


def mixed_targets(batch: Batch, targets: SoftTargets, alpha: float) -> tuple[Tensor, Tensor]:
    """Tokens and weights (Q, 1 + T): the next token with α, the teacher's with 1−α in all."""
    tokens_QT, probs_QT = (one.to(batch.tokens.device) for one in targets[batch.ids])
    own_Q1 = batch.tokens[:, None]
    is_answered_Q1 = probs_QT.sum(1, keepdim=True) > 0
    # What only fills a row is given a token that the head is sure to know.
    tokens_QT = torch.where(probs_QT > 0, tokens_QT, own_Q1)
    weight_Q1 = torch.where(is_answered_Q1, alpha, 1.0)
    tokens_QT = torch.cat([own_Q1, tokens_QT], 1)
    return tokens_QT, torch.cat([weight_Q1, (1 - alpha) * probs_QT], 1)


def distil(
    head: Head,
    store: DatastoreReader,
    teacher: Teacher,
    alpha: float = 0.5,
    *,
    recipe: Recipe | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Trained:
    """Train a head that is there already on the module's loss, in place; keeps `head.trained`.

    Args:
        head: any head of the store's sizes; where it is, it is trained.
        store: the datastore, whose held-out entries decide when to stop, by their next tokens.
        teacher: as for `distilled_loss`.
        alpha: likewise.
        recipe: how to train, see `Recipe`; `settings` change single fields of it.
        checkpoint: folder to write after every epoch; a killed run continues from it, see
            `Head.train_on`.
        progress: show progress on stderr.
    """
    recipe = recipe_with(recipe, settings)
    recipe.check()
    loss, about = distilled_loss(head, store, teacher, alpha, progress)
    head.trained = train(
        head, store, recipe, loss=loss, teacher=about, checkpoint=checkpoint, progress=progress
    )
    return head.trained
