"""Row 8: how much datastore is enough."""

from __future__ import annotations

from knnlm_hf.study import retrieval
from knnlm_hf.study.cost import evaluated, index_seconds, search_seconds
from knnlm_hf.study.measure import Measured, against, measure
from knnlm_hf.study.outcome import Outcome, Plot, Series, both
from knnlm_hf.study.parts import SIZES
from knnlm_hf.study.study import Study


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
    # Only the smallest and the two largest are compared: scores of a size are not kept around.
    kept: dict[float, Measured] = {}
    rows, gains = [], []
    for (size, valid), (_, test) in sizes:
        one = measure(f"{size:.0%} of the datastore", valid, test)
        gain = against(study, one)
        rows.append(one.row(size=size, entries=_entries(study, size), against_base=gain.to_dict()))
        gains.append(gain)
        if size in (SIZES[0], SIZES[-2], SIZES[-1]):
            kept[size] = one
    smallest, whole = kept[SIZES[0]], kept[SIZES[-1]]
    last = against(study, whole, kept[SIZES[-2]])
    base = whole.test.base_perplexity
    half = (base - rows[5]["perplexity"]) / max(1e-9, base - rows[-1]["perplexity"])
    return Outcome(
        rows=rows,
        verdict=both(
            gains[0].better and last.better, gains[0].worse or last.worse or last.equal
        ),
        sentence=(
            f"{SIZES[0]:.0%} of the datastore takes the perplexity from {base:.2f} to "
            f"{rows[0]['perplexity']:.2f} ({against(study, smallest)}), all of it to "
            f"{rows[-1]['perplexity']:.2f}; half of it brings {half:.0%} of the whole gain, and "
            f"the last tenth still changes it by {last}."
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
    )  # fmt: skip


def cost(study: Study) -> float:
    """Seconds: every entry is indexed once more, and every part searched."""
    return index_seconds(study) + len(SIZES) * search_seconds(study, evaluated(study)) / 2


def _entries(study: Study, size: float) -> int:
    return round(size * len(study.store(study.layers[0])))
