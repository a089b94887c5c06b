"""`knnlm train-head`, and heads and several memories wherever a datastore is taken."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import faults
import pytest
import tiny
import torch
from fake_hub import FakeHub
from typer.testing import CliRunner

from knnlm_hf import Datastore, KNNLMForCausalLM, MLPMemory, MultiEmbeddingHead
from knnlm_hf.cli import app
from knnlm_hf.memory import Head
from knnlm_hf.memory.entries import Entries

FAST = ("--epochs", "3", "--lr", "0.03", "--batch-size", "64")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, a store of its states, and a head trained on it."""
    home = tmp_path_factory.mktemp("heads")
    tiny.gpt2().save_pretrained(home / "model")
    tiny.tokenizer().save_pretrained(home / "model")
    (home / "train.txt").write_text("\n".join(tiny.text(tiny.corpus(20))))
    (home / "valid.txt").write_text("\n".join(tiny.text(tiny.corpus(3, seed=3))))
    run("build", home / "model", home / "train.txt", home / "store", "--lines")
    run("train-head", home / "store", home / "head", "--n", 2, *FAST)
    return home


def run(*args: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def run_json(*args: Any) -> Any:
    return json.loads(run(*args, "--json").stdout)


def refused(says: str, *args: Any) -> None:
    """Exit code 2 and one line that says it."""
    lines = run(*args, code=2).stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert says in lines[-1]
    assert len(lines) == 1 or not any(line.startswith("error") for line in lines[:-1])


def test_train_head_is_train_on(made: Path) -> None:
    head = Head.from_pretrained(made / "head")
    settings = {"epochs": 3, "lr": 0.03, "batch_size": 64, "progress": False}
    store = Datastore.open(made / "store")
    assert torch.equal(head.weight, MultiEmbeddingHead.train_on(store, n=2, **settings).weight)
    assert not (made / "head.checkpoint").exists()
    facts = run_json("info", made / "head")
    assert (facts["kind"], facts["n"], facts["layer"]) == ("multi_embedding", 2, "att")
    assert facts["parameters"] == 2 * tiny.VOCAB * 24
    assert facts["held_out_loss"] == head.trained.held_out_loss
    assert facts["model"] == str(made / "model")
    assert "held_out_perplexity" in run("info", made / "head").stdout
    assert run_json("verify", made / "head")["verified"] is True


def test_start_and_negatives(made: Path, tmp_path: Path) -> None:
    options = ("--n", 1, "--epochs", 1, "--lr", 1e-12, "--negatives", 7)
    run("train-head", made / "store", tmp_path / "h", *options, "--start", made / "model")
    head = MultiEmbeddingHead.from_pretrained(tmp_path / "h")
    rows = tiny.gpt2().get_output_embeddings().weight
    torch.testing.assert_close(head.weight / head.weight.std(), rows / rows.std())
    assert head.trained is not None
    assert head.trained.recipe.negatives == 7
    refused("model ", "train-head", made / "store", tmp_path / "i", "--start", made / "nothing")


def test_every_kind_and_its_settings(made: Path, tmp_path: Path) -> None:
    kinds = {
        "mixture_of_softmaxes": ("--n", 2),
        "mlp": ("--n", 1, "--set", "width=8", "--set", "dropout=0.1", "--dtype", "bfloat16"),
        "centroids": ("--n", 8, "--set", "weights=softmax"),
    }
    for kind, options in kinds.items():
        facts = run_json(
            "train-head", made / "store", tmp_path / kind, "--kind", kind, *options, "--epochs", 1
        )
        assert facts["kind"] == kind
    mlp = Head.from_pretrained(tmp_path / "mlp")
    assert (mlp.layers, mlp.width, mlp.dropout) == (1, 8, 0.1)
    assert (mlp.trained.recipe.dtype, mlp.trained.recipe.epochs) == ("bfloat16", 1)
    ragged = json.dumps([1 + i % 3 for i in range(tiny.VOCAB)])
    rows = ("--set", f"rows_per_token={ragged}", "--distil", "--alpha", 0.25, "--k", 4)
    run("train-head", made / "store", tmp_path / "rows", *rows, "--epochs", 1)
    head = Head.from_pretrained(tmp_path / "rows")
    assert len(head.weight) == sum(json.loads(ragged))
    assert head.trained.teacher["alpha"] == 0.25


def test_a_head_wherever_a_store_is_taken(made: Path, tmp_path: Path) -> None:
    args = (made / "model", made / "valid.txt", made / "head")
    best = run_json("tune", *args, "--lines", "--out", tmp_path / "knn")
    assert best["perplexity"] < best["base_perplexity"]
    assert best["k"] is None
    report = run_json("eval", *args, "--lines", "--lmbda", best["lmbda"])
    assert report["perplexity"] == pytest.approx(best["perplexity"], rel=1e-5)
    saved = run_json("eval", tmp_path / "knn", made / "valid.txt", "--lines")
    assert saved["perplexity"] == pytest.approx(best["perplexity"], rel=1e-5)
    text = run_json("generate", made / "model", "w3 w9", made / "head", "--max-new-tokens", 4)
    knn = KNNLMForCausalLM.from_pretrained(tmp_path / "knn", lmbda=0.25)
    ids = tiny.tokenizer()("w3 w9", return_tensors="pt")
    expected = knn.generate(**ids, max_new_tokens=4, do_sample=False)[0, 2:]
    assert text["text"] == tiny.tokenizer().decode(expected)
    refused("no neighbours to show", "generate", *args[:1], "w3", made / "head", "--explain")


def test_several_memories(made: Path, tmp_path: Path) -> None:
    args = (
        made / "model",
        made / "valid.txt",
        made / "store",
        "--memory",
        made / "head",
        "--lines",
    )
    best = run_json("tune", *args, "--k", 16, "--out", tmp_path / "knn")
    assert len(best["lmbda"]) == 2
    assert best["k"][1] is None
    given = [part for lmbda in best["lmbda"] for part in ("--lmbda", lmbda)]
    settings = ("--k", best["k"][0], "--temperature", best["temperature"][0])
    report = run_json("eval", *args, *given, *settings)
    assert report["perplexity"] == pytest.approx(best["perplexity"], rel=1e-4)
    assert len(report["memory_perplexity"]) == 2
    again = run_json("eval", tmp_path / "knn", made / "valid.txt", "--lines")
    assert again["perplexity"] == pytest.approx(report["perplexity"], rel=1e-5)
    table = run("eval", tmp_path / "knn", made / "valid.txt", "--lines").stdout
    for row in ("KNNMemory alone", "MultiEmbeddingHead alone", "mixture (lambda"):
        assert row in table
    alone = run_json("eval", tmp_path / "knn", made / "valid.txt", "--lines", "--k", 3)
    assert alone["perplexity"] != again["perplexity"]
    found = run_json("eval", *args, "--k", 1, "--lmbda", 0.1, "--lmbda", 0.2)["memory_perplexity"]
    assert found[0] == "inf"  # valid JSON, inside a list too
    refused("2 memories", "eval", *args, *("--lmbda", 0.1) * 3)


def test_push_a_head(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, tmp_path / "hub")
    assert run_json("push", made / "head", "me/head", "--private")["to"] == "commit"
    assert (hub.created["repo_type"], hub.created["private"]) == ("model", True)
    assert run_json("info", "me/head")["kind"] == "multi_embedding"
    args = (made / "model", made / "valid.txt", "--lines")
    local, remote = (run_json("eval", *args[:2], x, args[2]) for x in (made / "head", "me/head"))
    assert local["perplexity"] == remote["perplexity"]
    refused("neither a datastore", "info", "me/nothing")


def with_nan(store: Path) -> None:
    shard = next(store.glob("shard-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[4096:4098] = b"\xff\xff"  # the first number of the first key, in float16
    shard.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_bad_input(made: Path, tmp_path: Path) -> None:
    train = ("train-head", made / "store", tmp_path / "new")
    refused("n is 0, expected a whole number", *train, "--n", 0)
    refused("n is -3", *train, "--n", -3)
    refused("expected one of multi_embedding", *train, "--kind", "svm")
    refused("lr is -1", *train, "--lr", -1)
    refused("epochs is 0", *train, "--epochs", 0)
    refused("one of float32, bfloat16", *train, "--dtype", "int8")
    refused("name=value, with one of n, rows_per_token", *train, "--set", "width=3")
    refused("name=value", *train, "--set", "temperature")
    refused("temperature is 'hot'", *train, "--set", "temperature=hot")
    refused("--alpha, --k: only with --distil", *train, "--alpha", 0.5, "--k", 3)
    refused("token", *train, "--set", f"rows_per_token={[0] * 60 + [1]}", *FAST)
    refused("no such folder", "train-head", tmp_path / "nowhere", tmp_path / "new")
    refused("manifest", "train-head", made / "head", tmp_path / "new")
    refused("holds", "train-head", made / "store", made / "head")
    refused("a file is in the way", "train-head", made / "store", made / "train.txt")
    shutil.copytree(made / "store", tmp_path / "nan")
    with_nan(tmp_path / "nan")
    refused("a key is not finite", "train-head", tmp_path / "nan", tmp_path / "new", *FAST)
    next((tmp_path / "nan").glob("shard-*")).unlink()
    refused("missing", "train-head", tmp_path / "nan", tmp_path / "new")
    (tmp_path / "file").write_text("")
    refused("checkpoint cannot be written", *train, "--checkpoint", tmp_path / "file" / "c")
    assert {file.name for file in tmp_path.iterdir()} == {"nan", "file"}


def test_heads_that_do_not_fit(made: Path, tmp_path: Path) -> None:
    corpus = made / "valid.txt"
    for name, changes in {"narrow": {"n_embd": 16}, "few": {"vocab_size": 40}, "other": {}}.items():
        tiny.gpt2(seed=1, **changes).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    refused("24-d states", "eval", tmp_path / "narrow", corpus, made / "head")
    refused("61 tokens", "eval", tmp_path / "few", corpus, made / "head")
    refused("trained on states of", "tune", tmp_path / "other", corpus, made / "head")
    tiny.gpt2().save_pretrained(tmp_path / "words")
    tiny.tokenizer(reverse=True).save_pretrained(tmp_path / "words")
    refused("another tokenizer", "eval", tmp_path / "words", corpus, made / "head", "--lines")
    shutil.copytree(made / "head", tmp_path / "cut")
    cut(tmp_path / "cut" / "model.safetensors")
    refused("cut short", "eval", made / "model", corpus, tmp_path / "cut")
    refused("cut short", "info", tmp_path / "cut")
    head = Head.from_pretrained(made / "head")
    with torch.no_grad():
        head.weight[3, 3] = torch.nan
    head.save_pretrained(tmp_path / "nan")
    refused("not finite", "verify", tmp_path / "nan")


def test_options_that_would_do_nothing_are_refused(made: Path, tmp_path: Path) -> None:
    args = ("eval", made / "model", made / "valid.txt", made / "head")
    refused("--k, --metric: only for a datastore", *args, "--k", 3, "--metric", "ip")
    refused("--temperature: only for a datastore", *args, "--temperature", 3)
    run("tune", *args[1:], "--lines", "--out", tmp_path / "knn")
    saved = ("eval", tmp_path / "knn", made / "valid.txt")
    refused("--k: only for a datastore", *saved, "--k", 3)
    refused("has its own metric, rescore", *saved, "--metric", "ip", "--rescore")
    refused("name a datastore or a head too", "eval", made / "model", made / "valid.txt")


def test_resume(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Entries.epoch

    def killed(self: Entries, number: int, batch_size: int) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return real(self, number, batch_size)

    args = ("train-head", made / "store", tmp_path / "head", "--n", 2, *FAST)
    monkeypatch.setattr(Entries, "epoch", killed)
    stopped = run(*args, code=130)
    assert stopped.stderr.strip() == ("interrupted: run the same command again to go on from here")
    assert not (tmp_path / "head").exists()
    assert (tmp_path / "head.checkpoint" / "state.json").is_file()
    shutil.copytree(tmp_path / "head.checkpoint", tmp_path / "kept")
    monkeypatch.setattr(Entries, "epoch", real)
    refused("recipe", *args, "--seed", 5)
    cut(next((tmp_path / "head.checkpoint").glob("*.safetensors")))
    refused("damaged", *args)
    shutil.rmtree(tmp_path / "head.checkpoint")
    shutil.copytree(tmp_path / "kept", tmp_path / "head.checkpoint")
    run(*args)
    assert {file.name for file in tmp_path.iterdir()} == {"head", "kept"}
    whole = Head.from_pretrained(made / "head")
    assert torch.equal(Head.from_pretrained(tmp_path / "head").weight, whole.weight)
    # A damaged checkpoint elsewhere, dropped.
    cut(next((tmp_path / "kept").glob("*.safetensors")))
    other = ("train-head", made / "store", tmp_path / "other", *args[3:])
    run(*other, "--checkpoint", tmp_path / "kept", "--no-resume")
    assert torch.equal(Head.from_pretrained(tmp_path / "other").weight, whole.weight)
    assert not (tmp_path / "kept").exists()


def test_a_disk_that_fills_up_loses_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever operation: the same command goes on, and trains no finished epoch again."""
    real, trained = Entries.epoch, []

    def counted(self: Entries, number: int, batch_size: int) -> Any:
        trained.append(number)
        return real(self, number, batch_size)

    monkeypatch.setattr(Entries, "epoch", counted)
    args = ("train-head", made / "store", tmp_path / "head", "--n", 1, "--epochs", 2)
    count = faults.operations(lambda: run(*args))
    whole = (tmp_path / "head" / "model.safetensors").read_bytes()
    seen = set()
    for at in range(1, count + 1):
        shutil.rmtree(tmp_path / "head")
        with faults.Faults("full", at).armed():
            result = CliRunner().invoke(app, [str(arg) for arg in args])
        if result.exit_code:
            assert result.exit_code == 2
            assert "No space left" in result.stderr.splitlines()[-1]
            assert not (tmp_path / "head").exists()
            state = tmp_path / "head.checkpoint" / "state.json"
            epochs = json.loads(state.read_text())["progress"]["epoch"] if state.is_file() else 0
            trained.clear()
            run(*args)
            assert trained == list(range(epochs, 2))
            seen.add(epochs)
        assert (tmp_path / "head" / "model.safetensors").read_bytes() == whole
        assert [file.name for file in tmp_path.iterdir()] == ["head"]
    assert seen == {0, 1, 2}


def test_what_an_interrupted_save_left_is_not_in_the_way(made: Path, tmp_path: Path) -> None:
    (tmp_path / "head" / ".knnlm_hf-unfinished-x").mkdir(parents=True)
    run("train-head", made / "store", tmp_path / "head", "--n", 2, *FAST)
    fill = tmp_path / "other" / ".knnlm_hf-new"
    shutil.copytree(tmp_path / "head", fill)
    refused("holds", "train-head", made / "store", tmp_path / "other", "--n", 2, *FAST)
    assert Head.from_pretrained(tmp_path / "other").trained is not None


def test_ctrl_c_and_again(made: Path, tmp_path: Path) -> None:
    args = [str(made / "store"), str(tmp_path / "head"), "--n", "1", "--lr", "0.03"]
    args += ["--epochs", "100000", "--patience", "100000"]
    command = [sys.executable, "-m", "knnlm_hf.cli", "train-head", *args]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, env={**os.environ},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job's may ignore it
    )  # fmt: skip
    state = tmp_path / "head.checkpoint" / "state.json"
    for _ in range(600):
        if state.is_file() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert b"run the same command again" in stderr
    assert b"Traceback" not in stderr
    assert json.loads(state.read_text())["progress"]["epoch"] >= 1
    assert not (tmp_path / "head").exists()


def test_kinds_named_in_the_help_are_all() -> None:
    text = " ".join(run("train-head", "--help").stdout.replace("│", " ").split())
    for cls in (MultiEmbeddingHead, MLPMemory, *Head.__subclasses__()):
        if cls.__module__.startswith("knnlm_hf."):
            assert cls.kind in text
