"""generate() without autograd's bookkeeping, where nobody can tell the difference.

transformers generates under `torch.no_grad`, where each operation still passes through autograd,
and makes a tensor that could be trained on. Under `torch.inference_mode` it does neither, by which
a step for one token on the CPU, some hundred small operations, is a twentieth shorter. But its
tensors are marked for good: nothing can be trained on them, and elsewhere they cannot be changed in
place. So the mode is entered only where tokens are all that comes out, and where no code runs but
that of torch, transformers and this package. What a module keeps of the call (some have rotary
frequencies anew for a longer text) loses the mark afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import GenerationConfig

from knnlm_hf.capture import is_own_hook
from knnlm_hf.modeling.heads import heads
from knnlm_hf.modeling.subclass import mixin_of

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
_OUTLIVES = ("return_dict_in_generate", "cache_implementation")
"""Settings by which more than the tokens outlives the call."""
_KNOWN_CODE = (
    "torch.nn.modules.",
    "transformers.models.",
    "transformers.activations",
    "transformers.pytorch_utils",
    "knnlm_hf.",
)


def only_tokens(knn: Any, arguments: dict[str, Any]) -> bool:
    """Whether nothing but tokens will come out of `knn.generate(**arguments)`, by known code."""
    given = {name: value for name, value in arguments.items() if value is not None}
    config = given.get("generation_config", knn.generation_config)
    return (
        given.keys() <= _ARGUMENTS
        and not any(given.get(name, getattr(config, name, None)) for name in _OUTLIVES)
        and not knn.training
        and not torch.is_autocast_enabled(knn.device.type)  # it keeps the weights that it casts
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
        and knn._own.own_forward is None
        and all(cls.__module__.startswith("knnlm_hf.") for cls in _classes(knn))
        and all(map(_is_known, _modules(knn)))
    )


@contextmanager
def inferring(knn: Any) -> Iterator[None]:
    """Inference mode, of which nothing stays in the modules."""
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in _modules(knn):
            for registry in (module._buffers, module.__dict__):
                for name, value in registry.items():
                    if isinstance(value, Tensor) and value.is_inference():
                        registry[name] = value.clone()


def _classes(knn: Any) -> Iterator[type[Any]]:
    """Those in place of which somebody may have one of their own."""
    yield mixin_of(type(knn))
    for memory in knn.memories:
        yield type(memory)
        yield type(getattr(memory, "index", memory))


def _modules(knn: Any) -> Iterator[nn.Module]:
    for root in (knn, *heads(knn.memories)):
        yield from root.modules()


def _is_known(module: nn.Module) -> bool:
    """Whether its code is known, all that is called with it too, and its weights are no more."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return (
        type(module).__module__.startswith(_KNOWN_CODE)
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and all(map(is_own_hook, hooks))
        and all(type(p) is nn.Parameter for p in module._parameters.values() if p is not None)
    )
