"""What decides a row's verdict: shares of a gain, clauses, and the rows' findings, by hand."""

from __future__ import annotations

import math

import bigram_world as world
import pytest
import torch

from knnlm_hf.errors import KNNLMError
from knnlm_hf.study import Comparison, Settings, Study
from knnlm_hf.study.bootstrap import Share, compare, share
from knnlm_hf.study.experiments import (
    centroids,
    datastore_size,
    similarity_and_layer,
    which_tokens,
)
from knnlm_hf.study.outcome import FAILS, HOLDS, UNDECIDED
from knnlm_hf.study.verdicts import Clause, about_half, below, every, judged, within


def of(low: float, high: float, blocks: int = 100) -> Comparison:
    return Comparison((low + high) / 2, low, high, blocks)


def part(low: float, high: float) -> Share:
    return Share((low + high) / 2, low, high, 100)


class TestShare:
    def test_by_hand(self):
        # Perplexities 8, 6 and 4 of every token: half of the gain.
        base, a, b = (torch.full((6400,), -math.log(p)) for p in (8, 6, 4))
        found = share(a, b, base, torch.zeros(6400))
        assert [found.ratio, found.low, found.high] == pytest.approx([0.5] * 3, rel=1e-5)
        assert (found.blocks, str(found)) == (100, "50% [50%, 50%]")

    def test_the_interval_is_that_of_the_same_resamples(self):
        generator = torch.Generator().manual_seed(0)
        base = -torch.rand(6400, generator=generator) - 2
        a = base + 0.1 * torch.rand(6400, generator=generator)
        b = base + 0.2
        found = share(a, b, base, torch.zeros(6400), seed=3)
        alone = compare(a, base, torch.zeros(6400), seed=3)
        # b gains everywhere alike, so that a's gain alone makes the interval.
        expected = [(1 - one) / (1 - math.exp(-0.2)) for one in (alone.high, alone.low)]
        assert [found.low, found.high] == pytest.approx(expected, rel=1e-5)
        assert found.low < found.ratio < found.high

    def test_of_no_gain_there_is_no_share(self):
        base = torch.full((6400,), -2.0)
        for b in (base, base - 0.1):
            found = share(base + 0.1, b, base, torch.zeros(6400))
            assert (found.low, found.high) == (-math.inf, math.inf)
            assert about_half("", found) == Clause("", False, False)

    def test_refuses_other_tokens(self):
        with pytest.raises(KNNLMError, match="same text"):
            share(torch.zeros(2), torch.zeros(3), torch.zeros(2), torch.zeros(2))


class TestClauses:
    @pytest.mark.parametrize(
        ("low", "high", "holds", "fails"),
        [(0.9, 0.94, True, False), (0.9, 0.96, False, False), (0.96, 0.99, False, True)],
    )
    def test_below(self, low, high, holds, fails):
        assert below("it", of(low, high), 0.95) == Clause("it", holds, fails)
        assert below("it", of(low, high, blocks=9), 0.95) == Clause("it", False, False)

    @pytest.mark.parametrize(
        ("low", "high", "holds", "fails"),
        [(0.41, 0.59, True, False), (0.3, 0.5, False, False), (0.1, 0.39, False, True),
         (0.61, 0.9, False, True)],
    )  # fmt: skip
    def test_within(self, low, high, holds, fails):
        assert about_half("it", part(low, high)) == Clause("it", holds, fails)
        assert within("it", part(low, high), 0.4, 0.6) == Clause("it", holds, fails)

    def test_a_finding_is_all_of_its_clauses(self):
        good, bad, unknown = (Clause(n, n == "a", n == "b") for n in "abc")
        assert judged([good]) == (HOLDS, "")
        assert judged([good, unknown]) == (UNDECIDED, "; not certain: c")
        assert judged([good, bad, unknown]) == (FAILS, "; not so: b; not certain: c")
        assert every("d", [good, unknown]) == Clause("d", False, False)
        assert every("d", [bad, unknown]) == Clause("d", False, True)
        assert bad.tried(fair=False) == Clause("b", False, False)


