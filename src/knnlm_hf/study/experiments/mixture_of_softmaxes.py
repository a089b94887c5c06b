"""Row 6: whether it is the rank of one softmax that kNN makes up for."""

from __future__ import annotations

from knnlm_hf.study import heads
from knnlm_hf.study.experiments.number_of_embeddings import measured
from knnlm_hf.study.measure import Measured, against
from knnlm_hf.study.outcome import Outcome, Plot, Series
from knnlm_hf.study.study import Study
from knnlm_hf.study.verdicts import no_gain

COMPONENTS = [2, 3, 4, 5]


def mixture_of_softmaxes(study: Study) -> Outcome:
    """Mixture of softmaxes.

    Row: 6

    Section: 4

    Hypothesis: does kNN help because one softmax over V×D has too low a rank? Then a mixture of 2
    to 5 softmaxes on the frozen model would help more than n embeddings per word do.

    Finding: it is no better than nV embeddings.
    """
    layer = study.layers[0]
    components = heads.some(study, COMPONENTS)
    mixtures = [_head(study, layer, count) for count in components]
    numbers = [1, *components]
    matrices = [measured(study, layer, n) for n in numbers]
    rows = [
        one.row(components=count, against_base=against(study, one).to_dict())
        for one, count in zip(mixtures, components, strict=True)
    ]
    rows += [
        one.row(n=n, against_base=against(study, one).to_dict())
        for one, n in zip(matrices, numbers, strict=True)
    ]
    best = min(mixtures, key=lambda one: one.tuned.perplexity)
    rival = min(matrices, key=lambda one: one.tuned.perplexity)
    gain = against(study, best, rival)
    base = best.test.base_perplexity
    return Outcome(
        rows=rows,
        verdict=no_gain(gain, fair=not heads.is_cut(study)),
        sentence=(
            f"The best mixture on valid ({best.name}) takes the perplexity from {base:.2f} to "
            f"{best.perplexity:.2f}, the best matrix ({rival.name}) to {rival.perplexity:.2f}: "
            f"{gain} of that; a gain counts from half a percent; {heads.said_of(study)}."
        ),
        plots=[
            Plot(
                title="Mixtures of softmaxes against rows", x="components, or rows per word",
                y="perplexity (test)", level=base, level_name="model alone",
                series=[
                    Series("mixture of softmaxes", list(components),
                           [one.perplexity for one in mixtures]),
                    Series("n rows per word", numbers, [one.perplexity for one in matrices]),
                ],
            )
        ],
        comparisons={f"{best.name} against {rival.name}": gain},
    )  # fmt: skip


def cost(study: Study) -> float:
    """Seconds: each component is a softmax over V, computed once more for the shares."""
    rows = sum(heads.some(study, COMPONENTS)) * study.vocab_size * 4 / 3
    return heads.seconds(study, rows)


def _head(study: Study, layer: str, components: int) -> Measured:
    trained = heads.trained(
        study, layer, "mixture_of_softmaxes", f"mixture{components}", components=components
    )
    return heads.measured(study, f"{components} softmaxes", trained)
