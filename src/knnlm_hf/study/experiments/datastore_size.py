"""Row 8: how much datastore is enough."""

from __future__ import annotations

from knnlm_hf.study import retrieval
from knnlm_hf.study.bootstrap import Comparison, Share
from knnlm_hf.study.cost import evaluated, index_seconds, search_seconds
from knnlm_hf.study.measure import Measured, against, measure, share_of
from knnlm_hf.study.outcome import Outcome, Plot, Series, Verdict
from knnlm_hf.study.parts import SIZES
from knnlm_hf.study.study import Study
from knnlm_hf.study.verdicts import ABOUT, Clause, about_half, judged

_HALF = 0.5


def datastore_size(study: Study) -> Outcome:
    """Size of the datastore.

    Row: 8

    Section: 4

    Hypothesis: does the gain saturate as the datastore grows?

    Finding: perplexity falls almost linearly with the share of the training text, without
    saturating at 90 %; 5 % of it still helps (their figure 2).
    """
    layer = study.layers[0]
    sizes = zip(
        retrieval.scores_by_size(study, "valid", layer=layer),
        retrieval.scores_by_size(study, "test", layer=layer),
        strict=True,
    )
    # Only these are compared: the scores of a size are not kept around.
    kept: dict[float, Measured] = {}
    rows, gains = [], []
    for (size, valid), (_, test) in sizes:
        one = measure(f"{size:.0%} of the datastore", valid, test)
        gain = against(study, one)
        rows.append(one.row(size=size, entries=_entries(study, size), against_base=gain.to_dict()))
        gains.append(gain)
        if size in (SIZES[0], _HALF, SIZES[-2], SIZES[-1]):
            kept[size] = one
    smallest, whole = kept[SIZES[0]], kept[SIZES[-1]]
    last = against(study, whole, kept[SIZES[-2]])
    base = whole.test.base_perplexity
    half = share_of(study, kept[_HALF], whole)
    verdict, said = verdict_of(gains[0], half, last)
    return Outcome(
        rows=rows,
        verdict=verdict,
        sentence=(
            f"{SIZES[0]:.0%} of the datastore takes the perplexity from {base:.2f} to "
            f"{rows[0]['perplexity']:.2f} ({against(study, smallest)}), all of it to "
            f"{rows[-1]['perplexity']:.2f}; half of it brings {half} of the whole gain, on a "
            f"line {0.5 - ABOUT:.0%} to {0.5 + ABOUT:.0%}, and the last tenth still changes it by "
            f"{last}{said}."
        ),
        plots=[
            Plot(
                title="Perplexity by size of the datastore", x="share of the datastore",
                y="perplexity (test)", level=base, level_name="model alone",
                series=[
                    Series(
                        f"kNN-LM ({layer}, l2)", list(SIZES), [row["perplexity"] for row in rows],
                        low=[base * gain.low for gain in gains],
                        high=[base * gain.high for gain in gains],
                    )
                ],
            )
        ],
        comparisons={
            f"{SIZES[0]:.0%} against the model": gains[0],
            f"share of the gain at {_HALF:.0%}": half,
            f"{SIZES[-1]:.0%} against {SIZES[-2]:.0%}": last,
        },
    )  # fmt: skip


def verdict_of(smallest: Comparison, half: Share, last: Comparison) -> tuple[Verdict, str]:
    """Of the finding's three clauses.

    Args:
        smallest: 5 % of the datastore against the model alone.
        half: the share of the gain that half of it brings.
        last: all of it against nine tenths.
    """
    return judged([
        Clause("5 % helps", smallest.better, smallest.worse),
        about_half("perplexity falls almost linearly", half),
        Clause("it does not saturate at 90 %", last.better, last.worse or last.equal),
    ])  # fmt: skip


def cost(study: Study) -> float:
    """Seconds: every entry is indexed once more, and every part searched."""
    return index_seconds(study) + len(SIZES) * search_seconds(study, evaluated(study)) / 2


def _entries(study: Study, size: float) -> int:
    return round(size * len(study.store(study.layers[0])))
