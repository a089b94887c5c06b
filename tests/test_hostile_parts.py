"""What a stranger may have written, continued: soft targets, saved models, words to commands.

As in test_hostile.py: only `KNNLMError` comes out, in one line, or nothing that harms.
"""

import json
import shutil
import struct

import pytest
import stores
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_hostile import JSON, limited, places, quick, refused_or_fine, replaced
from typer.testing import CliRunner

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory, MultiEmbeddingHead, SoftTargets
from knnlm_hf.cli import app
from knnlm_hf.errors import DatastoreError
from knnlm_hf.memory.distillation import distil

MODEL = tiny.gpt2()
FAST = {"epochs": 1, "batch_size": 16, "progress": False}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A store with soft targets, and a model with a store and a head in its folder."""
    folder = tmp_path_factory.mktemp("parts")
    store = stores.random(folder / "s", lengths=(6,) * 8, shard_size=20)
    SoftTargets.build(store, KNNMemory(store, k=4), tokens=3, shard_size=20, progress=False)
    built = Datastore.build(MODEL, tiny.corpus(2), folder / "built", progress=False)
    memories = [KNNMemory(built, k=2, index="exact"), MultiEmbeddingHead(24, tiny.VOCAB, n=1)]
    knn = KNNLMForCausalLM(MODEL, memories, lmbda=[0.1, 0.2])
    knn.save_pretrained(folder / "knn", save_memory=True)
    tiny.tokenizer().save_pretrained(folder / "knn")
    return folder


def read_targets(folder):
    """All that a training does with soft targets from somewhere."""
    targets = SoftTargets.open(folder)
    tokens, probs = targets[torch.arange(3)]
    assert tokens.shape == probs.shape == (3, targets.tokens)
    assert bool(probs.isfinite().all())
    json.dumps(targets.about())
    store = Datastore.open(folder.parent / "s")
    distil(MultiEmbeddingHead(16, 50, n=1), store, targets, **FAST)
    targets.verify()


def read_knn(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.chdir(folder)
        knn = KNNLMForCausalLM.from_pretrained(folder)
        assert bool(knn(torch.tensor([[1, 2]])).logits.logsumexp(-1).abs().max() < 1e-3)


READERS = {
    "s.targets/manifest.json": read_targets,
    "knn/config.json": read_knn,
    "knn/generation_config.json": read_knn,
}
quicker = settings(quick, max_examples=60)


@pytest.mark.parametrize("record", READERS)
@quicker
@given(data=st.data())
def test_any_json_in_place_of_any_part(home, record, data):
    file, read = home / record, READERS[record]
    before = file.read_bytes()
    content = json.loads(before)
    place = data.draw(st.sampled_from(list(places(content))))
    try:
        file.write_text(json.dumps(replaced(content, place, data.draw(JSON))))
        refused_or_fine(read, file.parent)
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("record", READERS)
@quick
@given(junk=st.binary(max_size=200))
def test_any_bytes_in_place_of_a_record(home, record, junk):
    file, read = home / record, READERS[record]
    before = file.read_bytes()
    try:
        file.write_bytes(junk)
        assert refused_or_fine(read, file.parent)
    finally:
        file.write_bytes(before)


@quick
@given(data=st.data())
def test_any_shard_of_soft_targets(home, data):
    """Any header, any numbers: tokens that the head does not have, probabilities that are none."""
    file = home / "s.targets" / "targets-00001.safetensors"
    before = file.read_bytes()
    length = struct.unpack("<Q", before[:8])[0]
    if data.draw(st.booleans()):
        header = json.loads(before[8 : 8 + length])
        changed = data.draw(st.sampled_from(list(places(header))))
        text = json.dumps(replaced(header, changed, data.draw(JSON))).encode()[:length]
        claimed = data.draw(st.sampled_from([length, 0, 1, 2**40, 2**64 - 1]))
        forged = struct.pack("<Q", claimed) + text.ljust(length) + before[8 + length :]
    else:
        at = data.draw(st.integers(8 + length, len(before) - 1))
        new = data.draw(st.binary(min_size=1, max_size=8))
        forged = (before[:at] + new + before[at + len(new) :])[: len(before)]
    try:
        file.write_bytes(forged)
        refused_or_fine(read_targets, file.parent)
    finally:
        file.write_bytes(before)


def test_settings_of_a_saved_model_that_claim_too_much(home, tmp_path):
    """A k of 10^15 is refused, in a process that could not hold its results."""
    shutil.copytree(home / "knn", tmp_path / "knn")
    config = json.loads((tmp_path / "knn" / "config.json").read_text())
    config["memories"][0]["settings"]["k"] = 10**15
    (tmp_path / "knn" / "config.json").write_text(json.dumps(config))
    printed = limited(
        """
import sys
from knnlm_hf import KNNLMForCausalLM, KNNLMError
try:
    KNNLMForCausalLM.from_pretrained(sys.argv[1])
except KNNLMError as error:
    print(error)
