"""Row 4: whether a word needs more than one output embedding."""

from __future__ import annotations

from knnlm_hf.study import heads, retrieval
from knnlm_hf.study.bootstrap import Share
from knnlm_hf.study.cost import evaluated, search_seconds, store_seconds
from knnlm_hf.study.measure import Measured, against, measure, share_of
from knnlm_hf.study.outcome import FAILS, HOLDS, Outcome, Plot, Series
from knnlm_hf.study.study import Study
from knnlm_hf.study.verdicts import ABOUT, Clause, about_half, every, judged, no_gain

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
    layer = study.layers[0]
    knn = measure(
        f"kNN-LM, {layer}-l2",
        retrieval.scores(study, "valid", layer=layer),
        retrieval.scores(study, "test", layer=layer),
    )
    rows = [
        one.row(
            layer=layer, n=n, against_base=against(study, one).to_dict(),
            against_one=against(study, one, every[0]).to_dict(),
        )
        for layer, every in found.items()
        for n, one in zip(numbers, every, strict=True)
    ]  # fmt: skip
    one, more = found[layer][0], found[layer][1:]
    base = one.test.base_perplexity
    best = min(more, key=lambda other: other.tuned.perplexity)
    gain = against(study, best, one)
    shares = {n: share_of(study, some, knn) for n, some in zip(numbers, found[layer], strict=True)}
    low, high = (pick(shares.values(), key=_ratio) for pick in (min, max))
    fair = not heads.is_cut(study)
    decided = no_gain(gain, fair=fair and numbers == NUMBERS)
    all_half = every("all bring about half of kNN's gain", [
        about_half("", share) for share in shares.values()
    ])  # fmt: skip
    verdict, said = judged([
        Clause("more of them do not help", decided == HOLDS, decided == FAILS),
        all_half.tried(fair),
    ])  # fmt: skip
    return Outcome(
        rows=rows,
        verdict=verdict,
        sentence=(
            f"On {layer} one embedding per word takes the perplexity from {base:.2f} to "
            f"{one.perplexity:.2f}; of n up to {numbers[-1]}, the best on valid "
            f"({best.name}) gives {best.perplexity:.2f}, {gain} of that with one; a gain counts "
            f"from half a percent; of kNN's gain ({knn.perplexity:.2f}) they bring {low} to {high},"
            f" where about half is {0.5 - ABOUT:.0%} to {0.5 + ABOUT:.0%}; {heads.said_of(study)}"
            f"{said}."
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
        comparisons={
            f"{best.name} against n = 1": gain,
            **{f"share of kNN's gain, n = {n}": share for n, share in shares.items()},
        },
    )  # fmt: skip


def cost(study: Study) -> float:
    """Seconds: nV rows for each n and layer; stores, searches and n = 1 are row 3's."""
    rows = sum(heads.some(study, NUMBERS)[1:]) * study.vocab_size
    stores = len(study.layers) * store_seconds(study)
    searches = search_seconds(study, evaluated(study))
    return stores + searches + heads.seconds(study, rows, len(study.layers))


def _ratio(share: Share) -> float:
    return share.ratio


def measured(study: Study, layer: str, n: int) -> Measured:
    """n rows per word on a layer: also what rows 5 and 6 compare with."""
    trained = heads.trained(study, layer, "multi_embedding", f"rows{n}", n=n)
    return heads.measured(study, f"n = {n}, {layer}", trained)
