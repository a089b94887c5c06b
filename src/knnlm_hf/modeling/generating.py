"""generate() without autograd's bookkeeping, where nobody can tell the difference.

transformers generates under `torch.no_grad`, where each operation still passes through autograd,
and makes a tensor that could be trained on. Under `torch.inference_mode` it does neither, by which
a step for one token on the CPU, some hundred small operations, is a twentieth shorter. But its
tensors are marked for good: nothing can be trained on them, and elsewhere they cannot be changed in
place. So the mode is entered only where tokens are all that comes out, and where all code that runs
is known: that of torch, transformers, faiss and this package. What a module keeps of the call (some
have rotary frequencies anew for a longer text) loses the mark afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_modules
from transformers import GenerationConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from knnlm_hf.capture import has_other_hooks, is_listening
from knnlm_hf.modeling.heads import heads

_ARGUMENTS = {
    "inputs",
    "input_ids",
    "attention_mask",
    "generation_config",
    "stopping_criteria",
    "streamer",
    "tokenizer",
} | vars(GenerationConfig()).keys()  # type: ignore[no-untyped-call]
"""Of generate(); none is filled by it, as a KV cache is, and none has a use for gradients."""
_OUTLIVES = ("return_dict_in_generate", "cache_implementation", "stop_strings")
"""Settings by which more than the tokens outlives the call."""
_KNOWN_MODULES = (
    "torch.nn.modules.",
    "transformers.models.",
    "transformers.activations",
    "transformers.pytorch_utils",
    "knnlm_hf.",
)
_KNOWN_CODE = ("torch.", "transformers.", "faiss.", "knnlm_hf.")
_now: ContextVar[Any] = ContextVar("knnlm_hf_generating", default=None)


def generated(
    knn: Any, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What `inner`, the model's own generate, returns; in inference mode where it can be.

    Not where arguments are given by their place, but for the first: it would have to be known what
    they are.
    """
    is_quick = len(args) <= 1 and _only_tokens(knn, kwargs)
    before = _now.set(knn if is_quick else None)
    try:
        with _inferring(knn) if is_quick else nullcontext():
            made = inner(*args, **kwargs)
    finally:
        _now.reset(before)
    return made.clone() if is_quick and isinstance(made, Tensor) else made


def is_giving_only_tokens(knn: Any) -> bool:
    """Whether the generate() that is at work here is this wrapper's, and in inference mode."""
    return _now.get() is knn


def _only_tokens(knn: Any, arguments: dict[str, Any]) -> bool:
    """Whether nothing but tokens will come out of `knn.generate(**arguments)`, by known code."""
    given = {name: value for name, value in arguments.items() if value is not None}
    visitors = [*given.get("stopping_criteria", ()), given.get("streamer")]
    return (
        knn._own.own_forward is None
        and not any(root.training for root in _roots(knn))
        and given.keys() <= _ARGUMENTS
        and not any(_setting(knn, given, name) for name in _OUTLIVES)
        and all(map(is_known, (type(knn)._knnlm_mixin, type(knn)._knnlm_base.forward)))
        and all(map(_is_known_object, (*visitors, *_parts(knn))))
        and not any(map(has_other_hooks, _roots(knn)))
        and all(map(_is_plain, _modules(knn)))
        and _nothing_around(knn.device.type)
    )


def _setting(knn: Any, given: dict[str, Any], name: str) -> Any:
    """As transformers has it: of the call, of its config, else of the model's."""
    if name in given:
        return given[name]
    found = getattr(given.get("generation_config"), name, None)
    return getattr(knn.generation_config, name, None) if found is None else found


def _parts(knn: Any) -> Iterator[Any]:
    """What a user may have made of their own, or changed, beside modules."""
    for memory in knn.memories:
        index = getattr(memory, "index", None)
        yield from (memory, index, getattr(index, "keys", None))


def _is_known_object(one: Any) -> bool:
    """Whether its class is known, and what it was given beside the code of that; None is."""
    if one is None:
        return True
    own = getattr(one, "__dict__", {})
    has_known_code = is_known(type(one)) and all(map(is_known, _functions(own)))
    return has_known_code and _is_known_object(own.get("tokenizer"))


def _functions(own: dict[str, Any]) -> list[Any]:
    """Those that an object was given, beside its class's."""
    return [value for value in own.values() if type(value) in (FunctionType, MethodType)]


def is_known(code: Any) -> bool:
    """Whether a class, or a function and all that it wraps, is ours or of a library of ours."""
    while code is not None:
        code = getattr(code, "__func__", code)
        # subtle: functools.wraps gives a function the module of another, but not its globals.
        home = getattr(code, "__globals__", {"__name__": getattr(code, "__module__", "")})
        if not str(home["__name__"]).startswith(_KNOWN_CODE):
            return False
        code = getattr(code, "__wrapped__", None)
    return True


def _is_plain(module: nn.Module) -> bool:
    """Whether its code, and what it was given beside that of its class, is known.

    And its weights plain ones.
    """
    own = module.__dict__
    config = own.get("config")
    attention = ALL_ATTENTION_FUNCTIONS.get(getattr(config, "_attn_implementation", None))
    return (
        type(module).__module__.startswith(_KNOWN_MODULES)
        and "forward" not in own
        and module._compiled_call_impl is None
        and all(map(is_known, (type(module).forward, *_functions(own))))
        and (attention is None or is_known(attention))
        and all(type(p) is nn.Parameter for p in module._parameters.values() if p is not None)
    )


def _nothing_around(device: str) -> bool:
    """Whether nothing looks on from outside, and autocast keeps no weights that it casts."""
    modes = torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack()
    hooks = of_modules._global_forward_hooks or of_modules._global_forward_pre_hooks
    watched = modes or hooks or is_listening()
    return not watched and device != "meta" and not torch.is_autocast_enabled(device)


@contextmanager
def _inferring(knn: Any) -> Iterator[None]:
    """Inference mode, of which nothing stays in the modules."""
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in _modules(knn):
            for registry in (module._buffers, module.__dict__):
                for name, value in list(registry.items()):
                    if isinstance(value, Tensor) and value.is_inference():
                        registry[name] = value.clone()


def _roots(knn: Any) -> list[nn.Module]:
    """The wrapper and its heads, which are no submodules of it."""
    return [knn, *heads(knn.memories)]


def _modules(knn: Any) -> Iterator[nn.Module]:
    for root in _roots(knn):
        yield from root.modules()
