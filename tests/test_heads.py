"""Heads in files and on the Hub: equal when loaded back, refused with one line when damaged."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fake_hub import FakeHub
from safetensors.torch import load_file, save_file

from knnlm_hf import Datastore, KNNLMForCausalLM, MultiEmbeddingHead
from knnlm_hf.errors import KNNLMError, ModelMismatchError, PersistenceError, SettingError
from knnlm_hf.memory.head import Head
from knnlm_hf.memory.kinds import class_of, register

RAGGED = [n % 4 for n in range(7)]
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "one row": ("multi_embedding", {"n": 1}),
    "rows and bias": ("multi_embedding", {"n": 3, "temperature": 0.5, "bias": True}),
    "ragged": ("multi_embedding", {"rows_per_token": RAGGED, "layer": "ffn"}),
    "mixture": ("mixture_of_softmaxes", {"components": 2}),
    "mlp": ("mlp", {"layers": 2, "width": 6, "dropout": 0.1}),
    "centroids": ("centroids", {"clusters": 3, "temperature": 2.0}),
}
QUERIES = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def head_of(name: str) -> Head:
    torch.manual_seed(1)
    kind, settings = HEADS[name]
    head = class_of(kind)(4, 7, **settings)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head.eval()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_loads_back_bit_equal_in_its_own_dtype(name: str, dtype: torch.dtype, tmp_path: Path):
    head = head_of(name).to(dtype)
    head.save_pretrained(tmp_path / "deep" / "head")
    assert {file.name for file in (tmp_path / "deep").rglob("*")} == {
        "head", "config.json", "model.safetensors", "README.md",
    }  # fmt: skip
    before = torch.get_rng_state()
    for cls in (Head, type(head)):
        loaded = cls.from_pretrained(tmp_path / "deep" / "head")
        assert type(loaded) is type(head)
        assert loaded.settings() == head.settings()
        assert not loaded.training
        assert loaded.state_dict().keys() == head.state_dict().keys()
        for key, value in head.state_dict().items():
            assert loaded.state_dict()[key].dtype == value.dtype
            assert torch.equal(loaded.state_dict()[key], value), key
        assert torch.equal(loaded.log_probs(QUERIES), head.log_probs(QUERIES))
        tokens = torch.arange(5)
        expected = head.token_log_probs(QUERIES, tokens)
        assert torch.equal(loaded.token_log_probs(QUERIES, tokens), expected)
        assert all(p.requires_grad for p in loaded.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_is_no_heavy_import(tmp_path: Path):
    """On the meta device some operations import torch's reference kernels, for seconds."""
    for name in HEADS:
        head_of(name).save_pretrained(tmp_path / name.replace(" ", "_"))
    code = """
import sys
from pathlib import Path
from knnlm_hf import Head
for folder in Path(sys.argv[1]).iterdir():
    Head.from_pretrained(folder)
assert "sympy" not in sys.modules  # torch imports it with them
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_loaded_head_can_be_trained_on(tmp_path: Path):
    """It is a copy in memory, not a window on the file, and every buffer is a real tensor."""
    head_of("ragged").save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    head = Head.from_pretrained(tmp_path)
    assert not any(tensor.is_meta for tensor in (*head.parameters(), *head.buffers()))
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    tokens = torch.tensor([1, 2, 3, 5, 6])
    losses = []
    for _ in range(5):
        loss = head(QUERIES, tokens)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert (tmp_path / "model.safetensors").read_bytes() == before
    head.save_pretrained(tmp_path)
    assert torch.equal(Head.from_pretrained(tmp_path).weight, head.weight)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("heads")
    tiny.gpt2().save_pretrained(path / "gpt2")
    base = type(tiny.gpt2()).from_pretrained(path / "gpt2").eval()
    tokenizer = tiny.tokenizer()
    return Datastore.build(
        base, tiny.corpus(20), path / "s", tokenizer=tokenizer, dtype="float32", progress=False
    )


@pytest.fixture(scope="module")
def trained(store: Any) -> Any:
    settings = {"epochs": 2, "lr": 0.03, "batch_size": 64, "seed": 3, "progress": False}
    return MultiEmbeddingHead.train_on(store, n=2, **settings)


def test_the_card_says_how_it_was_made_and_measured(trained: Any, store: Any, tmp_path: Path):
    trained.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: knnlm-hf\n")
    for row in (
        "| layer | `att` |", "| kind | `multi_embedding` |", "| n | 2 |",
        f"| parameters | {2 * tiny.VOCAB * 24:,} (float32) |", "| lr | 0.03 |", "| seed | 3 |",
        f"| entries | {trained.trained.entries:,} |",
        f"| base model | {store.manifest.model['id']} |",
        f"perplexity {math.exp(trained.trained.held_out_loss):,.2f}",
    ):  # fmt: skip
        assert row in card
    assert "base_model:" not in card  # a path on this machine is no repository
    loaded = MultiEmbeddingHead.from_pretrained(tmp_path, n=2, layer="att")
    assert (loaded.trained, loaded.origin) == (trained.trained, trained.origin)
    assert torch.equal(loaded.weight, trained.weight)
    trained_elsewhere = MultiEmbeddingHead(4, 7)
    trained_elsewhere.origin = {**trained.origin, "id": "openai-community/gpt2"}
    trained_elsewhere.save_pretrained(tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "\nbase_model: openai-community/gpt2\n" in card
    assert "not trained" in card


def test_another_model_or_tokenizer_is_refused(trained: Any, store: Any, tmp_path: Path):
    trained.save_pretrained(tmp_path)
    head = Head.from_pretrained(tmp_path)
    same = tiny.gpt2()
    assert KNNLMForCausalLM(same.bfloat16(), head).memory is head
    other = tiny.gpt2(seed=1)
    other.config._name_or_path = "other/model"
    theirs = str(store.manifest.model["id"])
    with pytest.raises(ModelMismatchError, match=r"trained on states of .*other/model") as caught:
        KNNLMForCausalLM(other, head)
    assert theirs in str(caught.value)
    assert "allow_mismatch=True" in str(caught.value)
    assert KNNLMForCausalLM(other, head, allow_mismatch=True).memory is head
    with pytest.raises(KNNLMError, match=r"24-d states .*gives 16-d"):
        KNNLMForCausalLM(tiny.gpt2(n_embd=16), head)
    with pytest.raises(KNNLMError, match=r"61 tokens, .* only 60"):
        KNNLMForCausalLM(tiny.gpt2(vocab_size=60), head, allow_mismatch=True)
    head.check_tokenizer(tiny.tokenizer())
    with pytest.raises(ModelMismatchError, match="another tokenizer"):
        head.check_tokenizer(tiny.tokenizer(reverse=True))
    head.origin = None
    head.check_model(other)
    head.check_tokenizer(tiny.tokenizer(reverse=True))


def test_push_and_load_by_id(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = FakeHub(monkeypatch, tmp_path / "hub")
    assert trained.push_to_hub("me/head", private=True, commit_message="first") == "commit"
    assert hub.created == {
        "repo_id": "me/head", "repo_type": "model", "private": True, "exist_ok": True,
    }  # fmt: skip
    assert hub.uploaded["commit_message"] == "first"
    loaded = MultiEmbeddingHead.from_pretrained("me/head", revision="v1", token="t")
    assert torch.equal(loaded.weight, trained.weight)
    first, second = hub.asked
    assert first["allow_patterns"] == ["config.json"]
    assert set(second["allow_patterns"]) == {"config.json", "model.safetensors", "README.md"}
    for asked in hub.asked:
        assert (asked["repo_type"], asked["revision"], asked["token"]) == ("model", "v1", "t")
    assert loaded.reference() == ("me/head", FakeHub.COMMIT)
    loaded.bias = torch.nn.Parameter(torch.ones(3))
    loaded.bias = None
    assert loaded.reference()[0] == "me/head"
    with torch.no_grad():
        loaded.weight[0, 0] += 1e-3
    assert loaded.reference() == (None, None)
    assert trained.reference() == (None, None)
    with pytest.raises(PersistenceError, match="me/nothing"):
        Head.from_pretrained("me/nothing")


def rewritten(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    (folder / "config.json").write_text(json.dumps(config))


def with_tensors(folder: Path, change: Any) -> None:
    tensors = {
        name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


HOSTILE = {
    "kind": [("settings__kind", "no_such"), ("settings__kind", None), ("settings__kind", ["x"])],
    "knn is no head": [("settings__kind", "knn")],
    "n": [("settings__n", value) for value in (0, -1, 2.5, "3", None, True, 4, 10**30)],
    "hidden_size": [("settings__hidden_size", value) for value in (5, 0, 10**15, -4, "4", [4])],
    "vocab_size": [("settings__vocab_size", value) for value in (8, 0, 10**12, {}, None)],
    "layer": [("settings__layer", value) for value in ("", 3, None)],
    "temperature": [("settings__temperature", value) for value in (0, -1.0, "hot", float("nan"))],
    "settings": [("settings", None), ("settings", []), ("settings__extra", 1), ("settings", {})],
    "version": [("version", 2), ("version", "1"), ("version", None)],
    "format": [("format", "knnlm_hf datastore"), ("format", None)],
    "origin": [("origin", value) for value in ("gpt2", {}, {"id": None}, [1])],
    "trained": [("trained", value) for value in ("well", {}, {"recipe": 3}, [])],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [pair for pairs in HOSTILE.values() for pair in pairs],
    ids=lambda x: str(x)[:20],
)
def test_hostile_configs_are_one_line(name: str, value: Any, tmp_path: Path):
    head_of("rows and bias").save_pretrained(tmp_path)
    rewritten(tmp_path, **{name: value})
    with pytest.raises(PersistenceError) as caught:
        Head.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        {"epochs": -1}, {"entries": "many"}, {"held_out_loss": "low"}, {"store": 5}, {"more": 1},
        {"recipe": {"lr": "fast"}}, {"recipe": {"epochs": -1}}, {"recipe": {"momentum": 0.9}},
    ],
    ids=str,
)  # fmt: skip
def test_a_training_that_cannot_have_been(value: dict, trained: Any, tmp_path: Path):
    trained.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())["trained"]
    rewritten(tmp_path, trained={**data, **value})
    with pytest.raises(PersistenceError, match="cannot be loaded"):
        Head.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("bias"), "'bias'"),
        (lambda t: t.update(extra=torch.zeros(1)), "'extra'"),
        (lambda t: t.update(weight=t["weight"][:-1].clone()), "20"),
        (lambda t: t.update(weight=t["weight"].T.contiguous()), "rows"),
        (lambda t: t.update(weight=t["weight"].long()), "int64"),
        (lambda t: t.update(bias=t["bias"][:, None].clone()), "(21, 1)"),
        (lambda t: t.clear(), "no numbers"),
    ],
)
def test_tensors_that_do_not_fit(change: Any, says: str, tmp_path: Path):
    head_of("rows and bias").save_pretrained(tmp_path)
    with_tensors(tmp_path, change)
    with pytest.raises(PersistenceError) as caught:
        Head.from_pretrained(tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("counts", [[-1, 9, 0, 0, 0, 0, 2], [0] * 7, [1 << 40] * 7, [10]])
def test_row_counts_that_do_not_fit(counts: list[int], tmp_path: Path):
    head_of("ragged").save_pretrained(tmp_path)
    with_tensors(tmp_path, lambda t: t.update(rows_per_token=torch.tensor(counts)))
    with pytest.raises(PersistenceError):
        Head.from_pretrained(tmp_path)


def test_files_missing_or_cut_short(tmp_path: Path):
    with pytest.raises(PersistenceError, match="no such folder"):
        Head.from_pretrained(tmp_path / "nowhere")
    head_of("one row").save_pretrained(tmp_path / "head")
    tensors, config = (tmp_path / "head" / name for name in ("model.safetensors", "config.json"))
    whole = tensors.read_bytes()
    for size in (0, 5, 40, len(whole) - 1):
        tensors.write_bytes(whole[:size])
        with pytest.raises(PersistenceError, match=r"model\.safetensors.*cut short"):
            Head.from_pretrained(tmp_path / "head")
    tensors.unlink()
    with pytest.raises(PersistenceError, match=r"model\.safetensors: the file is missing"):
        Head.from_pretrained(tmp_path / "head")
    tensors.write_bytes(whole)
    text = config.read_text()
    for broken in ("", text[:-9], "[" * 100_000, "null", "3"):
        config.write_text(broken)
        with pytest.raises(PersistenceError, match=r"config\.json"):
            Head.from_pretrained(tmp_path / "head")
    config.unlink()
    with pytest.raises(PersistenceError, match=r"config\.json"):
        Head.from_pretrained(tmp_path / "head")


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path):
    MultiEmbeddingHead(3, 5, 1).save_pretrained(tmp_path / "head")
    (tmp_path / "new").write_text("")
    for file in (tmp_path / "head").iterdir():
        assert file.stat().st_mode == (tmp_path / "new").stat().st_mode, file


def test_another_kind_or_other_settings_are_named(tmp_path: Path):
    head_of("rows and bias").save_pretrained(tmp_path)
    with pytest.raises(PersistenceError, match="holds a MultiEmbeddingHead, expected a MLPMemory"):
        class_of("mlp").from_pretrained(tmp_path)
    with pytest.raises(PersistenceError, match="has n 3, expected 5"):
        Head.from_pretrained(tmp_path, n=5)


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    head = head_of("one row")
    head.save_pretrained(tmp_path / "head")
    before = {file: file.read_bytes() for file in (tmp_path / "head").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    for name in ("head", "a/new"):
        with pytest.raises(PersistenceError, match="No space left on device"):
            head_of("mlp").save_pretrained(tmp_path / name)
    assert {file: file.read_bytes() for file in (tmp_path / "head").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["head"]
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(PersistenceError, match="a file is in the way"):
        head.save_pretrained(tmp_path / "file")


def test_a_head_of_ones_own(tmp_path: Path):
    """A subclass with a kind is saved and loaded like those of the package."""

    class Unigram(Head):
        kind = "test_unigram"

        def __init__(self, hidden_size: int, vocab_size: int, layer: str = "att") -> None:
            super().__init__(hidden_size, vocab_size, layer)
            self.logits = torch.nn.Parameter(torch.arange(vocab_size).float())

        def _log_probs(self, hidden_QD: torch.Tensor) -> torch.Tensor:
            return self.logits.float().log_softmax(0).expand(len(hidden_QD), -1)

    head = Unigram(4, 7)
    head.save_pretrained(tmp_path)
    loaded = Head.from_pretrained(tmp_path)
    assert type(loaded) is Unigram
    expected = torch.arange(7.0).log_softmax(0)
    torch.testing.assert_close(loaded.log_probs(QUERIES), expected.expand(5, 7))
    tokens = torch.tensor([0, 6, 3, 3, 1])
    torch.testing.assert_close(loaded.token_log_probs(QUERIES, tokens), expected[tokens])
    assert loaded(QUERIES, tokens).item() == pytest.approx(-expected[tokens].mean().item())
    assert loaded.log_probs(QUERIES.view(5, 1, 4)).shape == (5, 1, 7)
    assert loaded.log_probs(torch.empty(0, 4)).shape == (0, 7)
    with pytest.raises(SettingError, match="package's own"):
        type("Mine", (Unigram,), {"kind": "mlp"})


def test_unknown_kinds_and_settings(store: Any):
    with pytest.raises(SettingError, match="expected one of multi_embedding"):
        class_of("rows", Head)
    with pytest.raises(SettingError, match="unknown kind of head 'knn'"):
        class_of("knn", Head)
    with pytest.raises(SettingError, match=r"unknown setting m: MultiEmbeddingHead has n, "):
        MultiEmbeddingHead.train_on(store, m=3)
    assert register(class_of("knn")) is class_of("knn")


def test_without_faiss(trained: Any, tmp_path: Path):
    """Train, save, load and mix a head where faiss cannot be imported."""
    trained.save_pretrained(tmp_path / "head")
    shutil.copytree(trained.origin["id"], tmp_path / "gpt2")
    code = """
import sys
sys.modules["faiss"] = None
import torch
from transformers import AutoModelForCausalLM
from knnlm_hf import Datastore, KNNLMForCausalLM, MultiEmbeddingHead
store, base, head = sys.argv[1:]
MultiEmbeddingHead.train_on(Datastore.open(store), n=1, epochs=1, progress=False)
model = AutoModelForCausalLM.from_pretrained(base)
knn = KNNLMForCausalLM(model, head, lmbda=0.5)
total = knn(torch.tensor([[1, 2]])).logits.exp().sum(-1)
print(type(knn.memory).__name__, total.round(decimals=4).tolist())
"""
    paths = [str(trained_store_path(trained)), str(tmp_path / "gpt2"), str(tmp_path / "head")]
    ran = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "MultiEmbeddingHead [[1.0, 1.0]]"


def trained_store_path(trained: Any) -> Path:
    return Path(trained.origin["id"]).parent / "s"
