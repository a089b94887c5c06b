"""How large a study is: every budget in one place, and part of what its results depend on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from knnlm_hf.errors import SettingError
from knnlm_hf.memory.recipe import LARGEST_SEED, Recipe
from knnlm_hf.types import MOST_K, check_count, check_k


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The size of a study; None means everything there is.

    Raises:
        SettingError: a value out of range.
    """

    train_tokens: int | None = None
    """Tokens of the training text that are used, from its beginning."""
    eval_tokens: int | None = None
    """Tokens scored of each of valid and test, in windows spread evenly over the split."""
    exact_comparisons: float = 6e10
    """Queries × entries that one exact search may cost; fewer evaluation tokens beyond that."""
    layers: tuple[str, ...] | None = None
    """Representations that are compared, the first of them the one to use where one is; None:
    those of att and ffn that the model has."""
    k: int = 1024
    """Neighbours per query."""
    head_tokens: int | None = None
    """Examples that the training of one head may see, epochs included; None: the recipe's own."""
    head_negatives: int | None = None
    """Tokens drawn at each step of a head's training to stand for the rest; None: all of them."""
    head_dtype: str = "float32"
    """Of the matrix products in a head's training: float32, or bfloat16."""
    lm_tokens: int | None = None
    """Tokens that the training of one language model may see, epochs included."""
    most_settings: int | None = None
    """Settings of a sweep in which each has to be trained: the first so many; None: all."""
    batch_size: int = 8
    """Windows per forward pass."""
    resamples: int = 2000
    """Bootstrap samples of each comparison."""
    seed: int = 0
    """Of every random choice."""

    def __post_init__(self) -> None:
        check_k(self.k, MOST_K)
        if not isinstance(self.seed, int) or not 0 <= self.seed <= LARGEST_SEED:
            raise SettingError(
                f"seed is {self.seed!r}, expected a whole number from 0 to {LARGEST_SEED}"
            )
        for name in _BUDGETS:
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        Recipe(dtype=self.head_dtype).check()
        if self.layers is not None and len(set(self.layers)) != max(1, len(self.layers)):
            raise SettingError(f"layers is {self.layers!r}, expected one or more different layers")
        for name in ("batch_size", "resamples"):
            check_count(name, getattr(self, name))
        if not 0 < self.exact_comparisons < math.inf:
            raise SettingError(
                f"exact_comparisons is {self.exact_comparisons!r}, expected a number above 0"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "layers": self.layers and list(self.layers)}


_BUDGETS = (
    "train_tokens", "eval_tokens", "head_tokens", "head_negatives", "lm_tokens", "most_settings",
)  # fmt: skip

QUICK: dict[str, Any] = {
    "train_tokens": 250_000, "eval_tokens": 5_000, "exact_comparisons": 1e9,
    "head_tokens": 50_000, "lm_tokens": 30_000, "most_settings": 2, "resamples": 1000,
}  # fmt: skip
"""What `--quick` sets: ten minutes on two cores for a small model; few findings are certain."""
