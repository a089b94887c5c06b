"""MLPMemory: a few residual layers over the state, then one row per token.

    x_0 = h,   x_{i+1} = x_i + W_i · gelu(V_i · norm(x_i)),   p(w | h) = softmax_w(E · norm(x_L))

The rows of a `MultiEmbeddingHead` see h itself, which the model made for its own next step; these
layers may turn it into something that tells more about what followed it in the datastore.

Shape suffixes: Q query, D dimension, V vocabulary, T target.
"""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from knnlm_hf.errors import SettingError
from knnlm_hf.memory.head import Head, exact, first_rows
from knnlm_hf.memory.product import times_rows
from knnlm_hf.memory.sampled_loss import sampled_loss
from knnlm_hf.types import check_count


class MLPMemory(Head):
    """A memory of residual layers and V rows; see the module's formula.

    The last matrix of each layer begins at zero, so that training begins from V rows over norm(h).

    Args:
        hidden_size: D, the width of the captured states.
        vocab_size: V.
        layers: L ≥ 1.
        width: units inside a layer, ≥ 1; None: 4·D, or as many as `budget` allows.
        layer: the representation it reads, as for a datastore.
        dropout: share of those units that is left out in training, 0 ≤ dropout < 1.
        budget: parameters in all, at most budget·V·D, instead of `width`.

    Raises:
        SettingError: a size below 1, a dropout out of range, both width and budget, or a budget
            too small for even one unit.
    """

    kind = "mlp"
    always_speaks = True
    negatives: int | None = None
    """How many tokens stand for the rest in a training step; set while it is trained with a
    recipe that says so."""

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        layers: int = 2,
        width: int | None = None,
        layer: str = "att",
        *,
        dropout: float = 0.0,
        budget: float | None = None,
    ) -> None:
        super().__init__(hidden_size, vocab_size, layer)
        self.layers = check_count("layers", layers)
        if budget is not None:
            if width is not None:
                raise SettingError(f"both width {width!r} and budget {budget!r}: give one")
            width = width_within(budget, hidden_size, vocab_size, layers)
        self.width = check_count("width", 4 * hidden_size if width is None else width)
        if (
            isinstance(dropout, bool)
            or not isinstance(dropout, int | float)
            or not 0 <= dropout < 1
        ):
            raise SettingError(f"dropout is {dropout!r}, expected 0 <= dropout < 1")
        self.dropout = float(dropout)
        self.blocks = nn.Sequential(
            *(_Block(hidden_size, self.width, dropout) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.weight = first_rows(vocab_size, hidden_size)

    def settings(self) -> dict[str, Any]:
        """`kind` and the constructor's arguments, as plain data."""
        own = {"layers": self.layers, "width": self.width, "dropout": self.dropout}
        return super().settings() | own

    def forward(self, hidden: Tensor, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats, for training; see `head_loss`, through which gradients flow.

        Args:
            hidden: (..., D) states.
            tokens: (...) next tokens; with weights (..., T), several targets of each state.
            weights: (..., T) ≥ 0, how much each target counts; 0 for one that only fills the row.
        """
        tokens_QT = self._targets(tokens, weights, hidden)
        weights_QT = None if weights is None else weights.reshape(tokens_QT.shape).to(self.device)
        states_QD = self._states(self._flat(hidden))
        return sampled_loss(
            states_QD, self.weight, None, lambda tokens: tokens[..., None], tokens_QT, weights_QT,
            vocab_size=self.vocab_size, negatives=self.negatives if self.training else None,
        )  # fmt: skip

    @torch.no_grad()
    def start_rows(self, rows_VD: Tensor) -> None:
        """Set the rows to `rows_VD`."""
        self.weight.copy_(rows_VD)

    @classmethod
    def _blank(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        layers = sum(name.endswith(".down.bias") for name in tensors)
        if settings["layers"] != layers:  # before any is made
            raise SettingError(f"its settings give {settings['layers']} layers, it has {layers}")
        return super()._blank(settings, tensors)

    def _log_probs(self, hidden_QD: Tensor) -> Tensor:
        return self._logits(hidden_QD).log_softmax(1)

    def _token_log_probs(self, hidden_QD: Tensor, tokens_Q: Tensor) -> Tensor:
        logits_QV = self._logits(hidden_QD)
        return logits_QV.gather(1, tokens_Q[:, None])[:, 0] - logits_QV.logsumexp(1)

    def _states(self, hidden_QD: Tensor) -> Tensor:
        states_QD: Tensor = self.norm(self.blocks(hidden_QD))
        return states_QD

    def _logits(self, hidden_QD: Tensor) -> Tensor:
        """(Q, V), float32 (float64 for float64 weights)."""
        return exact(times_rows(self._states(hidden_QD), self.weight))


class _Block(nn.Module):
    """x + W · gelu(V · norm(x))."""

    def __init__(self, hidden_size: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, width)
        self.down = nn.Linear(width, hidden_size)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, states_QD: Tensor) -> Tensor:
        inner = self.dropout(nn.functional.gelu(self.up(self.norm(states_QD))))
        result: Tensor = states_QD + self.down(inner)
        return result


def width_within(budget: float, hidden_size: int, vocab_size: int, layers: int) -> int:
    """The widest layers for which an `MLPMemory` has at most budget·V·D parameters.

    It has V·D + 2D + layers·(width·(2D + 1) + 3D). From 8 on, the width is a multiple of 8.

    Raises:
        SettingError: a budget in which there is no room for one unit.
    """
    fixed = vocab_size * hidden_size + 2 * hidden_size + 3 * layers * hidden_size
    is_number = isinstance(budget, int | float) and math.isfinite(budget)
    room = budget * vocab_size * hidden_size - fixed if is_number else 0.0
    width = int(room // (layers * (2 * hidden_size + 1)))
    if width < 1:
        least = (fixed + layers * (2 * hidden_size + 1)) / (vocab_size * hidden_size)
        raise SettingError(
            f"budget is {budget!r}, expected {math.ceil(least * 1000) / 1000:g} or more (times "
            f"V·D) for {layers} layers over {vocab_size} rows of {hidden_size} numbers"
        )
    return width if width < 8 else width - width % 8
