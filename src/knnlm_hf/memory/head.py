"""What every trained memory shares: sizes, shapes and chunks of queries, training, its model.

A kind of head says how hidden states become a distribution (`_log_probs`) and what it is made from
(`settings`); the rest is written here, once.

Shape suffixes: Q query, D dimension, V vocabulary.
"""

from __future__ import annotations

import inspect
from itertools import chain
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from knnlm_hf import identity
from knnlm_hf.datastore import DatastoreReader
from knnlm_hf.errors import KNNLMError, SettingError, first_line
from knnlm_hf.memory.head_files import HeadFiles
from knnlm_hf.memory.kinds import register
from knnlm_hf.memory.recipe import Recipe, Trained, recipe_with
from knnlm_hf.memory.start import start_from
from knnlm_hf.memory.training import train
from knnlm_hf.types import check_count

_CHUNK_ELEMENTS = 1 << 24  # logits held at a time
_SIZES = ("hidden_size", "vocab_size", "layer")
RECIPE_FIELDS = Recipe.__dataclass_fields__


class Head(HeadFiles, nn.Module):
    """A memory that was trained on a datastore and needs it no longer.

    A subclass sets `kind`, defines `_log_probs` and extends `settings`, from which its constructor
    makes an equal head; what it learned are its parameters and buffers. It may define
    `_token_log_probs` and `forward` where it can do without the whole distribution, `_fit` where
    its training is not `memory.training.train`, and `_width` where it makes more than V numbers
    per query.

    Its constructor must also work under `torch.device("meta")`, by which `from_pretrained` makes a
    head without its numbers: a buffer that is not saved (`persistent=False`) is made on a device
    that it names.

    Args:
        hidden_size: D, the width of the captured states.
        vocab_size: V.
        layer: the representation it reads, as for a datastore.

    Raises:
        SettingError: a size below 1, a layer that is no name.
    """

    kind: ClassVar[str]
    """Its name in files and on the command line."""
    usual: ClassVar[Recipe] = Recipe()
    """How its kind is trained unless one says otherwise."""
    always_speaks: ClassVar[bool] = False
    """Whether no state is ever given −inf for all tokens; then a mixture need not look for that."""

    trained: Trained | None
    """What training did; None for a head that was not trained by `train_on`."""
    origin: dict[str, Any] | None
    """The model whose states it was trained on, as `identity.describe` records it."""

    def __init__(self, hidden_size: int, vocab_size: int, layer: str = "att") -> None:
        super().__init__()
        self.hidden_size = check_count("hidden_size", hidden_size)
        self.vocab_size = check_count("vocab_size", vocab_size)
        if not isinstance(layer, str) or not layer:
            raise SettingError(f"layer is {layer!r}, expected att, ffn, final or a module path")
        self.layer = layer
        self.trained = None
        self.origin = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in cls.__dict__:
            register(cls)

    @classmethod
    def train_on(
        cls,
        store: DatastoreReader,
        *,
        recipe: Recipe | None = None,
        checkpoint: str | Path | None = None,
        device: str | torch.device | None = None,
        teacher: Any = None,
        alpha: float = 0.5,
        start: nn.Module | None = None,
        progress: bool = True,
        **settings: Any,
    ) -> Self:
        """Train a head on a datastore: its keys are the inputs, its values the targets.

        No forward pass of the model. Entries are read in shuffled runs from the mapped shards, a
        part is held out for early stopping, and the best weights are kept. The same seed gives the
        same head on the same device.

        Args:
            store: the datastore; the head reads its layer and remembers its model.
            recipe: how to train, see `Recipe`; None: what is `usual` for the kind.
            checkpoint: folder to write after every epoch; a killed run continues from it. It stays
                when training is over, and the same call then gives the same head at once: remove it
                when the head is saved.
            device: where to train; default: CUDA where there is one.
            teacher: a kNN memory on the store, or its answers kept before (`SoftTargets` or their
                folder), to learn from as well; see `memory.distillation`.
            alpha: with a teacher, the share of the next tokens' own loss, 0 … 1.
            start: the store's model, whose output embeddings the rows then start at (see
                `memory.start`); None: rows from N(0, 1/D), as in the paper.
            progress: show loss and perplexity on stderr.
            settings: fields of the recipe to change, such as `epochs=3, lr=1e-3`, and arguments
                of the head, such as `n=3`.

        Raises:
            SettingError: a setting out of range or unknown.
            KNNLMError: keys that are not finite, a loss that diverges, a token without a row.
        """
        of_recipe = settings.keys() & RECIPE_FIELDS.keys()
        recipe = recipe_with(recipe or cls.usual, {name: settings.pop(name) for name in of_recipe})
        recipe.check()
        torch.manual_seed(recipe.seed)
        sizes = {"hidden_size": store.dim, "vocab_size": store.vocab_size, "layer": store.layer}
        head = cls._made(sizes | settings)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            head.to(device)
        except (AssertionError, RuntimeError) as error:
            raise SettingError(f"device is {str(device)!r}: {first_line(error)}") from error
        head.origin = store.manifest.model
        if start is not None:
            start_from(head, start, store)
        taught: dict[str, Any] = {}
        if teacher is not None:
            from knnlm_hf.memory.distillation import distilled_loss

            loss, about = distilled_loss(head, store, teacher, alpha, progress)
            taught = {"loss": loss, "teacher": about}
        head.trained = head._fit(store, recipe, checkpoint=checkpoint, progress=progress, **taught)
        return head

    def settings(self) -> dict[str, Any]:
        """`kind` and the constructor's arguments, as plain data; what is learned is not among it.

        A subclass returns `super().settings() | {…}`.
        """
        return {
            "kind": self.kind,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "layer": self.layer,
        }

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._any_tensor().device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; sums and results are in float32 (float64 for float64)."""
        return self._any_tensor().dtype

    def extra_repr(self) -> str:
        """Show the settings in `print(head)`."""
        shown = {name: value for name, value in self.settings().items() if name != "kind"}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of every token: (..., D) → (..., V) float32."""
        parts = [self._log_probs(chunk_QD) for chunk_QD in self._chunks(self._flat(hidden))]
        log_probs_QV = parts[0] if len(parts) == 1 else torch.cat(parts)
        return log_probs_QV.reshape(*hidden.shape[:-1], self.vocab_size)

    def token_log_probs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability of one token per state: (..., D), (...) → (...) float32."""
        hidden_QD, tokens_Q = self._flat(hidden), self._flat_tokens(tokens, hidden)
        pairs = zip(self._chunks(hidden_QD), self._chunks(tokens_Q), strict=True)
        return torch.cat([self._token_log_probs(*pair) for pair in pairs]).reshape(tokens.shape)

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Mean −log p(token) in nats, for training: (..., D), (...) → scalar."""
        return -self._token_log_probs(
            self._flat(hidden), self._flat_tokens(tokens, hidden)
        ).mean()  # fmt: skip

    def check_model(self, model: nn.Module) -> None:
        """Raise `ModelMismatchError` unless it was trained on states of (a cast of) this model.

        A head of which it is not known takes any.
        """
        if self.origin is not None:
            identity.check_model(
                self.origin, model, made="this head was trained on states of",
                remedy="Load the model it was trained on, train a head for this one",
            )  # fmt: skip

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise `ModelMismatchError` unless its store's text was read with this tokenizer."""
        if self.origin is not None:
            identity.check_tokenizer(
                self.origin, tokenizer, made="this head was trained on the text of",
                remedy="load the tokenizer of its datastore",
            )  # fmt: skip

    def _log_probs(self, hidden_QD: Tensor) -> Tensor:
        """(Q, D) of the head's device and dtype → (Q, V) float32."""
        raise NotImplementedError

    def _token_log_probs(self, hidden_QD: Tensor, tokens_Q: Tensor) -> Tensor:
        """(Q, D), (Q,) on the head's device → (Q,) float32."""
        return self._log_probs(hidden_QD).gather(1, tokens_Q[:, None])[:, 0]

    @property
    def _width(self) -> int:
        """Numbers made per query, by which the chunks of queries are sized."""
        return self.vocab_size

    def _fit(self, store: DatastoreReader, recipe: Recipe, **options: Any) -> Trained:
        """Learn from the store, in place; `options` are those of `memory.training.train`."""
        return train(self, store, recipe, **options)

    @classmethod
    def _made(cls, settings: dict[str, Any]) -> Self:
        """A head of these settings, without `kind`; one line for those it does not have."""
        known = [name for name in inspect.signature(cls).parameters if name not in _SIZES]
        unknown = settings.keys() - {*known, *_SIZES}
        if unknown:
            raise SettingError(
                f"unknown setting {', '.join(map(str, unknown))}: {cls.__name__} has "
                f"{', '.join(known) or 'none'}; a recipe has {', '.join(RECIPE_FIELDS)}"
            )
        try:
            return cls(**settings)
        except KNNLMError:
            raise
        except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            said = ", ".join(f"{name}={shortened(value)}" for name, value in settings.items())
            raise SettingError(
                f"no {cls.__name__} can be made with {said}: {first_line(error)}"
            ) from error

    @classmethod
    def _blank(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """A head of these settings (without `kind`) for saved tensors, on no device yet.

        Neither settings nor tensors are trusted: nothing is allocated by what the settings claim.
        """
        with torch.device("meta"):
            return cls._made(settings)

    def _chunks(self, rows_Q: Tensor) -> tuple[Tensor, ...]:
        most = max(1, _CHUNK_ELEMENTS // self._width)
        return (rows_Q,) if len(rows_Q) <= most else torch.split(rows_Q, most)

    def _flat(self, hidden: Tensor) -> Tensor:
        """(..., D) → (Q, D), of the head's device and dtype."""
        if hidden.shape[-1] != self.hidden_size:
            raise KNNLMError(
                f"hidden states are {hidden.shape[-1]}-d, this head reads {self.hidden_size}-d "
                f"states of layer {self.layer!r}: use the model it was trained with"
            )
        like = self._any_tensor()
        return hidden.reshape(-1, self.hidden_size).to(like.device, like.dtype)

    def _flat_tokens(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """(...) → (Q,), on the head's device."""
        if tokens.shape != hidden.shape[:-1]:
            raise KNNLMError(
                f"tokens have shape {tuple(tokens.shape)}, expected {tuple(hidden.shape[:-1])}, "
                "one per hidden state"
            )
        return tokens.reshape(-1).to(self.device)

    def _targets(self, tokens: Tensor, weights: Tensor | None, hidden: Tensor) -> Tensor:
        """(...) → (Q, 1), or (..., T) with weights of that shape → (Q, T), on the head's device."""
        if weights is None:
            return self._flat_tokens(tokens, hidden)[:, None]
        if tokens.shape != weights.shape or tokens.shape[:-1] != hidden.shape[:-1]:
            raise KNNLMError(
                f"tokens have shape {tuple(tokens.shape)} and weights {tuple(weights.shape)}, "
                f"expected {tuple(hidden.shape[:-1])} and T targets, both"
            )
        return tokens.reshape(-1, tokens.shape[-1]).to(self.device)

    def _any_tensor(self) -> Tensor:
        """A parameter, or a floating-point buffer."""
        own = self._parameters.values()  # once more, for these are soon found
        tensors = chain(own, self.parameters(), self.buffers())
        return next(t for t in tensors if t is not None and t.is_floating_point())


def first_rows(count: int, hidden_size: int) -> nn.Parameter:
    """(count, D) rows to begin with, of variance 1/D; without numbers on the meta device.

    There even a multiplication would import torch's reference kernels, for seconds.
    """
    rows_RD = torch.empty(count, hidden_size)
    return nn.Parameter(rows_RD if rows_RD.is_meta else rows_RD.normal_().mul_(hidden_size**-0.5))


def exact(values: Tensor) -> Tensor:
    """In float32, or in float64 where it is that already: what sums and results are in."""
    return values if values.dtype == torch.float64 else values.float()
