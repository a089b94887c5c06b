"""Row 16: where the gain comes from."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm_hf.study import retrieval
from knnlm_hf.study.bootstrap import Comparison, compare
from knnlm_hf.study.cost import evaluated, search_seconds
from knnlm_hf.study.measure import Measured, measure
from knnlm_hf.study.outcome import Outcome, Plot, Series, both
from knnlm_hf.study.study import Study

_FEWEST = 640  # tokens of a group worth a figure: 10 blocks


def which_tokens(study: Study) -> Outcome:
    """Which tokens gain.

    Row: 16

    Section: 6

    Hypothesis: does kNN help rare or frequent tokens, early or late ones in the window, words or
    pieces of words?

    Finding: the gain differs from kind to kind of token (qualitative: the released code bins tokens
    by frequency, position and type, and no figure is given for them).
    """
    layer = study.layers[0]
    one = measure(
        f"{layer}-l2",
        retrieval.scores(study, "valid", layer=layer),
        retrieval.scores(study, "test", layer=layer),
    )
    whole = _in_whole_windows(study, one)
    groups = {
        "frequency in the training text": (one, by_frequency(one.test.tokens, _counts(study))),
        "position in the window": (whole, by_position(whole.test.context, study.window)),
        "type of token": (one, _by_type(study, one.test.tokens)),
    }
    rows, plots = [], []
    spreads: dict[str, list[tuple[str, Comparison]]] = {}
    for kind, (on, members) in groups.items():
        gains = {name: _gain(study, on, is_in_N) for name, is_in_N in members.items()}
        rows += [_row(on, kind, name, members[name], gain) for name, gain in gains.items()]
        spreads[kind] = _extremes(gains)
        if spreads[kind]:
            plots.append(_plot(kind, gains))
    pairs = [ends for ends in spreads.values() if len(ends) == 2]
    decided = [most.high < least.low for (_, most), (_, least) in pairs]
    gained = (one.log_probs > one.test.lm_log_probs).double().mean().item()
    return Outcome(
        rows=rows,
        verdict=both(any(decided), False),
        sentence=(
            f"The mixture gives {gained:.0%} of the tokens a higher probability than the model "
            "does; perplexity as a multiple of the model's own: "
            f"{'; '.join(said_of(kind, ends) for kind, ends in spreads.items())}."
        ),
        plots=plots,
        comparisons={
            f"{kind}: {name}": gain for kind, ends in spreads.items() for name, gain in ends
        },
    )


def cost(study: Study) -> float:
    """Seconds of one more search of test, in windows that do not overlap."""
    return search_seconds(study, evaluated(study) / 2)


def _in_whole_windows(study: Study, one: Measured) -> Measured:
    """The same settings on test in windows that do not overlap: tokens of every position."""
    layer, tuned = study.layers[0], one.tuned
    test = retrieval.scores(study, "test", layer=layer, stride=study.window)
    return replace(
        one,
        test=test,
        log_probs=test.log_probs(tuned.lmbda, tuned.temperature, tuned.k),
        memory_log_probs=test.memory_log_probs(tuned.temperature, tuned.k),
    )


def by_frequency(tokens_N: Tensor, counts_V: Tensor) -> dict[str, Tensor]:
    """Groups of tokens by powers of ten of their count in the training text."""
    count_N = counts_V[tokens_N.long()]
    groups = {"0": count_N == 0}
    for power in range(int(np.log10(max(1, int(counts_V.max())))) + 1):
        low, high = 10**power, 10 ** (power + 1)
        groups[f"{low:,}–{high - 1:,}"] = (count_N >= low) & (count_N < high)
    return groups


def by_position(context_N: Tensor, window: int) -> dict[str, Tensor]:
    """Groups of tokens by how many the model saw before them: eighths of the window."""
    edges = [round(window * eighth / 8) for eighth in range(9)]
    return {
        f"{low + 1}–{high}": (context_N > low) & (context_N <= high)
        for low, high in pairwise(edges)
        if high > low
    }


def token_type(text: str, begins_word: bool) -> str:
    """What kind of token a text is, in a few words."""
    word = text.strip()
    if not word:
        return "space"
    if re.fullmatch(r"[\W_]+", word):
        return "punctuation"
    if re.search(r"\d", word):
        return "number"
    if not begins_word:
        return "piece of a word"
    return "capitalised word" if word[0].isupper() else "word"


def _by_type(study: Study, tokens_N: Tensor) -> dict[str, Tensor]:
    if study.tokenizer is None:
        return {}
    ids, where_N = tokens_N.long().unique(return_inverse=True)  # type: ignore[no-untyped-call]
    pieces = study.tokenizer.convert_ids_to_tokens(ids.tolist())
    texts = [study.tokenizer.convert_tokens_to_string([piece]) for piece in pieces]
    types = np.array(
        [
            token_type(text, _begins_word(piece, text))
            for piece, text in zip(pieces, texts, strict=True)
        ]
    )[where_N.numpy()]
    return {str(kind): torch.from_numpy(types == kind) for kind in np.unique(types)}


def _begins_word(piece: str, text: str) -> bool:
    """Whether a piece has the mark of byte-level BPE or of SentencePiece."""
    return piece.startswith(("Ġ", "▁", " ")) or text[:1].isspace()


def _counts(study: Study) -> Tensor:
    parts = study.text("train").documents
    counts = sum(np.bincount(part, minlength=study.vocab_size) for part in parts)
    return torch.from_numpy(np.asarray(counts))


def _gain(study: Study, one: Measured, is_in_N: Tensor) -> Comparison | None:
    if int(is_in_N.sum()) < _FEWEST:
        return None
    return compare(
        one.log_probs[is_in_N], one.test.lm_log_probs[is_in_N], one.test.documents[is_in_N],
        seed=study.settings.seed, resamples=study.settings.resamples,
    )  # fmt: skip


def _row(
    one: Measured, kind: str, name: str, is_in_N: Tensor, gain: Comparison | None
) -> dict[str, Any]:
    gain_N = (one.log_probs - one.test.lm_log_probs).double()
    inside = int(is_in_N.sum())
    return {
        "setting": one.name,
        "kind": kind,
        "group": name,
        "tokens": inside,
        "lmbda": one.tuned.lmbda,
        "temperature": one.tuned.temperature,
        "tuned_on": "valid",
        "share_of_gain": float(gain_N[is_in_N].sum() / gain_N.sum()),
        "gaining": float((gain_N[is_in_N] > 0).double().mean()) if inside else None,
        "against_base": None if gain is None else gain.to_dict(),
    }


def _extremes(gains: dict[str, Comparison | None]) -> list[tuple[str, Comparison]]:
    """The group that gains most and the one that gains least; where there is but one, that."""
    known = [(name, gain) for name, gain in gains.items() if gain]
    known.sort(key=lambda item: item[1].ratio)
    return known if len(known) < 2 else [known[0], known[-1]]


def said_of(kind: str, ends: list[tuple[str, Comparison]]) -> str:
    """What is known of the groups of a kind, in words."""
    if not ends:
        return f"by {kind} no group has the {_FEWEST} tokens that are needed"
    said = [f"{gain} ({name})" for name, gain in ends]
    if len(said) == 1:
        return f"by {kind} one group only has enough tokens, {said[0]}"
    return f"by {kind} from {said[0]} to {said[1]}"


def _plot(kind: str, gains: dict[str, Comparison | None]) -> Plot:
    known = {name: gain for name, gain in gains.items() if gain is not None}
    return Plot(
        title=f"Gain by {kind}", x=kind, y="perplexity ÷ the model's", kind="bar",
        level=1.0, level_name="model alone",
        series=[
            Series(
                "kNN-LM", list(known), [gain.ratio for gain in known.values()],
                [gain.low for gain in known.values()], [gain.high for gain in known.values()],
            )
        ],
    )  # fmt: skip
