"""Row 13: whether kNN helps because it remembers the training text."""

from __future__ import annotations

import math

from knnlm_hf.scores import TokenScores, exp
from knnlm_hf.study import language_models
from knnlm_hf.study.cost import evaluated, forward_seconds
from knnlm_hf.study.language_models import TrainedLM
from knnlm_hf.study.lm_recipe import LMRecipe
from knnlm_hf.study.measure import against, measure
from knnlm_hf.study.outcome import UNDECIDED, Outcome
from knnlm_hf.study.retrieval import with_memory
from knnlm_hf.study.study import Split, Study
from knnlm_hf.study.verdicts import no_gain

RECIPE = LMRecipe(epochs=20, patience=None, dropout=False, weight_decay=0.0)
"""Until it overfits: no dropout, no decay, no early stopping."""


def memorisation(study: Study) -> Outcome:
    """Memorisation: a copy of the model that overfits.

    Row: 13

    Section: 6

    Hypothesis: does kNN help because the datastore memorises the training text? Then the model,
    interpolated with a copy of itself that was trained on until it overfits, would gain as well.

    Finding: no gain.
    """
    tokens_N, recipe = language_models.budget(study, RECIPE)
    copy = language_models.trained(
        study, "memoriser", lambda: language_models.copied(study), recipe, tokens_N=tokens_N
    )
    scores = {split: _scores(study, split, copy) for split in _SPLITS}
    found = measure("model + its overfitted copy", scores["valid"], scores["test"])
    gain = against(study, found)
    # Memorised: far better where it was trained, and worse elsewhere.
    of_base = language_models.ratio(
        study, language_models.evaluation(study, "valid", copy), study.evaluation("valid")
    )
    knows = copy.train_loss < copy.base_loss - math.log(2)
    has_all = len(tokens_N) == len(study.text("train"))
    overfits = knows and of_base.worse
    verdict = no_gain(gain, fair=has_all) if overfits else UNDECIDED
    why = "" if overfits else "; it has not overfitted, so this decides nothing"
    if overfits and not has_all:
        why = "; it has memorised a part of the training text only"
    return Outcome(
        rows=[
            found.row(
                trained_tokens=copy.tokens, epochs=copy.epochs,
                train_perplexity=exp(copy.train_loss), base_train_perplexity=exp(copy.base_loss),
                against_base=gain.to_dict(), copy_against_base_on_valid=of_base.to_dict(),
            )
        ],
        verdict=verdict,
        sentence=(
            f"A copy trained on ({copy}) has a perplexity of {exp(copy.train_loss):.2f} on that "
            f"text, where the model has {exp(copy.base_loss):.2f}, and {of_base} of the model's on "
            f"valid; interpolated (λ {found.tuned.lmbda:.2f}) they have {found.perplexity:.2f} on "
            f"test, {gain} of the model alone{why}."
        ),
        comparisons={
            "model and copy against the model": gain, "copy against the model, on valid": of_base,
        },
    )  # fmt: skip


def cost(study: Study) -> float:
    """Seconds: a training, and one more pass over valid and test."""
    return language_models.seconds(study, RECIPE) + 2 * forward_seconds(study, evaluated(study))


_SPLITS: tuple[Split, Split] = ("valid", "test")


def _scores(study: Study, split: Split, copy: TrainedLM) -> TokenScores:
    theirs = language_models.evaluation(study, split, copy)
    return with_memory(study.evaluation(split), theirs.lm_log_probs)
