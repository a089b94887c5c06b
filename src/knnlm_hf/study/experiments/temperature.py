"""Row 10: the temperature of the kNN softmax, for three modes and two sizes."""

from __future__ import annotations

from typing import Any

from knnlm_hf.study.experiments import _modes
from knnlm_hf.study.experiments._modes import MODES, PARTS, SMALL, WHOLE
from knnlm_hf.study.measure import Measured, against, measure
from knnlm_hf.study.outcome import Outcome, Plot, Series, both
from knnlm_hf.study.retrieval import replaced
from knnlm_hf.study.study import Study
from knnlm_hf.study.sweep import at_temperatures

GRID = tuple(step / 10 for step in range(1, 31))
"""The paper's temperatures, 0.1 to 3.0."""


class Curve:
    """One mode at one size: every temperature, λ fitted at each."""

    def __init__(self, study: Study, mode: _modes.Mode, size: str, temperatures: list[float]):
        valid, test = (_modes.scores(study, split, mode, size) for split in ("valid", "test"))
        self.temperatures = temperatures
        self.points: list[Measured] = [
            measure(mode.name, replaced(valid, on_valid_N), replaced(test, on_test_N))
            for on_valid_N, on_test_N in zip(
                at_temperatures(valid, temperatures), at_temperatures(test, temperatures),
                strict=True,
            )
        ]  # fmt: skip

    def at(self, temperature: float) -> Measured:
        """The point at one of the temperatures."""
        return self.points[self.temperatures.index(temperature)]

    @property
    def best(self) -> float:
        """The temperature of lowest perplexity on valid."""
        return min(self.temperatures, key=lambda t: self.at(t).tuned.perplexity)


def temperature(study: Study) -> Outcome:
    """Temperature of the kNN softmax.

    Row: 10

    Section: 5

    Hypothesis: does the softmax over neighbours need a temperature, and the same one whoever
    scores them?

    Finding: the best temperature differs by score type: 0.9 for the index's mask and score, 2.0 for
    its mask with the real score, 1.6 for the real mask and score, with λ fitted at each (their
    figures 5a and 5b, at 5 % and 100 % of the datastore).
    """
    scale = _modes.scale(study)
    temperatures = sorted({*GRID, *(factor * scale for factor in GRID)})
    curves = {
        (size, mode.name): Curve(study, mode, size, temperatures)
        for size in PARTS
        for mode in MODES
    }
    rows = [
        point.row(size=size) | {"temperature": t, "t_over_scale": t / scale}
        for (size, _), curve in curves.items()
        for t, point in zip(temperatures, curve.points, strict=True)
    ]
    index = curves[WHOLE, MODES[0].name]
    real = curves[WHOLE, MODES[2].name]
    best = index.at(index.best)
    borrowed = against(study, index.at(real.best), best)
    at_one, helps = against(study, index.at(1.0), best), against(study, best)
    said = {
        size: ", ".join(f"{curves[size, mode.name].best / scale:.2g}" for mode in MODES)
        for size in PARTS
    }
    return Outcome(
        rows=rows,
        verdict=both(
            borrowed.worse and not borrowed.equal,
            borrowed.equal and helps.large,  # else any t would be as good
        ),
        sentence=(
            f"In units of the self-check's temperature, {scale:.3g}, the best for "
            f"{'; '.join(mode.name for mode in MODES)} are {said[WHOLE]} at 100 % and "
            f"{said[SMALL]} at 5 %; the index's scores at the temperature that suits the real ones "
            f"give {borrowed} of their best perplexity, and at the paper's t = 1 {at_one}."
        ),
        plots=[_plot(size, curves, scale) for size in PARTS],
        comparisons={
            "index's scores at the real ones' temperature against their own best": borrowed,
            "index's scores at t = 1 against their own best": at_one,
            "index's scores against the model": helps,
        },
    )


def cost(study: Study) -> float:
    """Seconds: a twentieth of the datastore is searched, and some 360 settings fitted."""
    return _modes.cost(study, 0.05) + 60


def _plot(size: str, curves: dict[tuple[str, str], Curve], scale: float) -> Plot:
    series: list[Series] = []
    base: Any = None
    for mode in MODES:
        curve = curves[size, mode.name]
        drawn = [factor * scale for factor in GRID]
        series.append(Series(mode.name, list(GRID), [curve.at(t).perplexity for t in drawn]))
        base = curve.points[0].test.base_perplexity
    return Plot(
        title=f"Perplexity by temperature, {size} of the datastore",
        x=f"temperature ÷ {scale:.3g} (the self-check's)", y="perplexity (test)", series=series,
        level=base, level_name="model alone",
    )  # fmt: skip
