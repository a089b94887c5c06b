"""No search where it cannot change the token: greedy generation skips those steps.

Whatever a memory says, of all probability it gives one token at most all of its share λ:

    (1−λ)·p₁ > (1−λ)·p₂ + λ   ⇔   p₁ − p₂ > λ/(1−λ)

of the model's two likeliest tokens. Where that holds the mixture's likeliest token is the model's,
and greedy generation asks for nothing else. So the tokens are those of the mixture, to the last
one, with fewer searches: how many fewer depends on how sure the model is, and on λ (none from ½
on).

Every step searches where more than the tokens comes out, where code of the user's runs inside
(see `generating`), where tokens are drawn, or chosen by more than their probability, where several
texts are generated at once, on a GPU, and where the search was begun while the model went on (see
`ahead`). So does the first step, by which a memory that does not fit is found out.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import (
    GenerationMixin,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)

from knnlm_hf.modeling.generating import is_giving_only_tokens, is_known

_DELAY_THE_END = {MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor}
"""They set the end's tokens to −inf and leave all others as they are."""
_SEE_LOGITS = ("_sample", "_prefill", "_update_model_kwargs_for_generation")
"""Methods of a model in transformers that are given its output, or call it."""
_ROUNDING = 1e-4
"""Far more than the float32 mixture errs by."""


@dataclass
class _Choice:
    knn: Any
    """The wrapper whose tokens are chosen."""
    ends: frozenset[int]
    """Tokens that may be forbidden at a step."""
    has_begun: bool = False


_choosing: ContextVar[_Choice | None] = ContextVar("knnlm_hf_choosing", default=None)


@contextmanager
def choosing_the_likeliest(knn: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Let the wrapper skip its memories inside the block, if the likeliest token is all it needs.

    Args:
        knn: the wrapper.
        settings: what its generate() gives transformers' method that chooses tokens, by name.
    """
    before = _choosing.set(_choice(knn, **settings))
    try:
        yield
    finally:
        _choosing.reset(before)


def _choice(
    knn: Any, /, generation_config: Any = None, logits_processor: Any = None, **_: Any
) -> _Choice | None:
    if generation_config is None or logits_processor is None or not is_giving_only_tokens(knn):
        return None
    if generation_config.do_sample or {*map(type, logits_processor)} - _DELAY_THE_END:
        return None
    model = type(knn)._knnlm_base
    is_usual = model._sample is GenerationMixin._sample  # one of its own may do anything
    if not is_usual or not all(is_known(getattr(model, name, None)) for name in _SEE_LOGITS):
        return None
    return _Choice(knn, frozenset(i for one in logits_processor for i in one.eos_token_id.tolist()))


def is_settled(knn: Any, lm: Tensor, lmbda: float) -> bool:
    """Whether only the likeliest token matters now, and no memory can change which that is.

    Not when it is first asked in a generation.

    Args:
        knn: the wrapper.
        lm: (..., V) float32 log-probabilities of its model.
        lmbda: Σλ_i of the memories to be asked.
    """
    choice = _choosing.get()
    if choice is None or choice.knn is not knn:
        return False
    is_first, choice.has_begun = not choice.has_begun, True
    needed = lmbda / (1 - lmbda) + _ROUNDING
    if is_first or needed >= 1 or lm.numel() != lm.shape[-1] or lm.device.type != "cpu":
        return False
    lm_V = lm.numpy().reshape(-1)  # numpy's operations are the quicker ones to begin
    likeliest = int(lm_V.argmax())
    first = math.exp(lm_V[likeliest])
    if not first > needed or likeliest in choice.ends:
        return False
    others = lm_V[:likeliest], lm_V[likeliest + 1 :]
    second = math.exp(max(some.max(initial=-math.inf) for some in others))
    return first - second > needed
