"""Running a study: what is finished stays, what was killed resumes, what is wrong is one line."""

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
from test_study import study

from knnlm_hf.errors import CaptureError, CorpusError, KNNLMError, PersistenceError, SettingError
from knnlm_hf.study import Settings, catalogue, retrieval, run
from knnlm_hf.study.indexes import KeptIndex


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
