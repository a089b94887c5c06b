"""MultiEmbeddingHead: a trained matrix in place of the datastore, and no retrieval.

    p(w | h) = Σ_{r ∈ rows(w)} exp(h · W_r / t + b_r)  /  Σ_r exp(h · W_r / t + b_r)

W has n·V rows, n for each token (or as many as the token is given); n = 1 is the paper's V×D
matrix (section 4). Probabilities of a token's rows are summed, as M does with a token's neighbours.

Shape suffixes: Q query, R row, D dimension, V vocabulary, M rows of one token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knnlm_hf.datastore import DatastoreReader
from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.memory.head_loss import head_loss
from knnlm_hf.memory.training import Recipe, Trained, recipe_with, train
from knnlm_hf.types import check_count, check_temperature

_CHUNK_ELEMENTS = 1 << 24  # logits held at a time


class MultiEmbeddingHead(nn.Module):
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

    row_tokens: Tensor
    target_rows: Tensor

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
        super().__init__()
        self.trained: Trained | None = None
        self.hidden_size = check_count("hidden_size", hidden_size)
        self.vocab_size = check_count("vocab_size", vocab_size)
        self.n = check_count("n", n)
        self.layer = layer
        self.temperature = check_temperature(temperature)
        counts_V = self._counts(rows_per_token)
        self.register_buffer("row_tokens", torch.arange(vocab_size).repeat_interleave(counts_V))
        self.register_buffer("target_rows", _rows_of_tokens(counts_V), persistent=False)
        rows = int(counts_V.sum())
        self.weight = nn.Parameter(torch.randn(rows, hidden_size) * hidden_size**-0.5)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None
        self._is_uniform = bool((counts_V == counts_V[0]).all())

    @classmethod
    def train_on(
        cls,
        store: DatastoreReader,
        n: int = 3,
        *,
        rows_per_token: Any = None,
        temperature: float = 1.0,
        bias: bool = False,
        recipe: Recipe | None = None,
        checkpoint: str | Path | None = None,
        device: str | torch.device | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> MultiEmbeddingHead:
        """Train a head on a datastore: its keys are the inputs, its values the targets.

        No forward pass of the model. Entries are read in shuffled runs from the mapped shards, a
        part is held out for early stopping, and the best weights are kept. The same seed gives the
        same head on the same device.

        Args:
            store: the datastore; the head reads its layer.
            n: rows of every token; `rows_per_token`, `temperature` and `bias` as for the head.
            recipe: how to train, see `Recipe`; `settings` change single fields of it, such as
                `epochs=3, lr=1e-3`.
            checkpoint: folder to write after every epoch; a killed run continues from it.
            device: where to train; default: CUDA where there is one.
            progress: show loss and perplexity on stderr.

        Raises:
            SettingError: a setting out of range or unknown.
            KNNLMError: keys that are not finite, a loss that diverges, a token without a row.
        """
        recipe = recipe_with(recipe, settings)
        torch.manual_seed(recipe.seed)
        head = cls(
            store.dim, store.vocab_size, n, store.layer,
            rows_per_token=rows_per_token, temperature=temperature, bias=bias,
        )  # fmt: skip
        head.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        head.trained = train(head, store, recipe, checkpoint=checkpoint, progress=progress)
        return head

    def extra_repr(self) -> str:
        """Show the sizes in `print(head)`."""
        rows = len(self.row_tokens)
        return f"D={self.hidden_size}, V={self.vocab_size}, rows={rows}, layer={self.layer!r}"

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of every token: (..., D) → (..., V) float32."""
        hidden_QD = self._flat(hidden)
        step = max(1, _CHUNK_ELEMENTS // len(self.row_tokens))
        parts = [self._distribution(chunk_QD) for chunk_QD in torch.split(hidden_QD, step)]
        return torch.cat(parts).reshape(*hidden.shape[:-1], self.vocab_size)

    def token_log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability of one token per state: (..., D), (...) → (...) float32."""
        if tokens.shape != hidden.shape[:-1]:
            raise KNNLMError(
                f"tokens have shape {tuple(tokens.shape)}, expected {tuple(hidden.shape[:-1])}, "
                "one per hidden state"
            )
        hidden_QD = self._flat(hidden)
        rows_QM = self.target_rows[tokens.reshape(-1).to(self.target_rows.device)]
        step = max(1, _CHUNK_ELEMENTS // len(self.row_tokens))
        parts = []
        for chunk_QD, chunk_QM in zip(
            torch.split(hidden_QD, step), torch.split(rows_QM, step), strict=True
        ):
            logits_QR = self._logits(chunk_QD)
            own_QM = logits_QR.gather(1, chunk_QM.clamp(min=0))
            own_QM = own_QM.masked_fill(chunk_QM < 0, -torch.inf)
            parts.append(own_QM.logsumexp(1) - logits_QR.logsumexp(1))
        return torch.cat(parts).reshape(tokens.shape)

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Mean −log p(token) in nats, for training: (..., D), (...) → scalar; see `head_loss`.

        Raises:
            KNNLMError: a token without rows has no likelihood to train.
        """
        rows_QM = self.target_rows[tokens.reshape(-1)]
        if bool((rows_QM[:, 0] < 0).any()):
            token = int(tokens.reshape(-1)[rows_QM[:, 0] < 0][0])
            raise KNNLMError(f"token {token} has no row in this head: give it one, or leave it out")
        return head_loss(self._flat(hidden) / self.temperature, self.weight, self.bias, rows_QM)

    def _logits(self, hidden_QD: Tensor) -> Tensor:
        """(Q, R), float32 (float64 for float64 weights)."""
        exact = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        logits_QR = (hidden_QD.to(self.weight.dtype) @ self.weight.T).to(exact) / self.temperature
        return logits_QR if self.bias is None else logits_QR + self.bias

    def _distribution(self, hidden_QD: Tensor) -> Tensor:
        logits_QR = self._logits(hidden_QD)
        all_Q1 = logits_QR.logsumexp(1, keepdim=True)
        if self._is_uniform:
            logits_QVM = logits_QR.view(len(logits_QR), self.vocab_size, -1)
            return torch.logsumexp(logits_QVM, dim=2) - all_Q1
        shape = (logits_QR.shape[0], self.vocab_size)
        tokens_QR = self.row_tokens.expand_as(logits_QR)
        peak_QV = logits_QR.new_full(shape, -torch.inf)
        peak_QV = peak_QV.scatter_reduce(1, tokens_QR, logits_QR.detach(), "amax")
        relative_QR = (logits_QR - peak_QV.gather(1, tokens_QR)).exp()
        total_QV = logits_QR.new_zeros(shape).index_add(1, self.row_tokens, relative_QR)
        return torch.where(total_QV > 0, peak_QV + total_QV.log(), -torch.inf) - all_Q1

    def _flat(self, hidden: Tensor) -> Tensor:
        if hidden.shape[-1] != self.hidden_size:
            raise KNNLMError(
                f"hidden states are {hidden.shape[-1]}-d, this head reads {self.hidden_size}-d "
                f"states of layer {self.layer!r}: use the model it was trained with"
            )
        return hidden.reshape(-1, self.hidden_size).to(self.weight.device)

    def _counts(self, rows_per_token: Any) -> Tensor:
        if rows_per_token is None:
            return torch.full((self.vocab_size,), self.n)
        counts_V = torch.as_tensor(rows_per_token)
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


def _rows_of_tokens(counts_V: Tensor) -> Tensor:
    """(V, M): the rows of each token, −1 past its last."""
    last_V = counts_V.cumsum(0)
    offset_M = torch.arange(int(counts_V.max()))
    rows_VM = (last_V - counts_V)[:, None] + offset_M
    return torch.where(offset_M < counts_V[:, None], rows_VM, -1)
