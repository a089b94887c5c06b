"""The class of a wrapper: a subclass of its model's own class, made on the fly.

It keeps the name and module of the model's class, by which transformers looks things up, and the
signatures of its `forward`, which generate, Trainer and lm-eval read, and of its `generate`.
"""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from knnlm_hf.modeling.generating import generated
from knnlm_hf.modeling.mixture import Retrieval, as_it_is, mixed_forward
from knnlm_hf.modeling.skipping import choosing_the_likeliest

_classes: dict[tuple[type, type], type[Any]] = {}


def subclass(mixin: type[Any], base: type[PreTrainedModel]) -> type[Any]:
    """The class of wrappers around models of class `base`, made once."""
    if (mixin, base) not in _classes:
        _classes[mixin, base] = _new_subclass(mixin, base)
    return _classes[mixin, base]


def _new_subclass(mixin: type[Any], base: type[PreTrainedModel]) -> type[Any]:

    @wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own: Retrieval | None = self.__dict__.get("_knnlm")
        inner = (own and own.own_forward) or base.forward.__get__(self)
        if own is None or not self.retrieves:
            return inner(*args, **kwargs)
        return mixed_forward(self, own, inner, args, kwargs)

    # generate() asks for it at every step; to find it behind `wraps` takes longer than to mix
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    members = {
        "__module__": base.__module__,
        "__doc__": base.__doc__,
        "config_class": base.config_class,
        "_knnlm_base": base,
        "_knnlm_mixin": mixin,
        "forward": as_it_is(forward),
    }
    if hasattr(base, "generate") and not hasattr(mixin, "generate"):  # a user's subclass may
        members["generate"] = _generate(base)
    if hasattr(base, "_sample") and not hasattr(mixin, "_sample"):
        members["_sample"] = _sample
    return type(base.__name__, (mixin, base), members)


def _generate(base: type[Any]) -> Any:

    @wraps(base.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = base.generate.__get__(self)
        if "_knnlm" not in self.__dict__ or not self.retrieves:
            return inner(*args, **kwargs)
        return generated(self, inner, args, kwargs)

    return generate


@wraps(GenerationMixin._sample)
def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
    with choosing_the_likeliest(self, kwargs):
        return type(self)._knnlm_base._sample(self, *args, **kwargs)


def mixin_of(cls: type[Any]) -> type[Any]:
    """KNNLMForCausalLM, or the user's subclass of it, behind a class made by `subclass`."""
    mixin: type[Any] = cls.__dict__.get("_knnlm_mixin", cls)
    return mixin