class TestRow2:
    HELP, FAR, SAME = of(0.84, 0.88), of(0.92, 0.93), of(0.998, 1.004)

    def test_the_paper_s_figures_hold(self):
        assert similarity_and_layer.verdict_of([self.HELP] * 4, self.FAR, self.SAME) == (HOLDS, "")

    def test_a_little_better_is_not_far_better(self):
        verdict, said = similarity_and_layer.verdict_of(
            [self.HELP] * 4, of(0.993, 0.999), self.SAME
        )
        assert verdict == FAILS
        assert said == "; not so: att is far better than ffn"

    def test_each_clause_is_named(self):
        gains = [self.HELP, of(0.998, 1.01)]
        verdict, said = similarity_and_layer.verdict_of(gains, of(0.94, 0.96), of(1.01, 1.02))
        assert verdict == FAILS
        assert said == (
            "; not so: all help; l2 and ip are equal on att; not certain: att is far better than "
            "ffn"
        )

    @pytest.mark.parametrize(
        ("layers", "said"),
        [(("ffn",), "no att"), (("final",), "no att and no ffn"), (("ffn", "att"), "att against")],
    )
    def test_layers_are_looked_up_by_name(self, tmp_path, layers, said):
        study = Study(
            world.uniform(), None, train=[world.text(800)], valid=[world.text(800)],
            test=[world.text(1000)], folder=tmp_path, show=False,
            settings=Settings(k=8, resamples=100, layers=layers),
        )  # fmt: skip
        found = similarity_and_layer.similarity_and_layer(study)
        assert said in found.sentence
        assert [row["layer"] for row in found.rows[::2]] == list(layers)
        assert f"{layers[0]}-l2 against the model" in found.to_dict()["comparisons"]
        assert found.sentence.startswith(f"{layers[0]}-l2 takes")
        if "att" in layers:
            assert "att-l2 against ffn-l2" in found.comparisons
        else:
            assert found.verdict == UNDECIDED
            assert "att against ffn" not in found.sentence


class TestRow7:
    def test_the_paper_s_figures_hold(self):
        found = centroids.verdict_of(of(0.965, 0.975), part(0.2, 0.3), of(0.985, 0.994), fair=True)
        assert found == (HOLDS, "")

    def test_training_on_that_brings_next_to_nothing(self):
        gain, share_of_gain = of(0.95, 0.96), part(0.25, 0.32)
        for further in (of(0.996, 0.999), of(1.001, 1.01), of(0.9, 0.93)):
            assert centroids.verdict_of(gain, share_of_gain, further, fair=True) == (
                FAILS, "; not so: training them on brings a little",
            )  # fmt: skip
            unfair = centroids.verdict_of(gain, share_of_gain, further, fair=False)
            assert unfair[0] == UNDECIDED

    def test_most_of_the_gain_is_too_much(self):
        verdict, said = centroids.verdict_of(
            of(0.9, 0.91), part(0.7, 0.8), of(0.985, 0.99), fair=True
        )
        assert (verdict, said) == (FAILS, "; not so: far less than kNN's gain is left")


class TestRow8:
    HELPS, LAST = of(0.97, 0.98), of(0.98, 0.99)

    def test_a_line_holds(self):
        assert datastore_size.verdict_of(self.HELPS, part(0.45, 0.55), self.LAST) == (HOLDS, "")

    def test_a_curve_does_not(self):
        found = datastore_size.verdict_of(self.HELPS, part(0.7, 0.8), self.LAST)
        assert found == (FAILS, "; not so: perplexity falls almost linearly")

    def test_nor_does_what_saturates(self):
        found = datastore_size.verdict_of(self.HELPS, part(0.45, 0.55), of(0.999, 1.001))
        assert found == (FAILS, "; not so: it does not saturate at 90 %")


def test_row_16_says_how_many_groups_it_has():
    few, one, two = {"a": None}, {"a": of(0.9, 0.92), "b": None}, {"a": of(1, 1), "b": of(0.9, 0.9)}
    said = [
        which_tokens.said_of("kind", which_tokens._extremes(gains)) for gains in (few, one, two)
    ]
    assert said == [
        "by kind no group has the 640 tokens that are needed",
        "by kind one group only has enough tokens, 0.910 × [0.900, 0.920] (a)",
        "by kind from 0.900 × [0.900, 0.900] (b) to 1.000 × [1.000, 1.000] (a)",
    ]
