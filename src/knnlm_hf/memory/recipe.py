"""How a head is trained, and what its training did: plain data, kept with the head."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from knnlm_hf.errors import SettingError
from knnlm_hf.types import check_count

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What matrix products may be in."""
LARGEST_SEED = (1 << 32) - 1


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
        if not isinstance(self.seed, int) or abs(self.seed) > LARGEST_SEED:
            raise SettingError(
                f"seed is {self.seed!r}, expected a whole number, at most {LARGEST_SEED}"
            )
        if not 0 < self.lr < math.inf or not 0 <= self.warmup < 1:
            raise SettingError(
                f"lr is {self.lr!r} and warmup {self.warmup!r}, expected lr > 0, 0 <= warmup < 1"
            )
        if self.dtype not in DTYPES:
            raise SettingError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")


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
