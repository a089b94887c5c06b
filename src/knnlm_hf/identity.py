"""Which model a store or a head was made with: plain data to record, and to compare later.

A model is known by a few fields of its config and by a sample of its weights, kept as values: they
may have been rounded to bfloat16 since, or moved to another device, but not trained further. Its
name, dtype, path and library versions are recorded for messages and do not count.

A tokenizer is known by what it does: its vocabulary without tokens added later (a padding token,
say) and its ids for a fixed text. The file it comes from changes with library versions.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from knnlm_hf.errors import KNNLMError, ModelMismatchError

_CONFIG_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "head_dim",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rms_norm_eps",
    "sliding_window",
)
_RELATIVE = 2.0**-7  # one rounding to bfloat16 moves a value by at most 2⁻⁸ of itself
_ABSOLUTE = 2.0**-23  # and one to float16 a tiny one by at most 2⁻²⁵
_SAMPLES = 4096  # values recorded in all
_PER_TENSOR = 8
_PROBE = "The quick brown  Fox's 12,345 jumps!?\n\n\tÜber naïve — 日本語 🙂 <x> ab@c.de\n"


def without_adapters(model: Any) -> Any:
    """The model of transformers inside a PEFT model; any other model is returned as it is.

    Adapters that are layers of it, such as LoRA's, stay at work inside.

    Raises:
        KNNLMError: prompt learning, of which the model inside knows nothing.
    """
    if not hasattr(model, "get_base_model"):
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise KNNLMError(
            f"{type(model).__name__} puts virtual tokens before the text, which the model inside "
            "it does not: prompt learning cannot be used here, expected LoRA or alike"
        )
    return model.get_base_model()


def describe(model: nn.Module, tokenizer: Any = None) -> dict[str, Any]:
    """What `differences` will compare another model with, as JSON-able data.

    Returns:
        {"id", "revision", "architecture": for messages only,
         "config": {field: value}, "weights": {name: {"shape", "sample"}}, "tokenizer": hex | None}
    """
    model = without_adapters(model)
    config: Any = model.config
    return {
        "id": getattr(config, "_name_or_path", "") or None,
        "revision": getattr(config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "config": _config_fields(config),
        "weights": _weights(model),
        "tokenizer": None if tokenizer is None else tokenizer_hash(tokenizer),
    }


def is_description(value: Any) -> bool:
    """Whether it is what `describe` gives, as far as `differences` relies on it."""
    return (
        isinstance(value, dict)
        and {"id", "revision", "architecture", "config", "weights", "tokenizer"} <= value.keys()
        and isinstance(value["config"], dict)
        and isinstance(value["weights"], dict)
        and all(
            isinstance(weight, dict)
            and isinstance(weight.get("shape"), list)
            and isinstance(weight.get("sample"), list)
            and all(isinstance(number, int | float) for number in weight["sample"])
            for weight in value["weights"].values()
        )
    )


def differences(recorded: dict[str, Any], model: nn.Module, tokenizer: Any = None) -> list[str]:
    """How `model` differs from the recorded one, a clause per difference; empty where it is it.

    What only one side has (a tokenizer, weights that are quantised or not in memory) is not
    compared, but a recorded weight whose name the model lacks is a difference.
    """
    model = without_adapters(model)
    config, found = _config_fields(model.config), []
    for field, value in recorded["config"].items():
        if field in config and config[field] != value:
            found.append(f"{field} was {value}, is {config[field]}")
    found += _weight_differences(recorded["weights"], model)
    if tokenizer is not None and recorded["tokenizer"] not in (None, tokenizer_hash(tokenizer)):
        found.append("the tokenizer is another one")
    return found


def check_model(
    recorded: dict[str, Any], model: nn.Module, tokenizer: Any = None, *, made: str, remedy: str
) -> None:
    """Raise `ModelMismatchError` unless `model` is the recorded one.

    Args:
        recorded, model, tokenizer: as for `differences`.
        made: how the message begins, up to the recorded model's name: "… was built with".
        remedy: what to do, other than to override it.
    """
    found = differences(recorded, model, tokenizer)
    if found:
        raise ModelMismatchError(
            f"{made} {name(recorded)}, which is not the model given ({name(describe(model))}): "
            f"{'; '.join(found)}. {remedy}, or wrap with allow_mismatch=True"
        )


def check_tokenizer(recorded: dict[str, Any], tokenizer: Any, *, made: str, remedy: str) -> None:
    """Raise `ModelMismatchError` unless `tokenizer` is the recorded one, or none was recorded.

    Args:
        recorded, tokenizer: as for `differences`.
        made: how the message begins, up to "another tokenizer".
        remedy: what to do.
    """
    if recorded["tokenizer"] not in (None, tokenizer_hash(tokenizer)):
        raise ModelMismatchError(
            f"{made} another tokenizer than "
            f"{getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}: its tokens "
            f"would be other words; {remedy}"
        )


def name(recorded: dict[str, Any]) -> str:
    """How a message calls the recorded model: its id, or its class where it has none."""
    return str(recorded["id"] or f"a {recorded['architecture']} without an id")


def tokenizer_hash(tokenizer: Any) -> str:
    """Sha-256 of the tokenizer's own vocabulary and of its ids for a fixed text."""
    added = tokenizer.get_added_vocab()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "get_vocab"):
        vocab = backend.get_vocab(with_added_tokens=False)
    else:
        vocab = {token: i for token, i in tokenizer.get_vocab().items() if token not in added}
    probe = list(tokenizer(_PROBE, verbose=False)["input_ids"])
    text = json.dumps([sorted(vocab.items(), key=lambda item: (item[1], item[0])), probe])
    return hashlib.sha256(text.encode()).hexdigest()


