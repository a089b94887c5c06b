"""Row 4: whether a word needs more than one output embedding."""

from __future__ import annotations

from knnlm_hf.study import heads
from knnlm_hf.study.cost import store_seconds
from knnlm_hf.study.measure import Measured, against
from knnlm_hf.study.outcome import Outcome, Plot, Series
from knnlm_hf.study.study import Study
from knnlm_hf.study.verdicts import no_gain

NUMBERS = list(range(1, 10))


def number_of_embeddings(study: Study) -> Outcome:
    """Embeddings per word: an nV×D matrix.

    Row: 4

    Section: 4

    Hypothesis: does kNN help because a word has as many embeddings as it has occurrences? Then n
    trained embeddings per word would be the better, the larger n is.

    Finding: more of them do not reliably help; n = 1 … 9 all bring about half of kNN's gain (their
    figure 3).
    """
    numbers = heads.some(study, NUMBERS)
    found = {layer: [measured(study, layer, n) for n in numbers] for layer in study.layers}
    rows = [
        one.row(
            layer=layer, n=n, against_base=against(study, one).to_dict(),
            against_one=against(study, one, every[0]).to_dict(),
        )
        for layer, every in found.items()
        for n, one in zip(numbers, every, strict=True)
    ]  # fmt: skip
    layer = study.layers[0]
    one, more = found[layer][0], found[layer][1:]
    base = one.test.base_perplexity
    best = min(more, key=lambda other: other.tuned.perplexity)
    gain = against(study, best, one)
    return Outcome(
        rows=rows,
        verdict=no_gain(gain, fair=not heads.is_cut(study) and numbers == NUMBERS),
        sentence=(
            f"On {layer} one embedding per word takes the perplexity from {base:.2f} to "
            f"{one.perplexity:.2f}; of n up to {numbers[-1]}, the best on valid "
            f"({best.name}) gives {best.perplexity:.2f}, {gain} of that with one; a gain counts "
            f"from half a percent; {heads.said_of(study)}."
        ),
        plots=[
            Plot(
                title="Perplexity by embeddings per word", x="n", y="perplexity (test)",
                level=base, level_name="model alone",
                series=[
                    Series(name, list(numbers), [other.perplexity for other in every])
                    for name, every in found.items()
                ],
            )
        ],
    )  # fmt: skip


def cost(study: Study) -> float:
    """Seconds: nV rows for each n and layer; the stores and n = 1 are those of row 3."""
    rows = sum(heads.some(study, NUMBERS)[1:]) * study.vocab_size
    stores = len(study.layers) * store_seconds(study)
    return stores + heads.seconds(study, rows, len(study.layers))


def measured(study: Study, layer: str, n: int) -> Measured:
    """n rows per word on a layer: also what rows 5 and 6 compare with."""
    trained = heads.trained(study, layer, "multi_embedding", f"rows{n}", n=n)
    return heads.measured(study, f"n = {n}, {layer}", trained)
