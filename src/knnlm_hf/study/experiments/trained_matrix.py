"""Row 3: whether a trained matrix can take the datastore's place."""

from __future__ import annotations

from knnlm_hf.study import heads, retrieval
from knnlm_hf.study.cost import evaluated, search_seconds, store_seconds
from knnlm_hf.study.measure import Measured, against, measure
from knnlm_hf.study.outcome import Outcome, Plot, Series, both
from knnlm_hf.study.study import Study
from knnlm_hf.study.verdicts import NOTABLE


def trained_matrix(study: Study) -> Outcome:
    """A trained V×D matrix instead of the datastore.

    Row: 3

    Section: 4

    Hypothesis: is kNN's gain due to its second representation (att) and a second output layer on
    it, rather than to retrieval? Then a trained matrix of one row per word, the model frozen, would
    bring it too.

    Finding: with one row per word on att 22.58 alone and 20.35 interpolated (oracle 16.95), 55 % of
    kNN's gain; on ffn 20.92 alone and 20.69 interpolated.
    """
    found = {layer: _head(study, layer) for layer in study.layers}
    first = study.layers[0]
    knn = measure(
        f"kNN-LM, {first}-l2",
        retrieval.scores(study, "valid", layer=first),
        retrieval.scores(study, "test", layer=first),
    )
    gains = [against(study, one) for one in (*found.values(), knn)]
    rows = [
        one.row(layer=layer, against_base=gain.to_dict())
        for one, layer, gain in zip((*found.values(), knn), (*found, first), gains, strict=True)
    ]
    base, best = knn.test.base_perplexity, found[first]
    share = (base - best.perplexity) / max(1e-9, base - knn.perplexity)
    of_knn = against(study, best, knn)
    holds = gains[0].better and of_knn.worse
    fails = gains[0].worse or of_knn.better
    fails |= not heads.is_cut(study) and gains[0].low > NOTABLE
    sentence = (
        f"One trained row per word on {first} takes the perplexity from {base:.2f} to "
        f"{best.perplexity:.2f} ({gains[0]} of the model alone), {share:.0%} of kNN's gain "
        f"({knn.perplexity:.2f}; the matrix against kNN {of_knn})"
    )
    if len(found) > 1:
        layers = against(study, best, found[study.layers[1]])
        sentence += f"; {first} against {study.layers[1]} {layers}"
        holds, fails = holds and layers.better, fails or layers.worse
    return Outcome(
        rows=rows, verdict=both(holds, fails), sentence=f"{sentence}; {heads.said_of(study)}.",
        plots=[_plot([*found.values(), knn], base)],
    )  # fmt: skip


def cost(study: Study) -> float:
    """Seconds: a store and a head per layer, and the search to compare with."""
    layers = len(study.layers)
    stores = layers * store_seconds(study) + search_seconds(study, evaluated(study))
    return stores + heads.seconds(study, study.vocab_size, layers)


def _head(study: Study, layer: str) -> Measured:
    trained = heads.trained(study, layer, "multi_embedding", "rows1", n=1)
    return heads.measured(study, f"V×D matrix, {layer}", trained)


def _plot(found: list[Measured], base: float) -> Plot:
    names = [one.name for one in found]
    return Plot(
        title="A trained matrix against the datastore", x="", y="perplexity (test)", kind="bar",
        level=base, level_name="model alone",
        series=[
            Series("interpolated", names, [one.perplexity for one in found]),
            Series("oracle", names, [float(one.row()["oracle_perplexity"]) for one in found]),
        ],
    )  # fmt: skip
