"""Saved, loaded, pushed: by reference and whole, and never half."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from huggingface_hub import HfApi
from tiny_memory import memory_of

from knnlm_hf import persistence
from knnlm_hf.build import Datastore
from knnlm_hf.errors import KNNLMError, ModelMismatchError, PersistenceError
from knnlm_hf.memory import KNNMemory
from knnlm_hf.modeling import KNNLMConfig, KNNLMForCausalLM

IDS = torch.tensor([[3, 9, 27, 17, 51]])


@pytest.fixture
def knn(tmp_path: Path) -> Any:
    """A kNN model on a base that was loaded from a folder, as from_pretrained does."""
    tiny.gpt2().save_pretrained(tmp_path / "gpt2")
    base = type(tiny.gpt2()).from_pretrained(tmp_path / "gpt2").eval()
    store = Datastore.build(
        base, tiny.corpus(), tmp_path / "store", tokenizer=tiny.tokenizer(), progress=False
    )
    memory = KNNMemory(store, k=7, temperature=5.0, metric="ip", index="exact")
    wrapped = KNNLMForCausalLM(base, memory, 0.4)
    wrapped.generation_config.max_new_tokens = 5
    return wrapped


def same(loaded: Any, knn: Any) -> bool:
    return isinstance(loaded, KNNLMForCausalLM) and torch.equal(loaded(IDS).logits, knn(IDS).logits)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_by_reference(knn: Any, tmp_path: Path) -> None:
    knn.save_pretrained(tmp_path / "saved")
    assert not names(tmp_path / "saved") & {"base", "memory", "model.safetensors"}
    assert names(tmp_path) == {"gpt2", "store", "saved"}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"] == "knnlm"
    assert config["base_model_name_or_path"] == str(tmp_path / "gpt2")
    assert config["memories"] == [
        {
            "settings": knn.memory.settings(),
            "source": str(tmp_path / "store"),
            "revision": None,
        }
    ]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_knnlm.KNNLMForCausalLM"
    loaded = KNNLMForCausalLM.from_pretrained(tmp_path / "saved")
    assert same(loaded, knn)
    assert (loaded.lmbda, loaded.memory.settings()) == (0.4, knn.memory.settings())
    assert loaded.generation_config.max_new_tokens == 5
    assert loaded.config.model_type == "gpt2"


def test_whole_and_moved(knn: Any, tmp_path: Path) -> None:
    """With base and store inside, the folder needs nothing else."""
    knn.save_pretrained(tmp_path / "saved", save_base=True, save_memory=True)
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    shutil.rmtree(tmp_path / "gpt2")
    expected = knn(IDS).logits
    shutil.rmtree(tmp_path / "store")
    loaded = KNNLMForCausalLM.from_pretrained(tmp_path / "moved")
    assert torch.equal(loaded(IDS).logits, expected)
    # Saved again where it lies, it still needs nothing else.
    loaded.lmbda = 0.2
    loaded.save_pretrained(tmp_path / "moved")
    again = KNNLMForCausalLM.from_pretrained(tmp_path / "moved")
    assert same(again, loaded)
    shutil.move(tmp_path / "moved", tmp_path / "third")
    assert same(KNNLMForCausalLM.from_pretrained(tmp_path / "third"), loaded)


def test_base_without_a_name_is_saved(knn: Any, tmp_path: Path) -> None:
    nameless = KNNLMForCausalLM(tiny.gpt2(), knn.memory, 0.4)
    nameless.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "base" / "model.safetensors").is_file()
    base = json.loads((tmp_path / "saved" / "base" / "config.json").read_text())
    assert (base["model_type"], base["architectures"]) == ("gpt2", ["GPT2LMHeadModel"])
    assert same(KNNLMForCausalLM.from_pretrained(tmp_path / "saved"), nameless)


@pytest.mark.parametrize("how", ["step", "fused step", "copy", "cast"])
def test_trained_weights_are_not_lost(knn: Any, tmp_path: Path, how: str) -> None:
    """A base trained since it was loaded is no longer what its name refers to; a cast one is."""
    if how == "cast":
        knn.to(torch.bfloat16)
    else:
        optimizer = torch.optim.AdamW(knn.parameters(), 1e-6, fused=how == "fused step")
        knn(IDS, labels=IDS).loss.backward()
        optimizer.step()
    if how == "copy":
        knn = pickle.loads(pickle.dumps(copy.deepcopy(knn)))
    knn.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "base").is_dir() == (how != "cast")


def test_parts_can_be_exchanged(knn: Any, tmp_path: Path) -> None:
    knn.save_pretrained(tmp_path / "saved")
    load = KNNLMForCausalLM.from_pretrained
    assert load(tmp_path / "saved", lmbda=0.1).lmbda == 0.1
    assert load(tmp_path / "saved", dtype=torch.bfloat16).dtype == torch.bfloat16
    other = KNNMemory(knn.memory.store, k=3)
    assert load(tmp_path / "saved", memory=other).memory is other
    base = knn.unwrap()
    assert load(tmp_path / "saved", base_model=base).lm_head is base.lm_head
    with pytest.raises(ModelMismatchError):
        load(tmp_path / "saved", base_model=tiny.gpt2(seed=1))
    assert load(tmp_path / "saved", base_model=tiny.gpt2(seed=1), allow_mismatch=True).lmbda == 0.4


def test_missing_parts_are_named(knn: Any, tmp_path: Path) -> None:
    knn.save_pretrained(tmp_path / "saved")
    load = KNNLMForCausalLM.from_pretrained
    with pytest.raises(PersistenceError, match="no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PersistenceError, match=r"config\.json is missing"):
        load(tmp_path / "empty")
    with pytest.raises(PersistenceError, match="holds a 'gpt2' model, expected a kNN model"):
        load(tmp_path / "gpt2")
    shutil.move(tmp_path / "store", tmp_path / "elsewhere")
    with pytest.raises(PersistenceError, match=r"datastore is missing or damaged .*pass memory="):
        load(tmp_path / "saved")
    found = load(tmp_path / "saved", memory=tmp_path / "elsewhere")
    assert found.memory.store.path == tmp_path / "elsewhere"
    shutil.move(tmp_path / "gpt2", tmp_path / "gone")
    with pytest.raises(PersistenceError, match=r"base model .*cannot be loaded.*pass base_model="):
        load(tmp_path / "saved", memory=tmp_path / "elsewhere")


def test_a_memory_that_cannot_be_saved(tmp_path: Path) -> None:
    model = tiny.gpt2()
    knn = KNNLMForCausalLM(model, memory_of(model, "gpt2", "att"))
    with pytest.raises(PersistenceError, match=r"TinyMemory.*cannot be saved"):
        knn.save_pretrained(tmp_path / "a" / "saved")
    assert not (tmp_path / "a").exists()


def test_adapters_are_not_lost_silently(knn: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(knn.unwrap(), peft.LoraConfig(target_modules=["c_fc"]))
    wrapped = KNNLMForCausalLM(adapted, knn.memory, allow_mismatch=True)
    with pytest.raises(PersistenceError, match="adapters"):
        wrapped.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("at", ["save_base", "card"])
def test_nothing_half_written(
    knn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """An error while saving leaves the folder as it was."""
    knn.save_pretrained(tmp_path / "saved")
    before = {f: f.read_bytes() for f in (tmp_path / "saved").iterdir() if f.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    owner, name = (
        (type(knn.unwrap()), "save_pretrained")
        if at == "save_base"
        else (type(knn.generation_config), "save_pretrained")
    )
    monkeypatch.setattr(owner, name, full)
    knn.lmbda = 0.9
    for target in ("saved", "new"):
        with pytest.raises(PersistenceError, match="cannot be written: No space left on device"):
            knn.save_pretrained(tmp_path / target, save_base=True)
    assert {f: f.read_bytes() for f in (tmp_path / "saved").iterdir() if f.is_file()} == before
    assert names(tmp_path) == {"gpt2", "store", "saved"}


def test_a_file_in_the_way(knn: Any, tmp_path: Path) -> None:
    (tmp_path / "saved").write_text("mine")
    with pytest.raises(PersistenceError, match="a file is in the way"):
        knn.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved").read_text() == "mine"


class FakeHub:
    """What HfApi would have been told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, keep: Path) -> None:
        self.created: dict[str, Any] = {}
        self.uploaded: dict[str, Any] = {}

        def create_repo(_: HfApi, repo_id: str, **options: Any) -> Any:
            self.created = {"repo_id": repo_id, **options}
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(_: HfApi, **options: Any) -> str:
            self.uploaded = options
            shutil.copytree(options["folder_path"], keep)
            return "commit"

        monkeypatch.setattr(HfApi, "create_repo", create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", upload_folder)


def test_push(knn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pushed model says nothing of this machine: base and store travel with it."""
    hub = FakeHub(monkeypatch, tmp_path / "pushed")
    assert knn.push_to_hub("me/knn", private=True, commit_message="first") == "commit"
    assert hub.created["repo_id"] == "me/knn"
    assert (hub.created["repo_type"], hub.created["private"]) == ("model", True)
    assert hub.uploaded["commit_message"] == "first"
    for file in ("config.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "pushed" / file).read_text()
    shutil.rmtree(tmp_path / "gpt2")
    card = (tmp_path / "pushed" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")

    def snapshot(repo_id: str, **options: Any) -> str:
        assert (repo_id, options["repo_type"], options["revision"]) == ("me/knn", "model", "v1")
        return str(tmp_path / "pushed")

    monkeypatch.setattr(persistence, "snapshot_download", snapshot)
    assert same(KNNLMForCausalLM.from_pretrained("me/knn", revision="v1"), knn)


def test_parts_on_the_hub_are_referred_to(
    knn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub" / "datasets--me--store" / "snapshots" / "abc123"
    shutil.copytree(tmp_path / "store", cached)
    base = knn.unwrap()
    base.config._name_or_path, base.config._commit_hash = "openai/gpt2", "def456"
    FakeHub(monkeypatch, tmp_path / "pushed")
    KNNLMForCausalLM(base, cached, 0.4).push_to_hub("me/knn")
    config = json.loads((tmp_path / "pushed" / "config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_revision"]) == ("openai/gpt2", "def456")
    (memory,) = config["memories"]
    assert (memory["source"], memory["revision"]) == ("me/store", "abc123")
    assert not names(tmp_path / "pushed") & {"base", "memory"}
    card = (tmp_path / "pushed" / "README.md").read_text()
    assert "base_model: openai/gpt2\ndatasets:\n- me/store" in card


def test_config_alone() -> None:
    config = KNNLMConfig.from_dict(KNNLMConfig(lmbda=0.3, layer="ffn").to_dict())
    assert (config.lmbda, config.layer, config.model_type) == (0.3, "ffn", "knnlm")
    with pytest.raises(KNNLMError):
        KNNLMForCausalLM(config, "store")
