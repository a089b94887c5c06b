"""Row 1: the model alone, which everything else is held against."""

from __future__ import annotations

import math
from typing import Any

from knnlm_hf.scores import exp
from knnlm_hf.study.cost import evaluated, forward_seconds
from knnlm_hf.study.outcome import HOLDS, Outcome
from knnlm_hf.study.study import Split, Study


def base_lm(study: Study) -> Outcome:
    """Base language model.

    Row: 1

    Section: 3

    Hypothesis: what is the perplexity of the language model alone, which every other row is
    compared with?

    Finding: 21.75 per word on WikiText-103's validation set, for 16 layers of 1024 dimensions.
    """
    rows = [_row(study, split) for split in ("valid", "test")]
    valid, test = (row["perplexity"] for row in rows)
    return Outcome(
        rows=rows,
        verdict=HOLDS,
        sentence=(
            f"The model alone has a perplexity of {valid:.2f} per token on valid and {test:.2f} on "
            f"test ({rows[1]['tokens']:,} tokens); a uniform guess would have "
            f"{study.vocab_size:,}. There is nothing to confirm in this row."
        ),
    )


def cost(study: Study) -> float:
    """Seconds of one pass over valid and test, each token in two windows."""
    return 2 * forward_seconds(study, evaluated(study))


def _row(study: Study, split: Split) -> dict[str, Any]:
    evaluation = study.evaluation(split)
    nll = -evaluation.lm_log_probs.double().mean().item()
    words = study.text(split).words if study.settings.eval_tokens is None else None
    return {
        "setting": "model alone",
        "split": split,
        "tokens": len(evaluation),
        "nll": nll,
        "perplexity": math.exp(nll),
        "word_perplexity": exp(nll * len(evaluation) / words) if words else None,
    }