""",
        tmp_path / "knn",
    )
    assert "k is 1000000000000000, expected 1,048,576 at most" in printed


@pytest.mark.parametrize("token", [50, 65535])
def test_soft_targets_of_tokens_that_there_are_not(home, tmp_path, token):
    """By hand: 16 bits of the first token are changed; a negative number would pass as an index."""
    shutil.copytree(home / "s", tmp_path / "s")
    shutil.copytree(home / "s.targets", tmp_path / "s.targets")
    file = tmp_path / "s.targets" / "targets-00000.safetensors"
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    at = 8 + length + json.loads(whole[8 : 8 + length])["tokens"]["data_offsets"][0]
    file.write_bytes(whole[:at] + struct.pack("<H", token) + whole[at + 2 :])
    targets = SoftTargets.open(tmp_path / "s.targets")
    with pytest.raises(DatastoreError, match=r"tokens above 49 or .*build the soft targets again"):
        targets[torch.tensor([0])]
    targets[torch.tensor([1])]


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """A folder with all that the commands below name."""
    folder = tmp_path_factory.mktemp("shell")
    tiny.gpt2().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "t.txt").write_text("\n".join(tiny.text(tiny.corpus(2))))
    (folder / "binary").write_bytes(b"\xff\xfe\x00\x80" * 9)
    Datastore.build(
        MODEL, tiny.corpus(2), folder / "store", tokenizer=tiny.tokenizer(), progress=False
    )
    return folder


COMMANDS = {
    "train-head": ["train-head", "store", "out", "--epochs", "1", "--n", "1"],
    "explain": ["explain", "model", "t.txt", "store", "--tokens", "4"],
    "remove": ["remove", "store"],
    "append": ["append", "store", "model", "t.txt"],
    "study": ["study", "run", "model", "t.txt", "t.txt", "t.txt", "--out", "o", "--only", "none"],
}
VALUES = [
    "-1", "0", "nan", "1e999", "", "x", "../x", "\x00", "é\n", "[red]", "9" * 20, str(10**15), "--",
    "binary", "store", "/dev/null", "rows_per_token={}", "n=null", "pairs=-1", "clusters=1e30",
]  # fmt: skip
OPTIONS = [
    "--n", "--set", "--epochs", "--lr", "--batch-size", "--patience", "--seed", "--kind", "--dtype",
    "--negatives", "--start", "--alpha", "--k", "--temperature", "--device", "--distil", "--memory",
    "--tokens", "--top", "--lmbda", "--index", "--window", "--stride", "--only", "--head-tokens",
    "--model-dtype", "--lines", "--checkpoint", "--out", "--store", "--split", "--tokenizer",
]  # fmt: skip


def command(shell, args):
    """An exit code, and one line that says what is wrong; never a traceback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.chdir(shell)
        result = CliRunner().invoke(app, args)
        for made in ("out", "out.checkpoint", "o", "page.html"):
            shutil.rmtree(made, ignore_errors=True)
    assert result.exception is None or isinstance(result.exception, SystemExit), (args, result)
    assert result.exit_code in (0, 1, 2), args
    lines = result.stderr.strip().splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    assert said in ([], lines[-1:]), (args, lines)
    assert said or result.exit_code != 2 or "Usage" in result.stderr, (args, lines)
    return said


@pytest.mark.parametrize("name", COMMANDS)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_of_any_option(shell, name, data):
    args = list(COMMANDS[name])
    value = data.draw(st.sampled_from(VALUES) | st.text(max_size=4))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(1, len(args) - 1))
        args[at] = value if args[at] != "run" else "run"
    else:
        args += [data.draw(st.sampled_from(OPTIONS)), value]
    command(shell, args)


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("train-head", ["--n", "9" * 20], "n is 99999999999999999999, expected a whole number"),
        ("train-head", ["--n", str(10**15)], "no MultiEmbeddingHead can be made with"),
        ("train-head", ["--set", "rows_per_token={}"], "no MultiEmbeddingHead can be made with"),
        ("train-head", ["--kind", "centroids", "--set", "pairs=-1"], "no CentroidMemory can be"),
        ("train-head", ["--batch-size", "9" * 20], "batch_size is 99999999999999999999"),
        ("train-head", ["--seed", str(10**15)], "seed is 1000000000000000, expected"),
        ("train-head", ["--device", "-1"], "device is '-1': Invalid device string"),
        ("train-head", ["--distil", "--k", str(10**15)], "k is 1000000000000000, expected"),
        ("train-head", ["--start", "é\n"], "model é"),
        ("explain", ["--memory", "é\n"], "no such folder"),
    ],
)
def test_what_fuzzing_found(shell, name, more, says):
    (line,) = command(shell, [*COMMANDS[name], *more])
    assert says in line


def test_a_loss_beyond_what_an_exponential_can_be(shell):
    """Losses of thousands of nats are shown and survived."""
    assert not command(shell, [*COMMANDS["train-head"], "--lr", "3e3", "--batch-size", "8"])


def test_a_text_whose_name_has_a_null(shell):
    (line,) = command(shell, ["explain", "model", "\x00", "store"])
    assert "cannot be read: embedded null" in line
