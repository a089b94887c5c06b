"""Row 7: whether the datastore can be compressed to the means of its keys."""

from __future__ import annotations

from knnlm_hf.memory.centroids import CentroidMemory
from knnlm_hf.memory.head import Head
from knnlm_hf.memory.recipe import Recipe
from knnlm_hf.memory.training import train
from knnlm_hf.study import heads, retrieval
from knnlm_hf.study.bootstrap import Comparison, Share
from knnlm_hf.study.cost import evaluated, search_seconds
from knnlm_hf.study.measure import Measured, against, measure, share_of
from knnlm_hf.study.outcome import Outcome, Plot, Series, Verdict
from knnlm_hf.study.study import Study
from knnlm_hf.study.verdicts import FAR, NOTABLE, below, judged, within

_ENTRIES_PER_CLUSTER, _FEWEST = 40, 16


def centroids(study: Study) -> Outcome:
    """K-means centroids instead of the datastore.

    Row: 7

    Section: 4

    Hypothesis: is the datastore a rough map of the states, so that as many centroids as there are
    words, each with the distribution of its entries' tokens, can take its place? And are they
    better where they are trained on?

    Finding: far less than kNN's gain is left, and training them on brings little: 21.31, fine-tuned
    21.11, from 21.75.
    """
    layer = study.layers[0]
    plain, tuned = _heads(study, layer)
    knn = measure(
        f"kNN-LM, {layer}-l2",
        retrieval.scores(study, "valid", layer=layer),
        retrieval.scores(study, "test", layer=layer),
    )
    found = {"k-means": plain, "fine-tuned": tuned, "datastore": knn}
    gains = {kind: against(study, one) for kind, one in found.items()}
    rows = [one.row(memory=kind, against_base=gains[kind].to_dict()) for kind, one in found.items()]
    rows[1]["against_plain"] = (further := against(study, tuned, plain)).to_dict()
    base, share = knn.test.base_perplexity, share_of(study, tuned, knn)
    verdict, said = verdict_of(gains["fine-tuned"], share, further, fair=not heads.is_cut(study))
    return Outcome(
        rows=rows,
        verdict=verdict,
        sentence=(
            f"{clusters(study):,} centroids take the perplexity from {base:.2f} to "
            f"{plain.perplexity:.2f} ({gains['k-means']}), fine-tuned to {tuned.perplexity:.2f} "
            f"({further} of those not), where the datastore gives {knn.perplexity:.2f}: "
            f"{share} of its gain; far less is less than half, little is {1 - NOTABLE:.1%} to "
            f"{1 - FAR:.0%}; {heads.said_of(study)}{said}."
        ),
        plots=[
            Plot(
                title="Centroids against the datastore", x="", y="perplexity (test)", kind="bar",
                level=base, level_name="model alone",
                series=[
                    Series("interpolated", list(found), [one.perplexity for one in found.values()])
                ],
            )
        ],
        comparisons={
            "fine-tuned against the model": gains["fine-tuned"],
            "fine-tuned against k-means": further, "share of kNN's gain, fine-tuned": share,
        },
    )  # fmt: skip


def verdict_of(
    gain: Comparison, share: Share, further: Comparison, *, fair: bool
) -> tuple[Verdict, str]:
    """Of the finding's three clauses.

    Args:
        gain: the fine-tuned centroids against the model alone.
        share: their share of kNN's gain.
        further: they against those of k-means.
        fair: whether training had its chance.
    """
    return judged([
        below("fine-tuned centroids help", gain).tried(fair),
        below("far less than kNN's gain is left", share, 0.5),
        within("training them on brings a little", further, FAR, NOTABLE).tried(fair),
    ])  # fmt: skip


def cost(study: Study) -> float:
    """Seconds: ten rounds of k-means, one training, and the search to compare with."""
    one = heads.seconds(study, clusters(study), sampled=False)
    rounds = one * 10 / (3 * heads.recipe(study).epochs)
    training = 2 * heads.seconds(study, clusters(study) + study.vocab_size, sampled=False)
    return rounds + training + search_seconds(study, evaluated(study))


def clusters(study: Study) -> int:
    """As many centroids as words, but at most one for so many entries."""
    entries = sum(row.new for row in heads.train_rows(study))
    return max(_FEWEST, min(study.vocab_size, entries // _ENTRIES_PER_CLUSTER))


def _heads(study: Study, layer: str) -> tuple[Measured, Measured]:
    """The centroids as k-means leaves them, and trained on."""
    count = clusters(study)
    plain = heads.trained(study, layer, "centroids", f"centroids{count}", clusters=count)

    def fit(entries: heads.ChosenEntries, how: Recipe) -> Head:
        head = CentroidMemory.from_pretrained(study.workspace.folder / "heads" / plain.name)
        head.to(heads.device())
        recipe = heads.suited(how, CentroidMemory)
        head.trained = train(head, entries, recipe, progress=study.show)
        return head

    tuned = heads.fitted(study, layer, f"centroids{count}-tuned", {"from": plain.name}, fit)
    return (
        heads.measured(study, f"{count:,} centroids", plain),
        heads.measured(study, f"{count:,} centroids, fine-tuned", tuned),
    )
