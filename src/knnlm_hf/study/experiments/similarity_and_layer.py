"""Row 2: what to search with, and how to measure nearness."""

from __future__ import annotations

from knnlm_hf.study import retrieval
from knnlm_hf.study.cost import evaluated, index_seconds, search_seconds, store_seconds
from knnlm_hf.study.measure import Measured, against, measure
from knnlm_hf.study.outcome import Outcome, Plot, Series, both
from knnlm_hf.study.study import Study
from knnlm_hf.study.verdicts import NOTABLE
from knnlm_hf.types import METRICS


def similarity_and_layer(study: Study) -> Outcome:
    """Layer and similarity of the datastore.

    Row: 2

    Section: 3

    Hypothesis: does kNN-LM help, and does it matter whether keys are the input (att) or the output
    (ffn) of the last feed-forward sublayer, and whether nearness is distance (l2) or inner product
    (ip)?

    Finding: all four help; att does far better than ffn, and on att the two similarities are equal:
    19.17 (att-l2, oracle 14.23), 19.10 (att-ip), 20.73 (ffn-l2), 21.10 (ffn-ip), from 21.75.
    """
    found = {
        f"{layer}-{metric}": _measure(study, layer, metric)
        for layer in study.layers
        for metric in METRICS
    }
    gains = {name: against(study, one) for name, one in found.items()}
    rows = [
        one.row(layer=name.split("-")[0], metric=name.split("-")[1], against_base=gain.to_dict())
        for (name, one), gain in zip(found.items(), gains.values(), strict=True)
    ]
    names = list(found)
    best = found[names[0]]
    helps = gains[names[0]]
    sentence = (
        f"{names[0]} takes the perplexity from {best.test.base_perplexity:.2f} to "
        f"{rows[0]['perplexity']:.2f} ({helps} of the model alone, λ {best.tuned.lmbda:.2f}, "
        f"oracle {rows[0]['oracle_perplexity']:.2f})"
    )
    holds, fails = helps.better, helps.worse
    if len(study.layers) > 1:
        layers = against(study, best, found[f"{study.layers[1]}-l2"])
        metrics = against(study, best, found[f"{study.layers[0]}-ip"])
        sentence += f"; att against ffn {layers}, l2 against ip on att {metrics}"
        sentence += "; a difference counts from half a percent"
        # Equal layers say something only where kNN does: from a gain of 5 %.
        is_equal = layers.equal and helps.large
        holds = holds and layers.better and layers.high < NOTABLE
        fails = fails or layers.worse or is_equal
    return Outcome(
        rows=rows, verdict=both(holds, fails), sentence=sentence + ".", plots=[_plot(rows)]
    )


def cost(study: Study) -> float:
    """Seconds: a store per layer, an index and a search for each of the four."""
    searches = search_seconds(study, evaluated(study)) + index_seconds(study)
    return len(study.layers) * (store_seconds(study) + len(METRICS) * searches)


def _measure(study: Study, layer: str, metric: str) -> Measured:
    valid = retrieval.scores(study, "valid", layer=layer, metric=metric)
    test = retrieval.scores(study, "test", layer=layer, metric=metric)
    return measure(f"{layer}-{metric}", valid, test)


def _plot(rows: list[dict[str, object]]) -> Plot:
    names = [row["setting"] for row in rows]
    bars = [
        Series("interpolated", names, [row["perplexity"] for row in rows]),  # type: ignore[misc]
        Series("oracle", names, [row["oracle_perplexity"] for row in rows]),  # type: ignore[misc]
    ]
    return Plot(
        title="Perplexity by layer and similarity", x="", y="perplexity (test)", series=bars,
        kind="bar", level=float(str(rows[0]["base_perplexity"])), level_name="model alone",
    )  # fmt: skip
