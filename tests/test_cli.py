"""The command line, end to end on a tiny model: results, exit codes, one-line errors."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny
from typer.testing import CliRunner

from knnlm_hf import Datastore, __version__
from knnlm_hf.cli import app

runner = CliRunner()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, texts and a store with an index."""
    folder = tmp_path_factory.mktemp("cli")
    tiny.gpt2().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "train.txt").write_text("\n".join(tiny.text(tiny.corpus(20))))
    (folder / "valid.txt").write_text("\n".join(tiny.text(tiny.corpus(seed=3))))
    with (folder / "valid.jsonl").open("w") as file:
        for line in tiny.text(tiny.corpus(seed=3)):
            file.write(json.dumps({"text": line}) + "\n")
    run("build", folder / "model", folder / "train.txt", folder / "store", "--lines")
    return folder


def run(*args, code=0):
    result = runner.invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def run_json(*args):
    return json.loads(run(*args, "--json").stdout)


def test_help_and_version():
    assert __version__ in run("--version").stdout
    text = run("--help").stdout
    for command in ("build", "index", "tune", "eval", "generate", "info", "verify", "push", "demo"):
        assert command in text
        assert "--json" in run(command, "--help").stdout


def test_build_and_info(home):
    lines = [line for line in (home / "train.txt").read_text().split("\n") if line.strip()]
    facts = run_json("info", home / "store")
    assert facts["documents"] == len(lines)
    assert facts["entries"] == sum(len(line.split()) - 1 for line in lines)
    assert facts["layer"] == "att"
    assert facts["dim"] == 24
    assert facts["indexes"] == ["exact (l2)"]
    assert "entries" in run("info", home / "store").stdout


def test_build_again_returns_the_same_store(home):
    args = ("build", home / "model", home / "train.txt", home / "store", "--lines")
    assert run_json(*args) == run_json("info", home / "store")
    run(*args, "--layer", "ffn", code=2)


def test_index(home):
    facts = run_json("index", home / "store", "IVF4,Flat", "--metric", "ip", "--nprobe", "4")
    assert facts["metric"] == "ip"
    assert facts["self_check"]["recall"] == pytest.approx(1.0)
    wrong = run("index", home / "store", "NoSuchIndex", code=2)
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1


def test_tune_save_and_eval(home, tmp_path):
    out = tmp_path / "knn"
    args = (home / "model", home / "valid.txt", home / "store")
    best = run_json("tune", *args, "--lines", "--k", "32", "--out", out)
    assert best["perplexity"] < best["base_perplexity"]
    settings = ("--lmbda", best["lmbda"], "--temperature", best["temperature"], "--k", best["k"])
    report = run_json("eval", *args, "--lines", *settings)
    assert report["perplexity"] == pytest.approx(best["perplexity"], rel=1e-4)
    assert report["base_perplexity"] == pytest.approx(best["base_perplexity"], rel=1e-6)
    assert report["word_perplexity"] > 0
    saved = run_json("eval", out, home / "valid.txt", "--lines")
    assert saved["perplexity"] == pytest.approx(report["perplexity"], rel=1e-4)
    table = run("eval", out, home / "valid.txt", "--lines").stdout
    for row in ("model alone", "memory alone", "mixture"):
        assert row in table


def test_infinity_is_valid_json(home):
    args = (home / "model", home / "valid.txt", home / "store", "--lines", "--k", "1")
    assert run_json("eval", *args)["memory_perplexity"] == "inf"


def test_data_files_are_corpora(home):
    by_lines = run_json("eval", home / "model", home / "valid.txt", home / "store", "--lines")
    by_rows = run_json("eval", home / "model", home / "valid.jsonl", home / "store")
    assert by_rows["perplexity"] == pytest.approx(by_lines["perplexity"], rel=1e-9)


def test_generate_and_explain(home):
    args = (home / "model", "w5 w6 w7", home / "store", "--max-new-tokens", "4")
    facts = run_json("generate", *args, "--explain")
    assert len(facts["explanation"]) == 4
    position = facts["explanation"][0]
    assert {"token", "predicted", "lm_log_prob", "memory_log_prob", "neighbours"} <= set(position)
    assert position["neighbours"][0]["context"]
    assert facts["text"]
    shown = run("generate", *args, "--explain").stdout
    assert shown.startswith("w5 w6 w7")
    assert "document" in shown


