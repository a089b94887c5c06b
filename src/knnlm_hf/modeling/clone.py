"""A second object on the same weights: what lets one model be wrapped and stay itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

_BOUND_TO_ONE_OBJECT = (
    "_compiled_call",  # transformers: torch.compile(self.__call__), kept for static caches
    "_last_compile_config",
    "_cached_continuous_batching_manager",
)


def shallow_clone(model: nn.Module, cls: type[M]) -> M:
    """Return an object of class `cls` that shares every weight and submodule of `model`.

    The clone has registries of its own (modules, parameters, buffers, hooks), so that neither
    object sees what is later put on the other's root. What an instance attribute binds to `model`
    (accelerate keeps a `forward` there) is bound to the clone instead, so that no call to the clone
    ends up in `model`.
    """
    clone: M = object.__new__(cls)
    state = {k: v for k, v in model.__dict__.items() if k not in _BOUND_TO_ONE_OBJECT}
    for name, value in state.items():
        is_registry = name in ("_modules", "_parameters", "_buffers") or "_hooks" in name
        if is_registry and hasattr(value, "copy"):
            state[name] = value.copy()
        else:
            state[name] = rebind(value, model, clone)
    state["_compiled_call_impl"] = None  # module.compile() keeps model's own bound __call__ there
    clone.__dict__.update(state)
    return clone


def rebind(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """Return `value`, bound to `new` where it is a method or a partial bound to `old`.

    A method that is the class's own `forward` becomes the new class's own.
    """
    if isinstance(value, MethodType) and value.__self__ is old:
        is_forward = value.__func__ is type(old).forward
        return MethodType(type(new).forward if is_forward else value.__func__, new)
    if isinstance(value, partial) and any(arg is old for arg in value.args):
        args = [new if arg is old else arg for arg in value.args]
        bound = partial(value.func, *args, **value.keywords)
        bound.__dict__.update({k: rebind(v, old, new) for k, v in value.__dict__.items()})
        return bound
    return value


def forward_slot(model: nn.Module) -> str:
    """The attribute whose forward accelerate's hook calls, if it hooked the model."""
    return "_old_forward" if "_hf_hook" in model.__dict__ else "forward"


def take_own_forward(clone: nn.Module) -> Callable[..., Any] | None:
    """Take a forward that was put on the model object off its clone, and return it."""
    slot = forward_slot(clone)
    forward = clone.__dict__.get(slot)
    if forward is None or getattr(forward, "__func__", None) is type(clone).forward:
        return None
    del clone.__dict__[slot]
    if slot == "_old_forward":
        clone.__dict__[slot] = MethodType(type(clone).forward, clone)
    own: Callable[..., Any] = forward
    return own
