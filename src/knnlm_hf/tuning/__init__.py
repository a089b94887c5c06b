"""TokenScores → k, t, γ, λ: a grid over k and t, and the exact best λ for each of its points."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from knnlm_hf.errors import KNNLMError, SettingError
from knnlm_hf.scores import TokenScores, exp
from knnlm_hf.scoring import score
from knnlm_hf.tuning.descent import DEEPEST, Choice, Descent
from knnlm_hf.types import each, one_or_all

_log = logging.getLogger(__name__)

_NEGLIGIBLE_LMBDA = 0.01


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The best settings found, and what they give on the text they were tuned on.

    Tuning flatters: report another split.
    """

    lmbda: Any
    """λ; of several memories the tuple, as are temperature and k."""
    temperature: Any
    """None for a memory that does not search: its t cannot be changed afterwards."""
    k: Any
    """None for a memory that does not search."""
    perplexity: float
    base_perplexity: float
    tokens: int
    message: str
    """What was found, in a sentence; says so when the memory does not help."""
    match_weight: Any = None
    """γ; None for a memory that counts no matches."""

    @property
    def helps(self) -> bool:
        """Whether the best λ, of several memories their sum, is more than negligible."""
        share = sum(self.lmbda) if isinstance(self.lmbda, tuple) else self.lmbda
        return bool(share >= _NEGLIGIBLE_LMBDA)


def tune(
    model: Any,
    corpus: Any,
    *,
    tokenizer: Any = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    bos: bool | None = None,
    ks: Sequence[int] | None = None,
    temperatures: Sequence[float] | None = None,
    lmbdas: Sequence[Any] | None = None,
    apply: bool = True,
    progress: bool = True,
) -> Tuned:
    """Fit k, t and λ to held-out text, in one retrieval pass, and apply them to `model`.

    Use text that is neither in the datastore nor the text you will report. The λs of several
    memories are fitted together, k and t (of a `HybridMemory` also γ) of each that searches one
    memory after the other. A head's temperature is left as it is: every row of the head is in its
    normaliser, so another t cannot be had from what was kept, and its trained rows have fitted
    their scale already.

    Args:
        model: a `KNNLMForCausalLM`.
        corpus: held-out text; options up to `bos` are `score`'s.
        ks: candidates, each at most the memory's k; None: that k and a few smaller ones.
        temperatures: candidates; None: a wide geometric grid around the memory's (around the
            evidence's own scale where that is far off), wider while its end is best, then refined.
        lmbdas: candidates, of several memories lists with one λ each; None: the exact optimum.
        apply: set the memory's k, temperature and match_weight, and the model's lmbda, to the best.
    """
    if not hasattr(model, "memory"):
        raise KNNLMError(f"{type(model).__name__} has no memory to tune: wrap it first")
    scores = score(
        model, corpus, tokenizer=tokenizer, window=window, stride=stride,
        batch_size=batch_size, bos=bos, progress=progress,
    )  # fmt: skip
    best = fit(scores, ks=ks, temperatures=temperatures, lmbdas=lmbdas)
    if not best.helps:
        _log.warning("%s", best.message)
    if apply:
        model.lmbda = best.lmbda
        count = len(model.memories)
        for name in ("k", "temperature", "match_weight"):
            values = each(name, getattr(best, name), count)
            for memory, value in zip(model.memories, values, strict=True):
                if value is not None:
                    setattr(memory, name, value)
    return best


def fit(
    scores: TokenScores,
    *,
    ks: Sequence[int] | None = None,
    temperatures: Sequence[float] | None = None,
    lmbdas: Sequence[Any] | None = None,
) -> Tuned:
    """The settings of lowest perplexity on kept scores: arithmetic only, no retrieval.

    The options are `tune`'s. For given k and t the best λs are exact, for the log-likelihood is
    concave in them (`tuning.shares`). k and t are taken from a grid, of which temperatures that a
    sample of 2,048 or more tokens tells to be worse than the best, by six standard errors of the
    difference and 0.001 nats, are not looked at on all tokens, where these are 10,240 or more
    (`tuning.race`). γ is taken by steps of 1 from 0 while that
    gains, then of ½ and ¼, on some 32,768 of the tokens where there are many more. Of several
    memories one memory's settings are fitted at a time, the others as they are, until none changes.
    """
    for name, grid in (("ks", ks), ("temperatures", temperatures), ("lmbdas", lmbdas)):
        if grid is not None and not len(grid):
            raise SettingError(f"{name} is empty: give candidates, or None for the default ones")
    if not scores.memories:
        raise KNNLMError("these are the scores of a model without memory: there is nothing to tune")
    return _tuned(scores, Descent(scores, ks, temperatures, lmbdas))


def _tuned(scores: TokenScores, descent: Descent) -> Tuned:
    lmbdas, chosen = descent.run()
    temperatures, ks = [one.temperature for one in chosen], [one.k for one in chosen]
    match_weights = [one.match_weight for one in chosen]
    base = scores.base_perplexity
    if bool((scores.lm_log_probs < -DEEPEST).any()):
        mixed = scores.perplexity(lmbdas, temperatures, ks, match_weights)
    else:  # without looking at every neighbour again
        log_probs_N = scores.lm_log_probs + descent.mixed(lmbdas).log()
        mixed = exp(-log_probs_N.mean(dtype=torch.float64).item())
    if sum(lmbdas) < _NEGLIGIBLE_LMBDA:
        message = (
            f"the memory does not help on this text: the best lmbda is {sum(lmbdas):.2g} "
            f"(perplexity {mixed:.2f}, the model alone {base:.2f})"
        )
    else:
        settings = map(_described, lmbdas, chosen)
        message = f"perplexity {base:.2f} → {mixed:.2f} with {'; '.join(settings)}"
    return Tuned(
        lmbda=one_or_all(lmbdas),
        temperature=one_or_all(temperatures), k=one_or_all(ks),
        match_weight=one_or_all(match_weights),
        perplexity=mixed, base_perplexity=base, tokens=len(scores), message=message,
    )  # fmt: skip


def _described(lmbda: float, choice: Choice) -> str:
    searching = choice.temperature is not None
    return (
        f"lmbda {lmbda:.3g}"
        + (f", temperature {choice.temperature:.4g}, k {choice.k}" if searching else "")
        + (f", match weight {choice.match_weight:.3g}" if choice.match_weight is not None else "")
    )
