"""The study's framework: what is made once, what is skipped, what a comparison says."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import pytest
import tiny
import torch

from knnlm_hf.errors import CaptureError, CorpusError, KNNLMError, PersistenceError, SettingError
from knnlm_hf.index import built_indexes
from knnlm_hf.study import (
    Settings,
    Study,
    all_experiments,
    catalogue,
    compare,
    parts,
    retrieval,
    run,
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


class TestRun:
    def test_finished_experiments_are_not_run_again(self, tmp_path):
        (first,) = run(study(tmp_path), ["base_lm"])
        (again,) = run(study(tmp_path), ["base_lm"])
        assert again == first
        stored = json.loads((tmp_path / "results" / "base_lm.json").read_text())
        assert stored == first
        assert {"seed", "split", "perplexity"} <= first["rows"][1].keys()
        assert first["versions"]["torch"] == torch.__version__
        assert first["seconds"] > 0

    def test_a_row_costs_what_it_costs_from_nothing(self, tmp_path):
        (first,) = run(study(tmp_path), ["base_lm"])
        for record in (tmp_path / "evaluations").glob("*.json"):
            facts = json.loads(record.read_text())
            record.write_text(json.dumps(facts | {"seconds": 1000.0}))
        (tmp_path / "results" / "base_lm.json").unlink()
        (again,) = run(study(tmp_path), ["base_lm"])
        assert first["seconds"] < 1000
        assert 2000 <= again["seconds"] < 3000  # valid and test, which were there

    @pytest.mark.parametrize("way", ["file", "impossible", "lock"])
    def test_a_folder_that_cannot_be_written_is_one_line(self, tmp_path, way):
        folder = tmp_path / "out"
        if way == "file":
            folder.write_text("in the way")
        if way == "impossible":
            (tmp_path / "out").write_text("in the way")
            folder = folder / "below"
        if way == "lock":
            (folder / ".lock").mkdir(parents=True)
        with pytest.raises(PersistenceError, match=r"out.*: cannot be written: ") as caught:
            run(study(folder), ["base_lm"])
        assert "\n" not in str(caught.value)

    def test_one_that_fails_does_not_stop_the_others(self, tmp_path, monkeypatch):
        from knnlm_hf.study.experiments import base_lm

        def fail(study):
            raise ValueError("no such luck\nand more")

        monkeypatch.setattr(base_lm, "base_lm", fail)
        names = ["base_lm", "sparsification"]
        with pytest.raises(KNNLMError, match=r"1 of 2 experiments failed: base_lm: no such luck$"):
            run(study(tmp_path), names)
        monkeypatch.undo()
        before = (tmp_path / "results" / "sparsification.json").stat().st_mtime_ns
        assert [r["experiment"] for r in run(study(tmp_path), names)] == names
        assert (tmp_path / "results" / "sparsification.json").stat().st_mtime_ns == before

    def test_a_changed_helper_runs_a_row_again(self, tmp_path, monkeypatch):
        code = tmp_path / "code"
        (code / "experiments").mkdir(parents=True)
        (code / "verdicts.py").write_text("NOTABLE = 0.995")
        monkeypatch.setattr(catalogue, "FOLDER", code / "experiments")
        (first,) = run(study(tmp_path / "out"), ["base_lm"])
        (same,) = run(study(tmp_path / "out"), ["base_lm"])
        (code / "verdicts.py").write_text("NOTABLE = 0.99")
        (changed,) = run(study(tmp_path / "out"), ["base_lm"])
        assert same == first
        assert changed["inputs"] != first["inputs"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"settings": Settings(k=15)},
            {"model": tiny.gpt2(seed=1)},
            {"train": tiny.corpus(19, 1)},
        ],
        ids=["settings", "model", "text"],
    )
    def test_changed_inputs_run_again(self, tmp_path, changes):
        (first,) = run(study(tmp_path), ["base_lm"])
        (again,) = run(study(tmp_path, **changes), ["base_lm"])
        assert again["at"] > first["at"] or again["inputs"] != first["inputs"]
        assert (again["of"] == first["of"]) is ("settings" in changes)
        facts = json.loads((tmp_path / "results" / "study.json").read_text())
        assert facts["of"] == again["of"]

    def test_a_killed_run_resumes(self, tmp_path):
        code = (
            "import os, signal, sys; sys.path.insert(0, sys.argv[2])\n"
            "import test_study\n"
            "from knnlm_hf.study import retrieval\n"
            "from knnlm_hf.study import study as module\n"
            "one = test_study.study(sys.argv[1])\n"
            "one.store('att')\n"
            "module.save_evaluation = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            "retrieval.scores(one, 'test')\n"
        )
        killed = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), os.path.dirname(__file__)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert killed.returncode == -signal.SIGKILL
        (store,) = (path for path in (tmp_path / "stores").iterdir() if path.is_dir())
        before = store.stat().st_mtime_ns
        resumed = retrieval.scores(study(tmp_path), "test")
        assert store.stat().st_mtime_ns == before
        fresh = retrieval.scores(study(tmp_path / "fresh"), "test")
        torch.testing.assert_close(
            resumed.memories[0].similarity, fresh.memories[0].similarity, rtol=0, atol=0
        )

    def test_a_finished_store_is_used_as_it_is(self, tmp_path):
        built = study(tmp_path / "a").store("att").path
        linked = study(tmp_path / "b", stores=[built]).store("att")
        assert linked.path != built
        for file in built.glob("*.safetensors"):
            assert (linked.path / file.name).samefile(file)

    def test_a_finished_store_may_have_been_built_in_other_batches(self, tmp_path):
        given = study(tmp_path / "a", settings=Settings(batch_size=3)).store("att")
        linked = study(tmp_path / "b", stores=[given.path]).store("att")
        assert linked.digest == given.digest

    def test_layers_may_be_chosen(self, tmp_path):
        assert study(tmp_path).layers == ("att", "ffn")
        one = study(tmp_path, settings=Settings(k=16, layers=("ffn",)))
        assert one.layers == ("ffn",)
        assert one.evaluation("valid").states.keys() == {"ffn"}
        with pytest.raises(CaptureError, match="nose"):
            _ = study(tmp_path, settings=Settings(layers=("nose",))).layers

    def test_a_store_of_another_text_is_refused_and_not_kept(self, tmp_path):
        other = study(tmp_path / "a", train=tiny.corpus(19, 1)).store("att")
        with pytest.raises(KNNLMError):
            study(tmp_path / "b", stores=[other.path]).store("att")
        assert len(study(tmp_path / "b").store("att")) > len(other)

    @pytest.mark.parametrize(("tokens", "is_enough"), [(320, False), (321, True)])
    def test_a_handful_of_tokens_is_no_training_text(self, tmp_path, tokens, is_enough):
        one = study(tmp_path, train=[[1, 2, 3] * 107][:1], settings=Settings(train_tokens=tokens))
        if is_enough:
            smallest = KeptIndex(one, one.store(), "l2", "codes", 0)
            assert len(smallest.open().search(torch.zeros(1, 24), 3)[1][0]) == 3
            return
        with pytest.raises(CorpusError, match="320 tokens, 319 of them to predict, expected at le"):
            run(one, ["base_lm"])

    def test_settings_are_checked(self):
        with pytest.raises(SettingError, match="eval_tokens is 0"):
            Settings(eval_tokens=0)
        with pytest.raises(SettingError, match="layers is \\('att', 'att'\\)"):
            Settings(layers=("att", "att"))
        with pytest.raises(SettingError, match="layers is \\(\\)"):
            Settings(layers=())
        for name, value in {"seed": -1, "k": 1 << 40, "exact_comparisons": math.inf}.items():
            with pytest.raises(SettingError, match=f"{name} is"):
                Settings(**{name: value})
        with pytest.raises(SettingError, match="dtype is 'float8'"):
            Settings(head_dtype="float8")
        with pytest.raises(SettingError, match="exact_comparisons"):
            Settings(exact_comparisons=0)