def test_the_text_itself_beside_a_datastore_or_alone(home, tmp_path):
    args = (home / "valid.txt", home / "store", "--lines", "--cache", "50")
    facts = run_json("tune", home / "model", *args, "--k", "9", "--out", tmp_path / "tuned")
    assert len(facts["lmbda"]) == 2
    assert facts["k"] == [9, 9]
    report = run_json("eval", tmp_path / "tuned", home / "valid.txt", "--lines")
    assert report["perplexity"] == pytest.approx(facts["perplexity"], rel=1e-4)
    alone = (home / "model", home / "valid.txt", "--lines", "--cache", "50")
    assert "mixture" in run("eval", *alone, "--temperature", "3").stdout
    refused = run("eval", *alone, "--rescore", code=2).stderr
    assert "--rescore: only for a datastore" in refused
    saved = run("eval", tmp_path / "tuned", home / "valid.txt", "--cache", "9", code=2).stderr
    assert "to put --cache beside them" in saved
    assert "--cache" in run("eval", *alone[:-1], "0", code=2).stderr
    prompt = (home / "model", "w5 w6 w7 w5 w6", home / "store", "--cache", "50")
    shares = ("--lmbda", "0.01", "--lmbda", "0.98", "--max-new-tokens", "4")
    shown = run("generate", *prompt, "--explain", *shares).stdout
    assert "this text" in shown


def test_verify(home):
    assert run_json("verify", home / "store")["verified"] is True


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("info", "{home}/nothing"), "no such folder"),
        (("info", "{home}/model"), "manifest"),
        (("build", "{home}/nothing", "{home}/train.txt", "{home}/new"), "nothing"),
        (("build", "{home}/model", "{home}/nothing.txt", "{home}/new"), "no such file"),
        (("build", "{home}/model", "{home}/train.txt", "{home}/new", "--layer", "mlp9"), "att"),
        (("build", "{home}/model", "{home}/train.txt", "{home}/new", "--dtype", "int8"), "float16"),
        (("build", "{home}/model", "{home}/train.txt", "{home}/new", "--window", "0"), "window"),
        (("build", "{home}/model", "{home}/train.txt", "{home}/train.txt"), "train.txt"),
        (("eval", "{home}/model", "{home}/valid.txt"), "datastore"),
        (("eval", "{home}/model", "{home}/valid.txt", "{home}/store", "--lmbda", "1"), "lmbda"),
        (("eval", "{home}/model", "{home}/valid.txt", "{home}/store", "--k", "0"), "k is 0"),
        (
            ("eval", "{home}/model", "{home}/valid.txt", "{home}/store", "--temperature", "0"),
            "temp",
        ),
        (("eval", "{home}/model", "{home}/valid.txt", "{home}/store", "--metric", "cos"), "l2, ip"),
        (("eval", "{home}/model", "{home}/valid.txt", "{home}/store", "--index", "PQ3"), "build"),
        (("generate", "{home}/model", "", "{home}/store"), "empty"),
        (("push", "{home}", "me/repo"), "neither"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(home, args, says):
    result = run(*(arg.format(home=home) for arg in args), code=2)
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert says in error
    assert not (home / "new").exists() or not any((home / "new").iterdir())


def test_a_store_of_another_model_is_refused(home, tmp_path):
    tiny.gpt2(seed=1).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    result = run("eval", tmp_path / "other", home / "valid.txt", home / "store", code=2)
    assert "another" in result.stderr or "not the model" in result.stderr


def test_ctrl_c_leaves_a_resumable_store(home, tmp_path):
    (tmp_path / "long.txt").write_text("\n".join(tiny.text(tiny.corpus(300))))
    args = [str(home / "model"), str(tmp_path / "long.txt"), str(tmp_path / "store"), "--lines"]
    args += ["--shard-size", "500", "--index", "none"]
    command = [sys.executable, "-m", "knnlm_hf.cli", "build", *args]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ})
    for _ in range(600):
        if list((tmp_path / "store").glob("shard-*.safetensors")) or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    if process.returncode != 0:  # a fast machine may have been done
        assert process.returncode == 130
        assert b"run the same command again" in stderr
        assert b"Traceback" not in stderr
        assert "unfinished" in run("info", tmp_path / "store", code=2).stderr
    run("build", *args)
    Datastore.open(tmp_path / "store").verify()


def test_push_names_the_repository(home, monkeypatch):
    calls = []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, repo_type, **options):
            calls.append((repo_id, repo_type))
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path, repo_id, repo_type, **options):
            calls.append((folder_path, repo_id, repo_type))
            return "https://hub/datasets/me/store"

    monkeypatch.setattr("knnlm_hf.persistence.HfApi", Api)
    facts = run_json("push", home / "store", "me/store")
    assert facts["to"] == "https://hub/datasets/me/store"
    assert calls == [("me/store", "dataset"), (str(home / "store"), "me/store", "dataset")]
