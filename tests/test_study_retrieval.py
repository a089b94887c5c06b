"""The retrieval experiments in a world of two words, where every answer is known by hand."""

from __future__ import annotations

import math

import bigram_world as world
import pytest
import torch

from knnlm_hf.errors import KNNLMError
from knnlm_hf.scores import TokenScores
from knnlm_hf.study import Settings, Study, retrieval
from knnlm_hf.study.experiments.base_lm import base_lm
from knnlm_hf.study.experiments.datastore_size import datastore_size
from knnlm_hf.study.experiments.mask_and_score import mask_and_score
from knnlm_hf.study.experiments.similarity_and_layer import similarity_and_layer
from knnlm_hf.study.experiments.sparsification import sparsification, top_of, truncated
from knnlm_hf.study.experiments.temperature import GRID, temperature
from knnlm_hf.study.experiments.which_tokens import (
    by_frequency,
    by_position,
    token_type,
    which_tokens,
)
from knnlm_hf.study.outcome import FAILS, HOLDS
from knnlm_hf.study.parts import SIZES
from knnlm_hf.study.search import codes_spec
from knnlm_hf.study.sweep import at_temperatures


def study(folder, model) -> Study:
    return Study(
        model, None, train=[world.text(2000)], valid=[world.text(1000)], test=[world.text(6500)],
        folder=folder, settings=Settings(k=360, resamples=200), show=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The model knows only that the words are a and b; the datastore knows the bigrams."""
    return study(tmp_path_factory.mktemp("uniform"), world.uniform())


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """The model knows the bigrams as well."""
    return study(tmp_path_factory.mktemp("knowing"), world.knowing())


class TestRow1:
    def test_a_coin_has_perplexity_2(self, one):
        found = base_lm(one)
        assert [row["perplexity"] for row in found.rows] == pytest.approx([2, 2], rel=1e-4)
        assert [row["tokens"] for row in found.rows] == [999, 6499]

    def test_the_model_that_knows_the_bigrams(self, knowing):
        assert base_lm(knowing).rows[1]["perplexity"] == pytest.approx(world.BIGRAM, rel=1e-3)


class TestRow2:
    def test_every_layer_and_similarity_finds_the_bigrams(self, one):
        found = similarity_and_layer(one)
        assert [row["setting"] for row in found.rows] == ["att-l2", "att-ip", "ffn-l2", "ffn-ip"]
        for row in found.rows:
            assert row["perplexity"] == pytest.approx(world.BIGRAM, rel=3e-3)
            assert row["base_perplexity"] == pytest.approx(2, rel=1e-4)
            assert row["lmbda"] > 0.99
            assert row["against_base"]["high"] < 0.75
        # att is no better than ffn here, where both states are the token's own.
        assert found.verdict == FAILS

    def test_the_oracle_takes_the_better_of_two(self, one):
        # b is likelier under the coin (1/2) than under its bigram (1/9); a after a: 8/9, else 1.
        row = similarity_and_layer(one).rows[0]
        oracle = math.exp((8 * math.log(9 / 8) + math.log(2)) / 10)
        assert row["oracle_perplexity"] == pytest.approx(oracle, rel=3e-3)


class TestRow8:
    def test_this_language_is_learnt_from_little_text(self, one):
        found = datastore_size(one)
        assert [row["size"] for row in found.rows] == list(SIZES)
        assert found.rows[-1]["entries"] == 1999
        assert found.rows[-1]["perplexity"] == pytest.approx(world.BIGRAM, rel=3e-3)
        assert found.rows[0]["perplexity"] < 1.45
        assert found.verdict == FAILS  # it saturates
        assert found.comparisons["share of the gain at 50%"].low > 0.9
        assert "not so: perplexity falls almost linearly; it does not saturate" in found.sentence
        assert found.plots[0].series[0].x == list(SIZES)


class TestRow9:
    def test_a_quantiser_that_loses_nothing_changes_nothing(self, one):
        # Two different keys: 16 centroids hold them exactly.
        found = mask_and_score(one)
        assert len(found.rows) == 9
        assert [row["perplexity"] for row in found.rows] == pytest.approx(
            [world.BIGRAM] * 9, rel=4e-3
        )
        assert found.verdict == FAILS


class TestRow10:
    def test_cold_is_the_bigram_model_and_no_mode_differs(self, one):
        found = temperature(one)
        assert len(found.plots) == 2
        for row in found.rows:
            if row["size"] == "100 %" and row["temperature"] <= 1:
                assert row["perplexity"] == pytest.approx(world.BIGRAM, rel=4e-3)
        assert found.verdict == FAILS
        assert found.plots[0].series[0].x == list(GRID)

    def test_neighbours_are_those_of_the_same_token(self, one):
        # After a, all k = 360 neighbours are of a. After b, 199 are of b and the others far off:
        # a hot softmax mixes those in, a cold one does not.
        scores = retrieval.scores(one, "test")
        (found,) = scores.memories
        distances = -found.similarity
        after_b = torch.cat([torch.tensor([False]), scores.tokens[:-1] == world.B])
        assert (distances[~after_b] < 1e-3).all()
        assert (distances[after_b, 199:] > 1).all()

    def test_one_pass_gives_what_each_temperature_gives(self, one):
        scores = retrieval.scores(one, "test")
        ts = [0.3, 1.0, 7.0, 500.0]
        found = at_temperatures(scores, ts)
        for t, log_probs in zip(ts, found, strict=True):
            torch.testing.assert_close(log_probs, scores.memory_log_probs(t), rtol=1e-4, atol=1e-5)

    def test_no_hit_at_all_leaves_the_model_alone(self):
        scores = with_neighbours([[-math.inf, -math.inf], [-1.0, -2.0]], [[False, False]] * 2)
        found = at_temperatures(scores, [2.0])
        assert found.tolist() == [[-0.5, -math.inf]]

    def test_by_hand(self):
        scores = with_neighbours(
            [[0.0, -math.log(4)], [-3.0, -math.inf]], [[False, True], [True, False]]
        )
        # t = 1: 1/4 of 5/4; t = 2: 1/2 of 3/2; the only hit has everything.
        found = at_temperatures(scores, [1.0, 2.0]).exp()
        torch.testing.assert_close(found, torch.tensor([[0.2, 1.0], [1 / 3, 1.0]]))

    def test_other_memories_have_no_temperature(self):
        plain = retrieval.replaced(with_neighbours([[0.0]], [[True]]), torch.zeros(1))
        with pytest.raises(KNNLMError, match="temperature"):
            at_temperatures(plain, [1.0])


def with_neighbours(similarity, is_target) -> TokenScores:
    from knnlm_hf.memory import Evidence

    count = len(similarity)
    return TokenScores(
        lm_log_probs=torch.full((count,), -0.5), tokens=torch.zeros(count),
        documents=torch.zeros(count), context=torch.ones(count), lmbdas=(0.0,),
        memories=(
            Evidence(similarity=torch.tensor(similarity), is_target=torch.tensor(is_target)),
        ),
    )  # fmt: skip


class TestRow11:
    def test_three_words_by_hand(self):
        logits = torch.tensor([[0.2, 0.5, 0.3], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]).log()
        targets = torch.tensor([2, 0, 1])
        rank, mass = top_of(logits, targets, [1, 2])
        assert rank.tolist() == [1, 2, 1]  # a tie goes to the lower id
        torch.testing.assert_close(mass, torch.tensor([[0.5, 0.8], [0.5, 0.8], [0.4, 0.8]]))
        own = logits.gather(1, targets[:, None])[:, 0]
        found = truncated(rank, mass, own, [1, 2], 2).exp()
        torch.testing.assert_close(found, torch.tensor([0.375, 0.0, 0.5]))

    def test_no_gain_for_a_model_that_is_right(self, knowing):
        found = sparsification(knowing)
        assert found.verdict == HOLDS
        assert found.rows[0]["lmbda"] < 0.01

    def test_a_gain_for_a_coin_that_should_always_have_said_a(self, one):
        # Top 1 is a; nine of ten tokens are a: the best mixture gives a 0.9.
        found = sparsification(one)
        entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
        assert found.rows[0]["perplexity"] == pytest.approx(math.exp(entropy), rel=3e-3)
        assert found.rows[0]["lmbda"] == pytest.approx(0.8, abs=0.01)
        assert found.verdict == FAILS


class TestRow16:
    def test_the_frequent_word_gains_and_the_rare_one_pays(self, one):
        found = which_tokens(one)
        by_count = {row["group"]: row for row in found.rows if row["kind"].startswith("frequency")}
        rare, frequent = by_count["100–999"], by_count["1,000–9,999"]
        assert (rare["tokens"], frequent["tokens"]) == (650, 5849)
        assert rare["against_base"]["ratio"] == pytest.approx(4.5, rel=0.05)
        # 8 of 9 a's follow an a (8/9), the ninth follows b (1); the coin gave 1/2.
        a = math.exp(8 / 9 * math.log(9 / 8)) / 2
        assert frequent["against_base"]["ratio"] == pytest.approx(a, rel=3e-3)
        assert rare["gaining"] == 0
        assert rare["share_of_gain"] + frequent["share_of_gain"] == pytest.approx(1)
        assert found.verdict == HOLDS

    def test_groups_by_hand(self):
        groups = by_frequency(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 9, 10]))
        assert {name: members.tolist() for name, members in groups.items()} == {
            "0": [True, False, False, False],
            "1–9": [False, True, False, False],
            "10–99": [False, False, True, True],
        }
        places = by_position(torch.tensor([1, 4, 5, 32]), 32)
        assert next(iter(places)) == "1–4"
        assert [int(members.sum()) for members in places.values()] == [2, 1, 0, 0, 0, 0, 0, 1]

    @pytest.mark.parametrize(
        ("text", "begins", "kind"),
        [
            (" the", True, "word"), (" Paris", True, "capitalised word"), ("ing", False,
            "piece of a word"), (" 1999", True, "number"), (" @-@", True, "punctuation"),
            ("\n", False, "space"), ("_", False, "punctuation"),
        ],
    )  # fmt: skip
    def test_types_by_hand(self, text, begins, kind):
        assert token_type(text, begins) == kind


@pytest.mark.parametrize(
    ("entries", "dim", "spec"),
    [
        (2_688_111, 256, "IVF512,PQ64"),
        (9_000, 24, "IVF32,PQ6x4"),
        (9_000, 26, "Pad28,IVF32,PQ7x4"),
        (1, 4, "IVF1,PQ1x4"),
    ],
)
def test_the_quantiser_has_four_dimensions_a_code(entries, dim, spec):
    assert codes_spec(entries, dim) == spec
