"""The study's framework: what is made once, what is skipped, what a comparison says."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from knnlm_hf.errors import KNNLMError
from knnlm_hf.index import built_indexes
from knnlm_hf.study import (
    Settings,
    Study,
    all_experiments,
    catalogue,
    compare,
    parts,
    retrieval,
    workspace,
)
from knnlm_hf.study.bootstrap import blocks
from knnlm_hf.study.catalogue import parse
from knnlm_hf.study.forward import rows_of, spread
from knnlm_hf.study.indexes import KeptIndex
from knnlm_hf.study.parts import SIZES, cut, nearest_of
from knnlm_hf.study.workspace import Workspace


def study(folder, **changes) -> Study:
    options = {"model": tiny.gpt2(), "train": tiny.corpus(20, 1), "settings": Settings(k=16)}
    options |= changes
    return Study(
        options.pop("model"), tiny.tokenizer(), valid=tiny.corpus(8, 2), test=tiny.corpus(8, 3),
        folder=folder, show=False, **options,
    )  # fmt: skip


class TestBootstrap:
    def test_two_blocks_by_hand(self):
        # Block 0 has one token, b worse by log 2; block 1 three tokens, both equal. Resamples are
        # {00: 1/2, 01 or 10: 2^(1/4), 11: 1} with probabilities 1/4, 1/2, 1/4.
        documents = torch.arange(50).repeat_interleave(torch.tensor([1] * 49 + [3]))
        gain = torch.zeros(len(documents))
        gain[0] = math.log(2)
        found = compare(gain - 1, torch.zeros(len(documents)) - 1, documents, seed=0)
        assert found.ratio == pytest.approx(2 ** (-1 / 52))
        assert found.blocks == 50
        assert found.low < found.ratio < found.high <= 1
        assert not found.better
        assert not found.worse

    def test_a_constant_gain_is_certain(self):
        documents = torch.zeros(2000, dtype=torch.int32)
        base = torch.randn(2000) - 3
        found = compare(base + 0.1, base, documents)
        assert found.low == pytest.approx(math.exp(-0.1), rel=1e-5)
        assert found.high == pytest.approx(math.exp(-0.1), rel=1e-5)
        assert found.better
        assert compare(base, base + 0.1, documents).worse

    def test_the_interval_is_the_textbook_one(self):
        # With equal blocks, the bootstrap of a mean has standard error s / sqrt(blocks).
        generator = torch.Generator().manual_seed(0)
        per_block = torch.randn(400, generator=generator, dtype=torch.float64)
        gain = per_block.repeat_interleave(3) * 0.1
        documents = torch.arange(400).repeat_interleave(3)
        found = compare(gain, torch.zeros_like(gain), documents, resamples=4000)
        width = 2 * 1.96 * 0.1 * per_block.std(correction=0).item() / math.sqrt(400)
        assert math.log(found.high / found.low) == pytest.approx(width, rel=0.05)

    def test_seeds(self):
        documents = torch.zeros(9000)
        a, b = torch.randn(9000), torch.randn(9000)
        assert compare(a, b, documents, seed=3) == compare(a, b, documents, seed=3)
        assert compare(a, b, documents, seed=3) != compare(a, b, documents, seed=4)

    def test_blocks_are_documents_where_there_are_enough(self):
        documents = torch.arange(60).repeat_interleave(2) * 7
        assert blocks(documents).tolist() == torch.arange(60).repeat_interleave(2).tolist()

    def test_else_runs_and_the_short_end_joins_the_last(self):
        assert blocks(torch.zeros(51_300)).bincount().tolist() == [512] * 99 + [612]
        assert blocks(torch.zeros(7_010)).bincount().tolist() == [70] * 99 + [80]
        assert blocks(torch.zeros(130)).bincount().tolist() == [64, 66]
        assert blocks(torch.zeros(5)).tolist() == [0] * 5

    @pytest.mark.parametrize("wrong", [-math.inf, math.nan])
    def test_refuses_what_has_no_ratio(self, wrong):
        with pytest.raises(KNNLMError, match="without probability"):
            compare(torch.tensor([wrong]), torch.zeros(1), torch.zeros(1))
        with pytest.raises(KNNLMError, match="same text"):
            compare(torch.zeros(2), torch.zeros(3), torch.zeros(2))


class TestWorkspace:
    def test_made_once_and_again_for_other_inputs(self, tmp_path):
        made = []

        def make(path):
            made.append(path)
            path.write_text("x")

        space = Workspace(tmp_path)
        first = space.keep("things", "a", {"seed": 0, "n": [1, 2]}, make)
        assert space.keep("things", "a", {"n": [1, 2], "seed": 0}, make) == first
        assert len(made) == 1
        assert space.keep("things", "a", {"n": [1, 2], "seed": 1}, make) != first
        assert first.read_text() == "x"

    def test_an_error_leaves_nothing(self, tmp_path):
        def fail(path):
            path.mkdir()
            (path / "half").write_text("x")
            raise ValueError

        space = Workspace(tmp_path)
        with pytest.raises(ValueError):  # noqa: PT011
            space.keep("things", "a", {}, fail)
        path = space.keep("things", "a", {}, lambda path: path.write_text("whole"))
        assert path.read_text() == "whole"
        assert len(list((tmp_path / "things").iterdir())) == 2

    def test_a_resumable_thing_sees_what_was_there(self, tmp_path):
        def half(path):
            path.mkdir()
            (path / "half").write_text("x")
            raise KeyboardInterrupt

        space = Workspace(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            space.keep("things", "a", {}, half, resumes=True)
        seen = []
        space.keep("things", "a", {}, lambda p: seen.extend(p.iterdir()), resumes=True)
        assert [path.name for path in seen] == ["half"]

    def test_seconds_are_its_own_and_are_remembered(self, tmp_path, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(workspace.time, "perf_counter", lambda: now[0])

        def wait(seconds, *inner):
            def make(path):
                for name in inner:
                    space.keep("things", name, {}, wait(2.0))
                now[0] += seconds
                path.write_text("x")

            return make

        space = Workspace(tmp_path)
        outer = space.keep("things", "outer", {}, wait(5.0, "inner"))
        assert list(space.spent.values()) == [0, 0]  # the wall clock has seen them
        space.spent.clear()
        space.keep("things", "outer", {}, wait(5.0))
        assert space.spent == {outer: 5}
        later = Workspace(tmp_path)
        later.keep("things", "both", {}, wait(1.0))
        for name in ("outer", "inner", "both"):
            later.keep("things", name, {}, wait(0.0))
        assert sorted(later.spent.values()) == [0, 2, 5]

    def test_full_disk_is_one_clear_line(self, tmp_path):
        (tmp_path / "things").write_text("a file in the way")
        with pytest.raises(KNNLMError, match="cannot be written"):
            Workspace(tmp_path).keep("things", "a", {}, lambda path: None)


class TestParts:
    def test_parts_are_disjoint_nested_and_of_the_right_sizes(self):
        found = cut(997, seed=3)
        assert len(found) == len(SIZES)
        assert torch.cat(found).sort().values.tolist() == list(range(997))
        together = 0
        for size, part in zip(SIZES, found, strict=True):
            together += len(part)
            assert together == round(size * 997)
            assert part.tolist() == sorted(part.tolist())

    @pytest.mark.parametrize("limit", [0, 1 << 20], ids=["read", "copied"])
    def test_chosen_rows_are_those_of_the_store(self, limit, monkeypatch):
        monkeypatch.setattr(parts, "_COPIED_BYTES", limit)
        keys = torch.randn(40, 3)
        ids = torch.tensor([5, 7, 30])
        chosen = parts.ChosenRows(tiny.Keys(keys), ids)
        assert (len(chosen), chosen.dim) == (3, 3)
        assert torch.equal(chosen[torch.tensor([[2, 0]])], keys[torch.tensor([[30, 5]])])
        blocks_found = list(chosen.blocks(2))
        assert [first for first, _ in blocks_found] == [0, 2]
        assert torch.equal(torch.cat([rows for _, rows in blocks_found]), keys[ids])

    def test_the_best_of_two_sets_by_hand(self):
        ours = torch.tensor([[-1.0, -4.0]]), torch.tensor([[True, False]])
        theirs = torch.tensor([[-2.0, -math.inf]]), torch.tensor([[False, True]])
        similarity, is_target = nearest_of(ours, theirs)
        assert similarity.tolist() == [[-1.0, -2.0]]
        assert is_target.tolist() == [[True, False]]

    def test_all_parts_together_are_the_exact_search_of_all(self, tmp_path):
        one = study(tmp_path)
        whole = retrieval.scores(one, "test", search="exact")
        sizes = list(retrieval.scores_by_size(one, "test"))
        assert [size for size, _ in sizes] == list(SIZES)
        torch.testing.assert_close(
            sizes[-1][1].memories[0].similarity, whole.memories[0].similarity
        )
        assert sizes[-1][1].perplexity(0.3, 5.0) == pytest.approx(whole.perplexity(0.3, 5.0))


def test_spread_windows_by_hand():
    rows = rows_of([torch.arange(81).numpy()], window=8, stride=8)
    assert [row.new for row in rows] == [8] * 10
    assert [row.start for row in spread(rows, 16)] == [16, 56]
    assert spread(rows, None) == rows
    assert len(spread(rows, 1)) == 1


def test_spread_rows_by_hand():
    assert retrieval.some_rows(100, None) is None
    assert retrieval.some_rows(100, 100) is None
    assert retrieval.some_rows(128, 32).tolist() == list(range(64, 96))
    assert retrieval.some_rows(128, 64).tolist() == [*range(32, 64), *range(96, 128)]


@pytest.mark.parametrize(("search", "is_shared"), [("auto", 0), ("codes", 0), ("exact", 1)])
def test_an_index_is_of_one_seed(tmp_path, search, is_shared):
    def index(seed):
        one = study(tmp_path, settings=Settings(k=16, seed=seed))
        return KeptIndex(one, one.store(), "l2", search)

    first, second, again = index(0), index(1), index(0)
    for one in (first, second, again):
        assert len(one.open().search(torch.zeros(1, 24), 3)[1][0]) == 3
    assert (first._folder == second._folder) is bool(is_shared)
    assert first._folder == again._folder
    seeds = [built_indexes(one._folder)[0][1].seed for one in (first, second)]
    assert seeds == ([0, 0] if is_shared else [0, 1])


class TestCatalogue:
    def test_every_experiment_is_described_and_runs_a_function_of_its_name(self):
        found = all_experiments()
        assert [e.row for e in found] == sorted(e.row for e in found)
        for experiment in found:
            assert callable(experiment.function())
            assert experiment.hypothesis
            assert experiment.finding

    def test_a_docstring_by_hand(self):
        said = parse(
            "Title.\n\nRow: 3\n\nSection: 4\n\nHypothesis: does\n  it?\n\nFinding: it does.\n\n"
            "More text.", "x.py",
        )  # fmt: skip
        assert said == {
            "title": "Title", "Row": "3", "Section": "4", "Hypothesis": "does it?",
            "Finding": "it does.",
        }  # fmt: skip

    def test_a_missing_field_is_named(self):
        with pytest.raises(KNNLMError, match="lacks Hypothesis, Finding"):
            parse("Title\n\nRow: 3\n\nSection: 4", "x.py")

    def test_an_unknown_name_lists_the_known(self):
        with pytest.raises(KNNLMError, match="base_lm"):
            catalogue.chosen(["no_such"])
