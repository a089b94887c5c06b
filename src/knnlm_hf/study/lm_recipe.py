"""How a language model is trained, and what training did."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from knnlm_hf.errors import SettingError
from knnlm_hf.memory.recipe import DTYPES
from knnlm_hf.types import check_count


@dataclass(frozen=True, kw_only=True)
class LMRecipe:
    """How a language model is trained."""

    epochs: int = 10
    """Passes over the stream, ≥ 1."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, > 0."""
    batch_size: int = 16
    """Windows per step."""
    warmup: float = 0.03
    """Share of the steps in which the rate rises."""
    weight_decay: float = 0.1
    """Of matrices; vectors have none."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    evaluations: int = 1
    """Measurements on validation per epoch, ≥ 1; a checkpoint is written at each."""
    patience: int | None = 3
    """Measurements without a better one after which training stops; None: never, and the last
    weights are kept, not the best."""
    dropout: bool = True
    """Whether the model's own dropout is on."""
    dtype: str = "float32"
    """Of the matrix products: float32, or bfloat16 by autocast."""
    seed: int = 0
    """Of the order, the offsets and dropout; initialisation is the caller's."""

    def check(self) -> None:
        """Raise `SettingError` for a value out of range."""
        for name in ("epochs", "batch_size", "evaluations"):
            check_count(name, getattr(self, name))
        if self.patience is not None:
            check_count("patience", self.patience)
        if not 0 < self.lr < math.inf or not 0 <= self.warmup < 1:
            raise SettingError(
                f"lr is {self.lr!r} and warmup {self.warmup!r}, expected lr > 0, 0 <= warmup < 1"
            )
        if not self.clip > 0 or not self.weight_decay >= 0:
            raise SettingError(
                f"clip is {self.clip!r} and weight_decay {self.weight_decay!r}, "
                "expected clip > 0, weight_decay >= 0"
            )
        if self.dtype not in DTYPES:
            raise SettingError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class LMTrained:
    """What training did."""

    recipe: LMRecipe
    steps: int
    """Steps that were made."""
    tokens: int
    """Predictions trained on, epochs included."""
    train_loss: float
    """Mean −log p of the steps since the last measurement but one, in nats, dropout included."""
    valid_loss: float
    """Mean −log p of validation, of the weights that were kept; NaN without validation."""
    stopped: bool
    """Whether validation stopped improving before the last epoch."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)
