"""Row 3: whether a trained matrix can take the datastore's place."""

from __future__ import annotations

from knnlm_hf.study import heads, retrieval
from knnlm_hf.study.bootstrap import Comparison, Share
from knnlm_hf.study.cost import evaluated, search_seconds, store_seconds
from knnlm_hf.study.measure import Measured, against, measure, share_of
from knnlm_hf.study.outcome import Outcome, Plot, Series
from knnlm_hf.study.study import Study
from knnlm_hf.study.verdicts import ABOUT, about_half, below, judged


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
    share, of_knn = share_of(study, best, knn), against(study, best, knn)
    comparisons: dict[str, Comparison | Share] = {
        "matrix against the model": gains[0], "matrix against kNN": of_knn,
        "share of kNN's gain": share,
    }  # fmt: skip
    clauses = [
        below("the matrix helps", gains[0]),
        about_half("it brings about half of kNN's gain", share),
    ]
    sentence = (
        f"One trained row per word on {first} takes the perplexity from {base:.2f} to "
        f"{best.perplexity:.2f} ({gains[0]} of the model alone), {share} of kNN's gain "
        f"({knn.perplexity:.2f}; the matrix against kNN {of_knn}); about half is "
        f"{0.5 - ABOUT:.0%} to {0.5 + ABOUT:.0%}"
    )
    if {"att", "ffn"} <= found.keys():
        layers = against(study, found["att"], found["ffn"])
        comparisons["att against ffn"] = layers
        clauses.append(below("att is better than ffn", layers))
        sentence += f"; att against ffn {layers}"
    fair = not heads.is_cut(study)
    verdict, said = judged([clause.tried(fair) for clause in clauses])
    return Outcome(
        rows=rows, verdict=verdict, sentence=f"{sentence}; {heads.said_of(study)}{said}.",
        plots=[_plot([*found.values(), knn], base)], comparisons=comparisons,
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
