"""Row 12: whether words cannot be predicted because others stand around them."""

from __future__ import annotations

from typing import Any

from knnlm_hf.errors import KNNLMError
from knnlm_hf.study.hull import Hull, decide
from knnlm_hf.study.outcome import FAILS, HOLDS, Outcome
from knnlm_hf.study.study import Study

_NAMED = 20  # words that a sentence names


def stolen_probabilities(study: Study) -> Outcome:
    """Stolen probabilities.

    Row: 12

    Section: 6

    Hypothesis: is a word's output embedding inside the convex hull of the others'? Then no state
    makes it the likeliest word, and kNN, which has no such bound, could give back what is stolen.

    Finding: none is.
    """
    output = study.model.get_output_embeddings()
    if output is None:
        raise KNNLMError("the model has no output embeddings: there is nothing to steal from")
    rows_VD = output.weight.detach().float().cpu()[: study.vocab_size]
    bias = getattr(output, "bias", None)
    bias_V = None if bias is None else bias.detach().float().cpu()[: study.vocab_size]
    found = decide(rows_VD, bias_V, show=study.show)
    inside = found.inside.tolist()
    return Outcome(
        rows=[
            {
                "setting": "output embeddings", "split": None, "words": len(rows_VD),
                "outside_by_own_direction": found.by_own_direction,
                "outside_by_search": found.by_search,
                "decided_by_linear_programming": found.by_program,
                "inside": len(inside), "which": inside,
                "tokens": _names(study, inside),
            }
        ],
        verdict=FAILS if inside else HOLDS,
        sentence=_sentence(study, found, len(rows_VD)),
    )  # fmt: skip


def cost(study: Study) -> float:
    """Seconds: all embeddings times all in float64, and a few linear programs."""
    width: int = study.model.config.get_text_config(decoder=True).hidden_size
    return 3 * study.vocab_size**2 * width / 4e10 + 10


def _sentence(study: Study, found: Hull, words: int) -> str:
    said = (
        f"Of {words:,} output embeddings {len(found.inside):,} are inside the convex hull of the "
        f"others: {found.by_own_direction:,} win in their own direction, {found.by_search:,} in one"
        f" searched for, {found.by_program:,} were decided by linear programming"
    )
    if not len(found.inside):
        return said + "."
    seen = set().union(*(set(part.tolist()) for part in study.text("train").documents))
    inside = found.inside.tolist()
    unseen = sum(token not in seen for token in inside)
    names = _names(study, inside[:_NAMED])
    shown = f" ({', '.join(map(repr, names))}{', …' if len(inside) > _NAMED else ''})"
    return f"{said}; {unseen:,} of those inside never occur in the training text{shown}."


def _names(study: Study, tokens: list[int]) -> list[Any]:
    if study.tokenizer is None:
        return list(tokens)
    return [str(name) for name in study.tokenizer.convert_ids_to_tokens(tokens)]
