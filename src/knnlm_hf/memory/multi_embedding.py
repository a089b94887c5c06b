"""MultiEmbeddingHead: a trained matrix in place of the datastore, and no retrieval.

    p(w | h) = Σ_{r ∈ rows(w)} exp(h · W_r / t + b_r)  /  Σ_r exp(h · W_r / t + b_r)

W has n·V rows, n for each token (or as many as the token is given); n = 1 is the paper's V×D
matrix (section 4). Probabilities of a token's rows are summed, as M does with a token's neighbours.

Shape suffixes: Q query, R row, D dimension, V vocabulary, M rows of one token.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from knnlm_hf.datastore import DatastoreReader
from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.memory.head import Head, first_rows
from knnlm_hf.memory.product import times_rows
from knnlm_hf.memory.recipe import Recipe
from knnlm_hf.memory.sampled_loss import sampled_loss
from knnlm_hf.types import check_count, check_temperature


class MultiEmbeddingHead(Head):
    """A memory of R trained rows; see the module's formula.

    Args:
        hidden_size: D, the width of the captured states.
        vocab_size: V.
        n: rows of every token, ≥ 1.
        layer: the representation it reads, as for a datastore.
        rows_per_token: (V,) counts ≥ 0 instead of n; a token with 0 rows has probability 0.
        temperature: t > 0, fixed; the rows can learn its scale.
        bias: learn b, one number per row; otherwise b = 0.

    Raises:
        SettingError: a size below 1, t ≤ 0, or counts of the wrong length or sign.
    """

    kind = "multi_embedding"
    always_speaks = True
    usual = Recipe(lr=5e-3)
    row_tokens: Tensor
    first_rows: Tensor
    row_counts: Tensor
    rows_per_token: Tensor | None
    negatives: int | None = None
    """How many tokens stand for the rest in a training step; set while it is trained with a
    recipe that says so."""

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        n: int = 3,
        layer: str = "att",
        *,
        rows_per_token: Any = None,
        temperature: float = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__(hidden_size, vocab_size, layer)
        self.n = check_count("n", n)
        self.temperature = check_temperature(temperature)
        counts_V = self._counts(rows_per_token)
        tokens_V = torch.arange(vocab_size, device=counts_V.device)
        self.register_buffer("rows_per_token", None if rows_per_token is None else counts_V)
        self.register_buffer("row_tokens", tokens_V.repeat_interleave(counts_V), persistent=False)
        self.register_buffer("first_rows", counts_V.cumsum(0) - counts_V, persistent=False)
        self.register_buffer("row_counts", counts_V, persistent=False)
        self._most_rows = int(counts_V.max())
        rows = len(self.row_tokens)
        self.weight = first_rows(rows, hidden_size)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None
        self._is_uniform = bool((counts_V == counts_V[0]).all())

    @classmethod
    def train_on(cls, store: DatastoreReader, n: int = 3, **settings: Any) -> Self:
        """Train on a datastore; see `Head.train_on` and the arguments of this class.

        `rows_per_token`, `temperature`, `bias`, `recipe`, `checkpoint`, `device`, `progress` and
        the fields of a `Recipe` are keywords.
        """
        return super().train_on(store, n=n, **settings)

    def settings(self) -> dict[str, Any]:
        """`kind` and the constructor's arguments; `rows_per_token` travels with the tensors."""
        has_bias = self.bias is not None
        return super().settings() | {"n": self.n, "temperature": self.temperature, "bias": has_bias}

    def forward(self, hidden: Tensor, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean cross-entropy in nats, for training; see `head_loss`.

        Args:
            hidden: (..., D) states.
            tokens: (...) next tokens; with weights (..., T), several targets of each state.
            weights: (..., T) ≥ 0, how much each target counts; 0 for one that only fills the row.

        Raises:
            KNNLMError: a token without rows has no likelihood to train.
        """
        tokens_QT = self._targets(tokens, weights, hidden)
        is_rowless_QT = self.row_counts[tokens_QT] == 0
        if bool(is_rowless_QT.any()):
            token = int(tokens_QT[is_rowless_QT][0])
            raise KNNLMError(f"token {token} has no row in this head: give it one, or leave it out")
        weights_QT = None if weights is None else weights.reshape(tokens_QT.shape).to(self.device)
        hidden_QD = self._flat(hidden) / self.temperature
        return sampled_loss(
            hidden_QD, self.weight, self.bias, self._rows_of, tokens_QT, weights_QT,
            vocab_size=self.vocab_size, negatives=self.negatives if self.training else None,
        )  # fmt: skip

    @torch.no_grad()
    def start_rows(self, rows_VD: Tensor) -> None:
        """Set each token's rows to its row of `rows_VD`, a little apart so that they can part."""
        rows_RD = rows_VD[self.row_tokens]
        apart_RD = torch.randn_like(rows_RD) * (0.1 * rows_VD.std())
        self.weight.copy_(rows_RD if self._most_rows == 1 else rows_RD + apart_RD)

    @property
    def _width(self) -> int:
        return len(self.row_tokens)

    def _token_log_probs(self, hidden_QD: Tensor, tokens_Q: Tensor) -> Tensor:
        rows_QM = self._rows_of(tokens_Q)
        logits_QR = self._logits(hidden_QD)
        own_QM = logits_QR.gather(1, rows_QM.clamp(min=0)).masked_fill(rows_QM < 0, -torch.inf)
        return own_QM.logsumexp(1) - logits_QR.logsumexp(1)

    def _rows_of(self, tokens: Tensor) -> Tensor:
        """(...) → (..., M): the rows of each token, −1 past its last."""
        offset_M = torch.arange(self._most_rows, device=tokens.device)
        rows = self.first_rows[tokens][..., None] + offset_M
        return torch.where(offset_M < self.row_counts[tokens][..., None], rows, -1)

    def _logits(self, hidden_QD: Tensor) -> Tensor:
        """(Q, R), float32 (float64 for float64 weights)."""
        exact = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        logits_QR = times_rows(hidden_QD, self.weight).to(exact)
        if self.temperature != 1.0:
            logits_QR = logits_QR / self.temperature
        return logits_QR if self.bias is None else logits_QR + self.bias

    def _log_probs(self, hidden_QD: Tensor) -> Tensor:
        return self._by_token(self._logits(hidden_QD)).log_softmax(1)

    def _by_token(self, logits_QR: Tensor) -> Tensor:
        """(Q, R) → (Q, V): log of the summed exp of each token's rows; −inf without a row."""
        if self._is_uniform:
            logits_QVM = logits_QR.view(len(logits_QR), self.vocab_size, self._most_rows)
            return logits_QR if self._most_rows == 1 else logits_QVM.logsumexp(2)
        shape = (logits_QR.shape[0], self.vocab_size)
        tokens_QR = self.row_tokens.expand_as(logits_QR)
        peak_QV = logits_QR.new_full(shape, -torch.inf)
        peak_QV = peak_QV.scatter_reduce(1, tokens_QR, logits_QR.detach(), "amax")
        relative_QR = (logits_QR - peak_QV.gather(1, tokens_QR)).exp()
        total_QV = logits_QR.new_zeros(shape).index_add(1, self.row_tokens, relative_QR)
        return torch.where(total_QV > 0, peak_QV + total_QV.log(), -torch.inf)

    @classmethod
    def _blank(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        counts_V, weight_RD = tensors.get("rows_per_token"), tensors["weight"]
        if counts_V is None:
            rows = check_count("n", settings["n"]) * check_count("V", settings["vocab_size"])
        else:
            rows = int(counts_V.sum())
        if rows != len(weight_RD):  # before any table of that length is made
            raise SettingError(f"its settings give {rows} rows, its weight has {len(weight_RD)}")
        return super()._blank({**settings, "rows_per_token": counts_V}, tensors)

    def _counts(self, rows_per_token: Any) -> Tensor:
        if rows_per_token is None:
            return torch.full((self.vocab_size,), self.n, device="cpu")
        counts_V = torch.as_tensor(rows_per_token, device="cpu")
        is_whole = not counts_V.is_floating_point() and counts_V.dtype != torch.bool
        if counts_V.shape != (self.vocab_size,) or not is_whole or bool((counts_V < 0).any()):
            raise SettingError(
                f"rows_per_token has shape {tuple(counts_V.shape)} and type {counts_V.dtype}, "
                f"expected {self.vocab_size} whole numbers, 0 or more"
            )
        if not int(counts_V.sum()):
            raise SettingError("rows_per_token gives no token any row")
        return counts_V.long()


def rows_by_frequency(counts: Any, base: float = 10.0) -> Tensor:
    """Rows per token by how often it occurs: max(1, ⌊log_base count⌋), the paper's adaptive n."""
    counts_V = torch.as_tensor(counts).double().clamp(min=1)
    rows_V = (counts_V.log() / torch.tensor(base, dtype=torch.float64).log() + 1e-9).floor()
    return rows_V.long().clamp(min=1)


def rows_by_loss(total_loss: Any, rows: int) -> Tensor:
    """Rows per token in proportion to its total training loss: at least one each, `rows` in all.

    Largest remainders decide where the proportions do not divide; ties go to the lower token.
    """
    loss_V = torch.as_tensor(total_loss).double().clamp(min=0)
    spare = rows - len(loss_V)
    if spare < 0:
        raise SettingError(f"rows is {rows}, expected at least one per token, {len(loss_V)}")
    share_V = loss_V / loss_V.sum().clamp(min=1e-300) * spare
    counts_V = share_V.floor()
    left = spare - int(counts_V.sum())
    order_V = (share_V - counts_V).argsort(descending=True, stable=True)
    counts_V[order_V[:left]] += 1
    return counts_V.long() + 1
