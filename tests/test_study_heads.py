"""The trained memories of the study, on a language whose best perplexities are known."""

from __future__ import annotations

import json
import math

import pytest
import torch
import toy_study
from toy_study import BEST, ONE_ROW

from knnlm_hf.errors import SettingError
from knnlm_hf.memory import CentroidMemory, MixtureOfSoftmaxes, MultiEmbeddingHead
from knnlm_hf.memory.entries import Batch
from knnlm_hf.memory.recipe import Recipe
from knnlm_hf.study import Comparison, Settings, heads
from knnlm_hf.study.experiments.adaptive_embeddings import (
    adaptive_embeddings,
    by_frequency,
    total_loss,
)
from knnlm_hf.study.experiments.centroids import centroids, clusters
from knnlm_hf.study.experiments.interpolated_loss import interpolated_loss, mixture_loss
from knnlm_hf.study.experiments.mixture_of_softmaxes import mixture_of_softmaxes
from knnlm_hf.study.experiments.number_of_embeddings import number_of_embeddings
from knnlm_hf.study.experiments.trained_matrix import trained_matrix
from knnlm_hf.study.forward import rows_of
from knnlm_hf.study.verdicts import no_gain


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """All heads of the module share one workspace, as those of a study do."""
    return toy_study.study(tmp_path_factory.mktemp("toy"), most_settings=2)


def rows_by_name(outcome):
    json.dumps(outcome.to_dict(), allow_nan=False)
    return {row["setting"]: row for row in outcome.rows}


class TestTheToy:
    def test_states_are_the_token_that_is_read(self, toy):
        store = toy.store("att")
        read = torch.tensor(toy.text("train").documents[0])[: len(store)]
        keys = store.keys[torch.arange(len(store))].float()
        assert torch.equal(keys[read == toy_study.A1][0], -keys[read == toy_study.A2][0])
        for token in range(6):
            assert keys[read == token].unique(dim=0).shape[0] == 1


class TestRows:
    def test_one_row_cannot_tell_what_two_can(self, toy):
        found = rows_by_name(number_of_embeddings(toy))
        one, two = found["n = 1, att"], found["n = 2, att"]
        assert one["memory_perplexity"] == pytest.approx(ONE_ROW, rel=0.02)
        assert two["memory_perplexity"] == pytest.approx(BEST, rel=0.1)
        assert two["against_one"]["high"] < 0.9
        outcome = number_of_embeddings(toy)
        assert outcome.verdict == "does not hold"
        assert "not so: more of them do not help; all bring about half" in outcome.sentence
        assert outcome.comparisons["share of kNN's gain, n = 1"].ratio < 0.4

    def test_the_matrix_has_part_of_the_datastore_s_gain(self, toy):
        outcome = trained_matrix(toy)
        found = rows_by_name(outcome)
        assert found["kNN-LM, att-l2"]["perplexity"] == pytest.approx(BEST, rel=0.1)
        assert found["V×D matrix, att"]["perplexity"] == pytest.approx(ONE_ROW, rel=0.02)
        assert found["V×D matrix, att"]["oracle_perplexity"] <= ONE_ROW
        share = (6 - found["V×D matrix, att"]["perplexity"]) / (6 - BEST)
        said = float(outcome.sentence.split("%")[0].split()[-1]) / 100
        assert said == pytest.approx(share, abs=0.05)
        assert outcome.verdict == "does not hold"
        assert "not so: it brings about half of kNN's gain." in outcome.sentence

    def test_softmaxes_tell_it_too(self, toy):
        found = rows_by_name(mixture_of_softmaxes(toy))
        assert found["2 softmaxes"]["memory_perplexity"] == pytest.approx(BEST, rel=0.1)
        assert {"3 softmaxes", "n = 1, att", "n = 3, att"} <= found.keys()

    def test_rows_are_given_to_the_words_that_need_them(self, toy):
        outcome = adaptive_embeddings(toy)
        assert [row["by"] for row in outcome.rows] == ["frequency", "training loss", "equal"]
        lengths = [row["setting"] for row in outcome.rows]
        assert lengths[1] == "3V rows by training loss, 18 in all"

    def test_rows_by_frequency_by_hand(self):
        # Counts of 1, 10, …, 10^5 have 1, 1, 2, 3, 4, 5 rows to the base 10: 16 in all.
        counts = 10 ** torch.arange(6)
        assert by_frequency(counts, 16).tolist() == [1, 1, 2, 3, 4, 5]
        assert by_frequency(counts, 6).tolist() == [1] * 6

    def test_total_loss_by_hand(self):
        found = total_loss(torch.tensor([2, 0, 2]), torch.tensor([-1.0, -5.0, -2.5]), 4)
        assert found.tolist() == [5.0, 0.0, 3.5, 0.0]

    def test_as_many_centroids_as_tokens_know_the_language(self, toy):
        assert clusters(toy) == 16
        outcome = centroids(toy)
        found = rows_by_name(outcome)
        plain, tuned = found["16 centroids"], found["16 centroids, fine-tuned"]
        assert plain["memory_perplexity"] == pytest.approx(BEST, rel=0.1)
        assert tuned["memory_perplexity"] == pytest.approx(BEST, rel=0.1)
        assert outcome.verdict == "does not hold"  # they keep all of kNN's gain
        assert "far less than kNN's gain is left" in outcome.sentence.split("not so:")[1]