def _config_fields(config: Any) -> dict[str, Any]:
    config = config.get_text_config(decoder=True)
    values = {field: getattr(config, field, None) for field in _CONFIG_FIELDS}
    return {f: v for f, v in values.items() if isinstance(v, str | int | float)}


def _weights(model: nn.Module) -> dict[str, dict[str, Any]]:
    readable = {n: p for n, p in model.named_parameters() if _readable(p)}
    count = max(1, min(_PER_TENSOR, _SAMPLES // max(1, len(readable))))
    return {
        n: {"shape": list(p.shape), "sample": _sample(p, count).tolist()}
        for n, p in readable.items()
    }


def _readable(parameter: Tensor) -> bool:
    """Whether the values are there: not offloaded, not quantised."""
    is_plain = type(parameter.data) is Tensor  # not a quantised kind that behaves like one
    return (
        is_plain
        and parameter.is_floating_point()
        and not parameter.is_meta
        and parameter.numel() > 0
    )


def _sample(parameter: Tensor, count: int) -> Tensor:
    """`count` values, spread over the tensor by a fixed rule, as float32 on the CPU."""
    numel = parameter.numel()
    # Steps of the golden ratio: spread evenly, and in step with no row length.
    places = (torch.arange(count, dtype=torch.float64) * 0.6180339887498949 + 0.5) % 1.0
    flat = (places * numel).long().clamp(max=numel - 1)
    where = torch.unravel_index(flat.to(parameter.device), tuple(parameter.shape))
    return parameter.detach()[where].float().cpu()


def _weight_differences(recorded: dict[str, Any], model: nn.Module) -> list[str]:
    present = dict(model.named_parameters(remove_duplicate=False))
    lacking = [n for n in recorded if n not in present]
    if lacking:
        return [f"it has no weight {lacking[0]!r} ({len(lacking)} of {len(recorded)} lacking)"]
    reshaped, changed = [], []
    for weight_name, entry in recorded.items():
        parameter = present[weight_name]
        if not _readable(parameter):
            continue
        if list(parameter.shape) != entry["shape"]:
            shapes = f"{tuple(entry['shape'])}, is {tuple(parameter.shape)}"
            reshaped.append(f"the shape of {weight_name!r} was {shapes}")
        elif not _close(torch.tensor(entry["sample"]), parameter):
            changed.append(weight_name)
    if changed:
        reshaped.append(
            f"the values of {len(changed)} of {len(recorded)} weights changed "
            f"({changed[0]!r} the first)"
        )
    return reshaped[:2]


def _close(sample: Tensor, parameter: Tensor) -> bool:
    other = _sample(parameter, len(sample))
    bound = _RELATIVE * torch.maximum(sample.abs(), other.abs()) + _ABSOLUTE
    # NaN is equal to NaN only: a comparison with it is false, and must not pass for "close".
    equal = ((sample - other).abs() <= bound) | (sample.isnan() & other.isnan())
    return bool(equal.all())
