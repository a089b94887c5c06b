"""No search where it cannot change the token: greedy generation skips those steps.

Whatever a memory says, of all probability it gives one token at most all of its share λ:

    (1−λ)·p₁ > (1−λ)·p₂ + λ   ⇔   p₁ − p₂ > λ/(1−λ)

of the model's two likeliest tokens. Where that holds the mixture's likeliest token is the model's,
and greedy generation asks for nothing else. So the tokens are those of the mixture, to the last
one, with fewer searches: how many fewer depends on how sure the model is, and on λ (none from ½
on). Where more than the tokens comes out, or they are drawn, or many rows are generated at once,
every step searches.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers import MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor

from knnlm_hf.modeling.generating import gives_only_tokens

_DELAY_THE_END = {MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor}
"""They set the end's tokens to −inf and leave all others as they are."""
_ROUNDING = 1e-4
"""Far more than the float32 mixture errs by."""

_choosing: ContextVar[tuple[Any, frozenset[int]] | None] = ContextVar(
    "knnlm_hf_choosing", default=None
)


@contextmanager
def choosing_the_likeliest(knn: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Let the wrapper skip its memories inside the block, if the likeliest token is all it needs.

    Args:
        knn: the wrapper.
        settings: what its generate() gives the method that chooses the tokens, by name.
    """
    config: Any = settings.get("generation_config")
    processors: Any = settings.get("logits_processor")
    is_usual = gives_only_tokens(knn) and config is not None and processors is not None
    if not is_usual or config.do_sample or {*map(type, processors)} - _DELAY_THE_END:
        yield
        return
    ends = frozenset(end for one in processors for end in one.eos_token_id.tolist())
    before = _choosing.set((knn, ends))
    try:
        yield
    finally:
        _choosing.reset(before)


def is_settled(knn: Any, lm: Tensor, lmbda: float) -> bool:
    """Whether no memory can change which token is chosen now, and nothing else is asked for.

    Args:
        knn: the wrapper.
        lm: (..., V) float32 log-probabilities of its model.
        lmbda: Σλ_i of the memories to be asked.
    """
    greedy = _choosing.get()
    if greedy is None or greedy[0] is not knn or lm.numel() != lm.shape[-1]:
        return False
    lm_V = lm.detach().cpu().numpy().reshape(-1)  # numpy's operations are the quicker ones to begin
    likeliest = int(lm_V.argmax())
    others = lm_V[:likeliest], lm_V[likeliest + 1 :]
    second = max(some.max(initial=-math.inf) for some in others)
    lead = math.exp(lm_V[likeliest]) - math.exp(second)
    return lead > lmbda / (1 - lmbda) + _ROUNDING and likeliest not in greedy[1]