class TestInterpolatedLoss:
    def test_the_gradient_is_that_of_the_mixture(self):
        torch.manual_seed(0)
        head = MultiEmbeddingHead(5, 4, n=2).double()
        keys, tokens = torch.randn(7, 5, dtype=torch.float64), torch.randint(4, (7,))
        lm_N = torch.rand(9).log()
        ids = torch.tensor([8, 0, 1, 2, 3, 4, 5])
        value = mixture_loss(head, Batch(keys, tokens, ids), lm_N, 0.3)
        (found,) = torch.autograd.grad(value, head.weight)
        logits = (keys @ head.weight.T).view(7, 4, 2).exp().sum(2)
        own = logits[torch.arange(7), tokens] / logits.sum(1)
        loss = -(0.7 * lm_N[ids].exp() + 0.3 * own).log().mean()
        (expected,) = torch.autograd.grad(loss, head.weight)
        assert value.item() == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)

    def test_it_is_compared_with_the_head_s_own_loss(self, toy):
        outcome = interpolated_loss(toy)
        own, mixed = outcome.rows
        assert own["loss"] == "its own"
        assert 0 < mixed["trained_lmbda"] < 1
        assert mixed["perplexity"] == pytest.approx(own["perplexity"], rel=0.05)


class TestBudget:
    def test_without_one_it_is_the_recipe_s_own(self, toy):
        assert heads.recipe(toy).epochs == 5
        assert heads.entries(toy, "att").live == 5999
        assert heads.entries(toy, "att").digest == toy.store("att").digest
        assert not heads.is_cut(toy)
        assert heads.recipe(toy).batch_size == 64  # 2^⌊log2(5 · 5,999 ÷ 250)⌋

    def test_a_small_one_takes_a_part_of_the_text_once(self, tmp_path):
        study = toy_study.study(tmp_path, head_tokens=2000)
        entries = heads.entries(study, "att")
        assert heads.recipe(study).epochs == 1
        assert entries.live == pytest.approx(2000, abs=32)
        assert entries.digest != study.store("att").digest
        assert heads.is_cut(study)
        assert "once" in heads.said_of(study)

    def test_a_large_one_repeats_it(self, tmp_path):
        study = toy_study.study(tmp_path, head_tokens=12_500)
        assert heads.recipe(study).epochs == 2
        assert heads.entries(study, "att").live == 5999
        assert not heads.is_cut(study)

    def test_what_the_model_says_of_the_entries(self, tmp_path):
        study = toy_study.study(tmp_path, head_tokens=700)
        entries = heads.entries(study, "att")
        ids = entries.nth_live(torch.arange(entries.live))
        text = torch.tensor(study.text("train").documents[0])
        assert torch.equal(entries.values[ids], text[ids + 1])
        model = toy_study.model()
        with torch.no_grad():  # its states are the token it reads: no context is needed
            logits = model(input_ids=text[ids][:, None]).logits[:, 0].log_softmax(-1)
        expected = logits.gather(1, text[ids + 1][:, None].long())[:, 0]
        torch.testing.assert_close(heads.lm_log_probs(study), expected)

    def test_rows_are_in_corpus_order(self, toy):
        rows = rows_of(toy.text("train").documents, toy.window, toy.stride)
        assert [row.start for row in heads.train_rows(toy)] == [row.start for row in rows]

    def test_heads_are_trained_once(self, toy):
        first = heads.trained(toy, "att", "multi_embedding", "rows1", n=1)
        path = toy.workspace.folder / "heads" / first.name / "model.safetensors"
        before = path.stat().st_mtime_ns
        again = heads.trained(toy, "att", "multi_embedding", "rows1", n=1)
        assert again.name == first.name
        assert path.stat().st_mtime_ns == before

    def test_negatives_and_precision_are_the_recipe_s(self, tmp_path):
        study = toy_study.study(tmp_path, head_negatives=3, head_dtype="bfloat16", head_tokens=400)
        how = heads.recipe(study)
        assert (how.negatives, how.dtype) == (3, "bfloat16")
        assert heads.suited(how, MixtureOfSoftmaxes).negatives == 3
        assert heads.suited(how, CentroidMemory).negatives is None
        assert heads.trained(study, "att", "centroids", "few", clusters=2).head.trained
        assert heads.suited(how, MixtureOfSoftmaxes).lr == Recipe().lr

    def test_most_settings_is_checked(self, toy):
        assert heads.some(toy, [1, 2, 3]) == [1, 2]
        with pytest.raises(SettingError, match="most_settings"):
            Settings(most_settings=0)


@pytest.mark.parametrize(
    ("low", "high", "fair", "verdict"),
    [
        (0.9, 0.98, False, "does not hold"),
        (0.999, 1.001, True, "holds"),
        (0.999, 1.001, False, "not decidable at this size"),
        (0.99, 1.001, True, "not decidable at this size"),
    ],
)
def test_no_gain(low, high, fair, verdict):
    gain = Comparison(math.sqrt(low * high), low, high, 100)
    assert no_gain(gain, fair=fair) == verdict
