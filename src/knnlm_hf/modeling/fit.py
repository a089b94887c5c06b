"""What can be wrapped, whether memories fit it, and whether it was changed since."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from knnlm_hf import identity
from knnlm_hf.capture import CapturePoint, find, locate
from knnlm_hf.errors import KNNLMError, ModelMismatchError
from knnlm_hf.memory.base import Memory, as_memory
from knnlm_hf.memory.text import reads
from knnlm_hf.modeling.heads import bring
from knnlm_hf.types import each


def base_of(model: Any) -> PreTrainedModel:
    """The model of transformers that is to be wrapped."""
    model = identity.without_adapters(model)
    if not isinstance(model, PreTrainedModel):
        hint = " (wrap first, then torch.compile)" if hasattr(model, "_orig_mod") else ""
        raise KNNLMError(
            f"cannot wrap {type(model).__name__}: expected a causal language model of transformers"
            f", such as AutoModelForCausalLM.from_pretrained gives{hint}"
        )
    if model.config.is_encoder_decoder or not _has_head(model):
        kind = "an encoder-decoder" if model.config.is_encoder_decoder else "without an LM head"
        raise KNNLMError(
            f"cannot wrap {type(model).__name__}, a model {kind}: expected a causal language model,"
            " such as AutoModelForCausalLM.from_pretrained gives"
        )
    return model


def _has_head(model: Any) -> bool:
    return model.get_output_embeddings() is not None and model.can_generate()


@dataclass(frozen=True, eq=False)
class Term:
    """One memory of the mixture, and where it reads the model."""

    memory: Memory
    point: CapturePoint
    """Where its states are captured."""
    sliced: bool
    """Whether the states there are already only those of the positions with logits."""


def terms_of(
    model: PreTrainedModel, memory: Any, layer: Any = None, allow_mismatch: bool = False
) -> tuple[Term, ...]:
    """Return the terms of `memory`, one or a list of them, after checking that each fits `model`.

    Heads are moved to the model's device.

    Args:
        model: from `base_of`.
        memory: what `as_memory` takes, or a list or tuple of that.
        layer: another name of the memory's place, or one for each (None: its own).
        allow_mismatch: take what was made with another model or for another layer.
    """
    sources = memory if isinstance(memory, list | tuple) else [memory]
    if not sources:
        raise KNNLMError("no memory given: expected one, or a list of at least one")
    terms = []
    for source, name in zip(sources, each("layer", layer, len(sources)), strict=True):
        one = as_memory(source)
        point = check_fit(model, one, name or one.layer, allow_mismatch)
        sliced = after_slicing(model, point)
        if sliced and reads(one):
            raise KNNLMError(
                f"layer {point.layer!r} has states only where there are logits, and a "
                f"{type(one).__name__} needs those of the whole text: choose att or ffn"
            )
        terms.append(Term(one, point, sliced))
    bring((term.memory for term in terms), model)
    return tuple(terms)


def check_fit(
    model: PreTrainedModel, memory: Memory, layer: str, allow_mismatch: bool
) -> CapturePoint:
    """Return where to capture, after checking that `memory` fits `model`."""
    point = find(model, layer)
    if layer != memory.layer and not allow_mismatch:
        theirs = locate(model, memory.layer)
        if (theirs.path, theirs.side) != (point.path, point.side):
            raise ModelMismatchError(
                f"the memory holds states of layer {memory.layer!r}, asked to read {layer!r}: "
                "leave layer out, make the memory anew, or pass allow_mismatch=True"
            )
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weight = getattr(head, "weight", None)
    config = model.config.get_text_config(decoder=True)
    vocab_size = config.vocab_size if weight is None else weight.shape[0]
    hidden_size = config.hidden_size if layer in ("att", "ffn") else None
    if layer == "final" and weight is not None:
        hidden_size = weight.shape[1]
    if hidden_size is not None and hidden_size != memory.hidden_size:
        raise KNNLMError(
            f"the memory has {memory.hidden_size}-d states (layer {layer!r}), "
            f"{type(model).__name__} gives {hidden_size}-d: use the model it was made with, or "
            "make it anew"
        )
    if memory.vocab_size > vocab_size:
        raise KNNLMError(
            f"the memory has {memory.vocab_size} tokens, {type(model).__name__} only {vocab_size}: "
            "use the model it was made with, or make it anew"
        )
    check_model = getattr(memory, "check_model", None)
    if check_model is not None and not allow_mismatch:
        check_model(model)
    return point


def after_slicing(model: PreTrainedModel, point: CapturePoint) -> bool:
    """Whether `logits_to_keep` has done its work before the states reach `point`."""
    head = locate(model, "final").path
    return point.path == head or point.path.startswith(f"{head}.")


def weights_now(model: PreTrainedModel) -> dict[str, Any]:
    """A sample of the weights, for `was_changed` to compare with later."""
    return {"dtype": model.dtype, "weights": identity.describe(model)["weights"]}


def was_changed(model: PreTrainedModel, before: dict[str, Any]) -> bool:
    """Whether a weight was trained or set, which a reference to the original would lose.

    torch counts updates in place (fused optimizers do not), from_pretrained leaves the count at 0,
    and casts and moves do not add to it; the sample tells the rest. In the same dtype it must be
    equal exactly, in another one up to rounding.
    """
    if any(p._version > 0 for p in model.parameters() if not p.is_inference()):
        return True
    now, then = weights_now(model), before["weights"]
    if now["dtype"] != before["dtype"]:
        return bool(identity.differences({"config": {}, "weights": then, "tokenizer": None}, model))
    return any(now["weights"][name] != then[name] for name in then.keys() & now["weights"].keys())
