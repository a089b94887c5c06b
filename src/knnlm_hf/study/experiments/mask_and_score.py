"""Row 9: whether approximate search is better than exact search."""

from __future__ import annotations

from knnlm_hf.study.bootstrap import Comparison
from knnlm_hf.study.cost import index_seconds
from knnlm_hf.study.experiments import _modes
from knnlm_hf.study.experiments._modes import MODES, WHOLE
from knnlm_hf.study.measure import Measured, against, measure
from knnlm_hf.study.outcome import Outcome, Plot, Series, both
from knnlm_hf.study.study import Study


def mask_and_score(study: Study) -> Outcome:
    """Approximate or exact: mask and score.

    Row: 9

    Section: 5

    Hypothesis: is a product quantiser's search only a cheaper approximation of exact search, or is
    it better?

    Finding: approximate beats exact at temperature 1: 19.17 with mask and score of the index, 19.67
    with its mask and the real score, 19.74 with the real mask and score.
    """
    scale = _modes.scale(study)
    choices = {"t = 1": [1.0], f"t = {scale:.3g}, the self-check's": [scale], "t fitted": None}
    found = {
        (choice, mode.name): measure(
            mode.name,
            _modes.scores(study, "valid", mode, WHOLE),
            _modes.scores(study, "test", mode, WHOLE),
            temperatures=temperatures,
        )
        for choice, temperatures in choices.items()
        for mode in MODES
    }
    rows = [
        one.row(choice=choice, against_base=against(study, one).to_dict())
        for (choice, _), one in found.items()
    ]
    pairs = {choice: _pair(study, found, choice) for choice in choices}
    at_one = pairs["t = 1"]
    helps = against(study, found["t fitted", MODES[2].name])
    said = "; ".join(f"{choice}: {pair}" for choice, pair in pairs.items())
    names = [mode.name for mode in MODES]
    return Outcome(
        rows=rows,
        # Equal modes say something only where kNN itself does.
        verdict=both(at_one.better, at_one.worse or (at_one.equal and helps.large)),
        sentence=(
            "Perplexity with the index's mask and score as a multiple of that with the real ones: "
            f"{said}; with t fitted it is {_perplexity(found, 't fitted', 0):.2f} against "
            f"{_perplexity(found, 't fitted', 2):.2f}, on {rows[0]['tokens']:,} tokens."
        ),
        plots=[
            Plot(
                title="Perplexity by mask and score", x="", y="perplexity (test)", kind="bar",
                level=rows[0]["base_perplexity"], level_name="model alone",
                series=[
                    Series(
                        choice, names, [_perplexity(found, choice, i) for i in range(len(MODES))]
                    )
                    for choice in choices
                ],
            )
        ],
        comparisons={
            **{f"index against real, {choice}": pair for choice, pair in pairs.items()},
            "real against the model, t fitted": helps,
        },
    )  # fmt: skip


def cost(study: Study) -> float:
    """Seconds: a product quantiser is built, and the whole datastore searched exactly."""
    return 3 * index_seconds(study) + _modes.cost(study)


def _pair(study: Study, found: dict[tuple[str, str], Measured], choice: str) -> Comparison:
    return against(study, found[choice, MODES[0].name], found[choice, MODES[2].name])


def _perplexity(found: dict[tuple[str, str], Measured], choice: str, mode: int) -> float:
    return found[choice, MODES[mode].name].perplexity
