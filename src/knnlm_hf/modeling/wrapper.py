"""KNNLMForCausalLM: the equation, as a model of transformers.

    P(w|c) = (1−Σλ_i) · softmax(W_sm · h_sm)  +  Σ λ_i · P_i(w | h_i),   one memory i or several

The wrapper is an object of a *subclass of the model's own class*, made on the fly, that shares the
model's weights. Everything that transformers does with the model it therefore does with the
wrapper; only `forward` differs. What surprises in this file answers to a trap:

- the subclass keeps the name and module of the model's class, by which transformers looks things
  up, and `forward` keeps its signature, which generate, Trainer and lm-eval read;
- memories and λs live in one plain object, so that no parameter, buffer or submodule is added;
- labels are not handed to the model: the loss is the mixture's;
- search and mixture are never traced by torch.compile.

Shape suffixes: B batch, T position, D hidden dimension, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from knnlm_hf.capture import CapturePoint, locate
from knnlm_hf.errors import KNNLMError
from knnlm_hf.memory.text import reads
from knnlm_hf.modeling.clone import forward_slot, rebind, shallow_clone, take_own_forward
from knnlm_hf.modeling.config import KNNLMConfig
from knnlm_hf.modeling.explain import Explanation, explain
from knnlm_hf.modeling.fit import base_of, terms_of, weights_now
from knnlm_hf.modeling.heads import follow, heads
from knnlm_hf.modeling.mixture import Retrieval
from knnlm_hf.modeling.output_layer import StepLinear, for_steps
from knnlm_hf.modeling.saving import Saving
from knnlm_hf.modeling.subclass import mixin_of, subclass
from knnlm_hf.types import check_lmbdas, one_or_all

if TYPE_CHECKING:
    from transformers import GenerationMixin

    class _Model(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
        """What every wrapper also is, at run time: a model that generates."""

else:
    _Model = object

_disabled: ContextVar[frozenset[int]] = ContextVar("knnlm_hf_disabled", default=frozenset())


class KNNLMForCausalLM(Saving, _Model):  # type: ignore[misc, no-untyped-call]
    """A causal language model mixed with a memory, or with several.

        P(w|c) = (1−Σλ_i) · P_LM(w|c)  +  Σ λ_i · P_i(w|c)

    Memories may read different layers. One that has nothing to say (a search without hits) gives
    its share back to the model alone.

    Args:
        model: a causal language model of transformers (or a PEFT model around one). It shares its
            weights with the wrapper, and stays usable as it was. A wrapper is wrapped anew.
        memory: a memory, a `Datastore`, the path or Hub id of a datastore, or a list of these.
        lmbda: λ in [0, 1), the memory's share; for several memories a list of λ_i ≥ 0 with a sum
            below 1 (one number is divided equally). Can be set later: `knn.lmbda = 0.3`.
        layer: another name of the place of `memory.layer` in this model (of several: a list); a
            different place only with `allow_mismatch`.
        allow_mismatch: use a memory that was made with another model, knowingly.

    A memory that is an `nn.Module` (a trained head) goes where the wrapper goes: it is moved to the
    model's device here, and `knn.to(device)` and `knn.eval()` act on it too. Its dtype stays its
    own: `knn.half()` casts the model only. `knn.parameters()` does not have its weights.

    `forward` takes what the model's takes. `logits` are log P(w|c) in float32; `loss` is the
    mixture's mean negative log-likelihood in nats over the shifted labels.

    Raises:
        KNNLMError: no causal language model, another hidden size, a larger vocabulary, λ out of
            range, not as many λs as memories.
        CaptureError: the model has no such layer.
        ModelMismatchError: the memory was made with another model, or for another layer.
    """

    config_class = KNNLMConfig  # of a saved one: the wrapper itself has its model's

    def __new__(
        cls,
        model: Any,
        memory: Any,
        lmbda: float | Sequence[float] = 0.25,
        *,
        layer: str | Sequence[str | None] | None = None,
        allow_mismatch: bool = False,
    ) -> KNNLMForCausalLM:
        """Return a wrapper, which is also an instance of the model's own class."""
        base = model.unwrap() if isinstance(model, KNNLMForCausalLM) else base_of(model)
        terms = terms_of(base, memory, layer, allow_mismatch)
        lmbdas = check_lmbdas(lmbda, len(terms))
        knn: KNNLMForCausalLM = shallow_clone(base, subclass(mixin_of(cls), type(base)))
        output_path = locate(base, "final").path
        output_layer = base.get_submodule(output_path)
        if output_path in knn._modules:  # not deeper: those modules are the model's too
            knn._modules[output_path] = for_steps(output_layer)
        knn.__dict__["_knnlm"] = Retrieval(
            terms,
            lmbdas,
            output_path,
            output_layer,
            tuple(inspect.signature(type(base).forward).parameters)[1:],
            take_own_forward(knn),
            getattr(base, "loss_type", None),
            model._own.weights if isinstance(model, KNNLMForCausalLM) else weights_now(base),
        )
        knn.__dict__["loss_type"] = "ForCausalLM"  # GPT2LMHeadModel and others do not say it
        if "generation_config" in knn.__dict__:
            knn.__dict__["generation_config"] = copy.deepcopy(base.generation_config)
        return knn

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: Python calls it after `__new__`, on an object that is complete."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "memory":  # nn.Module would register a head as a submodule
            self._set_memory(value)
        else:
            super().__setattr__(name, value)

    @property
    def _own(self) -> Retrieval:
        own: Retrieval = self.__dict__["_knnlm"]
        return own

    @property
    def memories(self) -> tuple[Any, ...]:
        """All memories, also where there is one."""
        return tuple(term.memory for term in self._own.terms)

    @property
    def memory(self) -> Any:
        """The memory, of several the tuple; others, as many, can be set."""
        return one_or_all(self.memories)

    def _set_memory(self, memory: Any) -> None:
        own, terms = self._own, terms_of(self.unwrap(), memory)
        if len(terms) != len(own.lmbdas):
            raise KNNLMError(
                f"{len(terms)} memories for {len(own.lmbdas)} lmbdas: "
                "wrap the model anew, with as many of each"
            )
        self.__dict__["_knnlm"] = replace(own, terms=terms)

    @property
    def lmbdas(self) -> tuple[float, ...]:
        """λ of each memory, also where there is one."""
        return self._own.lmbdas

    @property
    def lmbda(self) -> Any:
        """λ, the memory's share of the mixture, 0 ≤ λ < 1; of several memories the tuple.

        Takes for several a list, or one number, which is divided equally.
        """
        return one_or_all(self._own.lmbdas)

    @lmbda.setter
    def lmbda(self, value: Any) -> None:
        self._own.lmbdas = check_lmbdas(value, len(self._own.terms))

    @property
    def capture_points(self) -> tuple[CapturePoint, ...]:
        """Where in the model each memory's states are read."""
        return tuple(term.point for term in self._own.terms)

    @property
    def capture_point(self) -> Any:
        """Where in the model the memory's states are read; of several memories the tuple."""
        return one_or_all(self.capture_points)

    @property
    def weights_when_wrapped(self) -> dict[str, Any]:
        """A sample of the model's weights, by which saving knows whether it was trained since."""
        return self._own.weights

    @contextmanager
    def disable_retrieval(self) -> Iterator[None]:
        """Inside the block this wrapper is exactly its model: same dtype, same loss, bit-equal.

        Holds for the calling thread (and `generate_batch` from it), nests, ends with the block.
        """
        token = _disabled.set(_disabled.get() | {id(self)})
        try:
            yield
        finally:
            _disabled.reset(token)

    @property
    def retrieves(self) -> bool:
        """False inside `disable_retrieval()`."""
        return id(self) not in _disabled.get()

    def unwrap(self) -> PreTrainedModel:
        """Return the model alone, on the same weights."""
        base: type[PreTrainedModel] = type(self)._knnlm_base  # type: ignore[attr-defined]
        model = shallow_clone(self, base)
        del model.__dict__["_knnlm"]
        model.__dict__["loss_type"] = self._own.loss_type
        if isinstance(model._modules.get(self._own.output_path), StepLinear):
            model._modules[self._own.output_path] = self._own.output_layer
        if self._own.own_forward is not None:
            model.__dict__[forward_slot(model)] = rebind(self._own.own_forward, self, model)
        return model

    def explain(
        self,
        input_ids: Any,
        top: int = 5,
        tokenizer: Any = None,
        window: int | None = None,
        stride: int | None = None,
    ) -> list[Explanation]:
        """What the memory says at each position of one text, and from where.

        Args:
            input_ids: (T,) or (1, T) token ids; of any length, for it is read in windows.
            top: neighbours to show at each position, ≥ 1; as many that carry the text's own token.
            tokenizer: for the texts; default: the one kept in the datastore, if any.
            window, stride: as of `score`, so that a token has the probability it has there.

        Raises:
            KNNLMError: more than one text, or a memory without neighbours to show.
            SettingError: top, window or stride out of range.
        """
        return explain(self, input_ids, top, tokenizer, window, stride)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; inside `disable_retrieval()` its worker thread is without it too.

        Raises:
            KNNLMError: a memory reads the text, whose rows are not kept apart there.
        """
        if self.retrieves and (reading := [m for m in self.memories if reads(m)]):
            raise KNNLMError(
                f"generate_batch and continuous batching: a {type(reading[0]).__name__} needs each "
                "text's own KV cache: use generate(), or leave that memory out"
            )
        model: Any = super() if self.retrieves else self.unwrap()
        return model.init_continuous_batching(*args, **kwargs)

    def extra_repr(self) -> str:
        """Show λ and the memory in `print(knn)`."""
        memory = ", ".join(type(memory).__name__ for memory in self.memories)
        return f"lmbda={self.lmbda}, memory={memory}, layer={self._layer!r}"

    def train(self, mode: bool = True) -> Any:
        """As the model's own; heads follow."""
        for head in heads(self.memories):
            head.train(mode)
        return super().train(mode)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Cast or move the model; heads are moved only."""
        follow(self.memories, fn)
        return super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> KNNLMForCausalLM:
        """Copies the model, not its memories."""
        return _rebuild(mixin_of(type(self)), copy.deepcopy(self.unwrap(), memo), *self._settings())

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the model as its own class; a memory pickles itself, or says why not."""
        return _rebuild, (mixin_of(type(self)), self.unwrap(), *self._settings())

    def _settings(self) -> tuple[Any, Any, Any, dict[str, Any]]:
        return self.memory, self.lmbda, self._layer, self._own.weights

    @property
    def _layer(self) -> Any:
        return one_or_all([point.layer for point in self.capture_points])


def _rebuild(
    mixin: type[KNNLMForCausalLM],
    base: Any,
    memory: Any,
    lmbda: Any,
    layer: Any,
    weights: dict[str, Any],
) -> KNNLMForCausalLM:
    knn = mixin(base, memory, lmbda, layer=layer, allow_mismatch=True)
    knn._own.weights = weights
    return knn


AutoModelForCausalLM.register(KNNLMConfig, KNNLMForCausalLM, exist_ok=True)
