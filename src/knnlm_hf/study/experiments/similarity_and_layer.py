"""Row 2: what to search with, and how to measure nearness."""

from __future__ import annotations

from knnlm_hf.study import retrieval
from knnlm_hf.study.bootstrap import Comparison
from knnlm_hf.study.cost import evaluated, index_seconds, search_seconds, store_seconds
from knnlm_hf.study.measure import Measured, against, measure
from knnlm_hf.study.outcome import UNDECIDED, Outcome, Plot, Series, Verdict
from knnlm_hf.study.study import Study
from knnlm_hf.study.verdicts import FAR, NOTABLE, below, every, judged, within
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
        (layer, metric): _measure(study, layer, metric)
        for layer in study.layers
        for metric in METRICS
    }
    gains = {key: against(study, one) for key, one in found.items()}
    rows = [
        one.row(layer=layer, metric=metric, against_base=gains[layer, metric].to_dict())
        for (layer, metric), one in found.items()
    ]
    first = next(iter(found))
    best = found[first]
    sentence = (
        f"{best.name} takes the perplexity from {best.test.base_perplexity:.2f} to "
        f"{best.perplexity:.2f} ({gains[first]} of the model alone, λ {best.tuned.lmbda:.2f}, "
        f"oracle {rows[0]['oracle_perplexity']:.2f})"
    )
    comparisons = {f"{found[key].name} against the model": gain for key, gain in gains.items()}
    missing = [layer for layer in ("att", "ffn") if layer not in study.layers]
    verdict: Verdict = UNDECIDED
    said = f"; the finding compares att with ffn, and here is no {' and no '.join(missing)}"
    if not missing:
        layers = against(study, found["att", "l2"], found["ffn", "l2"])
        metrics = against(study, found["att", "l2"], found["att", "ip"])
        comparisons |= {"att-l2 against ffn-l2": layers, "att-l2 against att-ip": metrics}
        verdict, said = verdict_of(list(gains.values()), layers, metrics)
        sentence += f"; att against ffn {layers}, l2 against ip on att {metrics}"
    sentence += (
        f"; a difference counts from {1 - NOTABLE:.1%}, and far better is {1 - FAR:.0%} or more "
        f"(the paper's att has 0.925 × the perplexity of its ffn){said}."
    )
    return Outcome(
        rows=rows, verdict=verdict, sentence=sentence, plots=[_plot(rows)], comparisons=comparisons
    )


def verdict_of(
    gains: list[Comparison], layers: Comparison, metrics: Comparison
) -> tuple[Verdict, str]:
    """Of the finding's three clauses.

    Args:
        gains: each of the four, against the model alone.
        layers: att against ffn.
        metrics: l2 against ip on att.
    """
    return judged([
        every("all help", [below("", gain) for gain in gains]),
        below("att is far better than ffn", layers, FAR),
        within("l2 and ip are equal on att", metrics, NOTABLE, 1 / NOTABLE),
    ])  # fmt: skip


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
