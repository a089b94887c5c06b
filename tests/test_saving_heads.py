"""kNN models with heads, with several memories, with memories of one's own: saved and loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fake_hub import FakeHub
from transformers import AutoModelForCausalLM

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory, MultiEmbeddingHead
from knnlm_hf.errors import KNNLMError, ModelMismatchError, PersistenceError
from knnlm_hf.memory import as_memory, register
from knnlm_hf.memory.mlp import MLPMemory

IDS = torch.tensor([[3, 9, 27, 17, 51]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with its tokenizer, and a store of its states."""
    home = tmp_path_factory.mktemp("made")
    tiny.gpt2().save_pretrained(home / "gpt2")
    tiny.tokenizer().save_pretrained(home / "gpt2")
    Datastore.build(
        base_of(home), tiny.corpus(), home / "store", tokenizer=tiny.tokenizer(), progress=False
    ).build_index("exact")
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "home")
    return tmp_path / "home"


def base_of(home: Path) -> Any:
    return type(tiny.gpt2()).from_pretrained(home / "gpt2").eval()


def head_of(home: Path, cls: Any = MultiEmbeddingHead, seed: int = 0, **settings: Any) -> Any:
    """An untrained head that knows the model it belongs to."""
    torch.manual_seed(seed)
    head = cls(24, tiny.VOCAB, **settings)
    head.origin = Datastore.open(home / "store").manifest.model
    return head.eval()


def same(loaded: Any, knn: Any) -> bool:
    return isinstance(loaded, KNNLMForCausalLM) and torch.equal(loaded(IDS).logits, knn(IDS).logits)


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def test_a_head_lies_inside(home: Path, tmp_path: Path) -> None:
    knn = KNNLMForCausalLM(base_of(home), head_of(home, n=2), 0.3)
    expected = knn(IDS).logits
    knn.save_pretrained(tmp_path / "saved", save_base=True)
    assert {file.name for file in (tmp_path / "saved" / "memory").iterdir()} == {
        "config.json", "model.safetensors", "README.md",
    }  # fmt: skip
    (memory,) = config_of(tmp_path / "saved")["memories"]
    assert memory == {"settings": knn.memory.settings(), "folder": "memory"}
    assert not {"base_model", "memory.weight"} & set(knn.state_dict())
    shutil.rmtree(home)
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    for load in (KNNLMForCausalLM, AutoModelForCausalLM):
        loaded = load.from_pretrained(tmp_path / "moved")
        assert torch.equal(loaded(IDS).logits, expected)
        assert type(loaded.memory) is MultiEmbeddingHead
        assert loaded.lmbda == 0.3
    # Saved again where it lies, changed.
    with torch.no_grad():
        loaded.memory.weight.mul_(2)
    loaded.save_pretrained(tmp_path / "moved")
    assert same(KNNLMForCausalLM.from_pretrained(tmp_path / "moved"), loaded)
    # The head in it is a head like any other, and so is its folder a memory.
    assert torch.equal(as_memory(tmp_path / "moved" / "memory").weight, loaded.memory.weight)


def test_the_head_keeps_its_dtype(home: Path, tmp_path: Path) -> None:
    head = head_of(home, n=1).bfloat16()
    KNNLMForCausalLM(base_of(home), head, 0.3).save_pretrained(tmp_path / "saved")
    loaded = KNNLMForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float16)
    assert (loaded.dtype, loaded.memory.weight.dtype) == (torch.float16, torch.bfloat16)
    assert torch.equal(loaded.memory.weight, head.weight)


@pytest.mark.parametrize("where", ["saved", "away"])
def test_several_memories(home: Path, tmp_path: Path, where: str) -> None:
    memories = [
        head_of(home, n=2),
        KNNMemory(home / "store", k=5, temperature=3.0),
        head_of(home, MLPMemory, width=8, layers=1, layer="ffn"),
    ]
    knn = KNNLMForCausalLM(base_of(home), memories, [0.2, 0.1, 0.3])
    knn.save_pretrained(tmp_path / "saved", save_base=True, save_memory=True)
    folders = [memory["folder"] for memory in config_of(tmp_path / "saved")["memories"]]
    assert folders == ["memory/0", "memory/1", "memory/2"]
    expected = knn(IDS).logits
    shutil.rmtree(home)
    if where == "away":
        shutil.move(tmp_path / "saved", tmp_path / "away")
    loaded = KNNLMForCausalLM.from_pretrained(tmp_path / where)
    assert torch.equal(loaded(IDS).logits, expected)
    assert [type(memory).__name__ for memory in loaded.memories] == [
        "MultiEmbeddingHead", "KNNMemory", "MLPMemory",
    ]  # fmt: skip
    assert loaded.lmbdas == (0.2, 0.1, 0.3)
    assert [point.layer for point in loaded.capture_points] == ["att", "att", "ffn"]
    assert loaded.memories[1].settings() == memories[1].settings()
    card = (tmp_path / where / "README.md").read_text()
    for part in ("a datastore of", "a MultiEmbeddingHead of", "a MLPMemory of", "| λ | 0.3 |"):
        assert part in card
    # In another order into the same folder: none overwrites what another still needs.
    turned = KNNLMForCausalLM(loaded.unwrap(), list(loaded.memories[1:]), [0.1, 0.3])
    turned.save_pretrained(tmp_path / where)
    assert same(KNNLMForCausalLM.from_pretrained(tmp_path / where), turned)
    alone = KNNLMForCausalLM(loaded.unwrap(), loaded.memories[2], 0.3)
    alone.save_pretrained(tmp_path / where)
    assert same(KNNLMForCausalLM.from_pretrained(tmp_path / where), alone)


def test_a_store_stays_a_reference_beside_a_head(home: Path, tmp_path: Path) -> None:
    memories = [KNNMemory(home / "store", k=5, temperature=3.0), head_of(home, n=1)]
    knn = KNNLMForCausalLM(base_of(home), memories, [0.2, 0.1])
    knn.save_pretrained(tmp_path / "saved")
    store, head = config_of(tmp_path / "saved")["memories"]
    assert (store["source"], head["folder"]) == (str(home / "store"), "memory/0")
    assert same(KNNLMForCausalLM.from_pretrained(tmp_path / "saved"), knn)
    given = KNNLMForCausalLM.from_pretrained(
        tmp_path / "saved", memory=[head_of(home, n=1), home / "store"], lmbda=[0.1, 0.2]
    )
    assert [type(memory) for memory in given.memories] == [MultiEmbeddingHead, KNNMemory]
    two = KNNLMForCausalLM(base_of(home), [home / "store", home / "store"], [0.2, 0.1])
    with pytest.raises(PersistenceError, match="names one datastore"):
        two.save_pretrained(tmp_path / "two", store_id="me/store")


def test_a_head_from_the_hub_is_referred_to(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeHub(monkeypatch, tmp_path / "hub")
    head_of(home, n=2).push_to_hub("me/head")
    knn = KNNLMForCausalLM(base_of(home), "me/head", 0.3)
    assert type(knn.memory) is MultiEmbeddingHead
    knn.save_pretrained(tmp_path / "saved")
    (memory,) = config_of(tmp_path / "saved")["memories"]
    assert (memory["source"], memory["revision"]) == ("me/head", FakeHub.COMMIT)
    assert not (tmp_path / "saved" / "memory").exists()
    assert same(KNNLMForCausalLM.from_pretrained(tmp_path / "saved"), knn)
    with torch.no_grad():
        knn.memory.weight.mul_(2)  # what lies on the Hub is another head now
    knn.save_pretrained(tmp_path / "changed")
    assert (tmp_path / "changed" / "memory" / "model.safetensors").is_file()
    assert same(KNNLMForCausalLM.from_pretrained(tmp_path / "changed"), knn)
    # What the reference leads to must be what was saved.
    other = head_of(home, n=1)
    shutil.rmtree(tmp_path / "hub")
    other.push_to_hub("me/head")
    with pytest.raises(PersistenceError, match="has n 1, expected 2"):
        KNNLMForCausalLM.from_pretrained(tmp_path / "saved")


def test_pushed_with_a_head(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pushed model says nothing of this machine, and brings head, base and tokenizer along."""
    hub = FakeHub(monkeypatch, tmp_path / "hub")
    memories = [head_of(home, n=2), KNNMemory(home / "store", k=5, temperature=3.0)]
    memories[0].origin = {**memories[0].origin, "id": "openai-community/gpt2"}
    knn = KNNLMForCausalLM(base_of(home), memories, [0.2, 0.1])
    expected = knn(IDS).logits
    assert knn.push_to_hub("me/knn", private=True) == "commit"
    assert hub.created["private"] is True
    pushed = hub.folder("me/knn")
    for file in (*pushed.glob("*.*"), *pushed.glob("memory/0/*.*")):
        assert str(tmp_path) not in file.read_text(errors="ignore"), file
    shutil.rmtree(home)
    assert torch.equal(KNNLMForCausalLM.from_pretrained("me/knn")(IDS).logits, expected)


def test_the_tokenizer_beside_the_base_goes_along(home: Path, tmp_path: Path) -> None:
    head = head_of(home, n=1)
    knn = KNNLMForCausalLM(base_of(home), head, 0.3)
    knn.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    tiny.tokenizer(reverse=True).save_pretrained(home / "gpt2")
    knn.save_pretrained(tmp_path / "other")  # not that of the head's words
    assert not (tmp_path / "other" / "tokenizer.json").exists()


def test_without_faiss(home: Path, tmp_path: Path) -> None:
    """The Auto class, the pipeline and this library load a saved model with a head; no faiss."""
    knn = KNNLMForCausalLM(
        base_of(home), [head_of(home, n=2), head_of(home, MLPMemory)], [0.3, 0.2]
    )
    knn.save_pretrained(tmp_path / "saved", save_base=True)
    torch.save(knn(IDS).logits, tmp_path / "expected.pt")
    code = """
import sys
sys.modules["faiss"] = None
import torch
from transformers import AutoModelForCausalLM, pipeline
folder, expected = sys.argv[1], torch.load(sys.argv[2])
loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(loaded(torch.tensor([[3, 9, 27, 17, 51]])).logits, expected)
made = pipeline("text-generation", folder, trust_remote_code=True)
text = made("w3 w9 w27", max_new_tokens=4, do_sample=False)[0]["generated_text"]
ids = made.tokenizer("w3 w9 w27", return_tensors="pt")
best = made.model.generate(**ids, max_new_tokens=4, do_sample=False)[0]
assert type(made.model).__mro__[1].__name__ == "KNNLMForCausalLM", type(made.model).__mro__
assert "w3 w9 w27" + made.tokenizer.decode(best[3:], skip_special_tokens=True) == text, text
from knnlm_hf import KNNLMForCausalLM, perplexity, tune
again = KNNLMForCausalLM.from_pretrained(folder)
assert perplexity(again, [[3, 9, 27, 17, 51]] * 3).perplexity > 0
again.save_pretrained(sys.argv[3])
assert "faiss" not in [name for name, module in sys.modules.items() if module is not None]
print("well")
"""
    paths = [str(tmp_path / name) for name in ("saved", "expected.pt", "again")]
    ran = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "well"


def test_a_head_of_another_model_is_refused(home: Path, tmp_path: Path) -> None:
    KNNLMForCausalLM(base_of(home), head_of(home, n=1), 0.3).save_pretrained(tmp_path / "saved")
    load = KNNLMForCausalLM.from_pretrained
    with pytest.raises(ModelMismatchError, match="trained on states of"):
        load(tmp_path / "saved", base_model=tiny.gpt2(seed=1))
    assert load(tmp_path / "saved", base_model=tiny.gpt2(seed=1), allow_mismatch=True).lmbda == 0.3
    with pytest.raises(KNNLMError, match="24-d"):
        load(tmp_path / "saved", base_model=tiny.gpt2(n_embd=16), allow_mismatch=True)


@pytest.mark.parametrize("damage", ["missing", "cut", "no tensors"])
def test_a_damaged_head_is_named(home: Path, tmp_path: Path, damage: str) -> None:
    KNNLMForCausalLM(base_of(home), head_of(home, n=1), 0.3).save_pretrained(tmp_path / "saved")
    tensors = tmp_path / "saved" / "memory" / "model.safetensors"
    if damage == "missing":
        shutil.rmtree(tensors.parent)
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    else:
        tensors.unlink()
    with pytest.raises(PersistenceError, match=r"memory of kind 'multi_embedding'.*pass memory="):
        KNNLMForCausalLM.from_pretrained(tmp_path / "saved")
    given = KNNLMForCausalLM.from_pretrained(tmp_path / "saved", memory=head_of(home, n=1))
    assert given.lmbda == 0.3


@pytest.mark.parametrize(
    "memories",
    [
        [], {}, ["memory"], [{}], [{"settings": {"kind": "knn"}}],
        [{"settings": {"kind": "knn"}, "folder": "../../store"}],
        [{"settings": {"kind": "knn", "no_such": 1}, "folder": "memory"}],
        [{"settings": {"kind": "knn", "token": 1}, "folder": "memory"}],
        [{"settings": {"kind": "knn", "k": -1}, "folder": "memory"}],
        [{"settings": {"kind": "elsewhere"}, "folder": "memory"}],
        [{"settings": {"kind": ["knn"]}, "folder": "memory"}],
        [{"settings": {"kind": "multi_embedding"}, "source": 7}],
    ],
    ids=str,
)  # fmt: skip
def test_hostile_configs(home: Path, tmp_path: Path, memories: Any) -> None:
    knn = KNNLMForCausalLM(base_of(home), home / "store", 0.3)
    knn.save_pretrained(tmp_path / "saved", save_memory=True)
    config = config_of(tmp_path / "saved") | {"memories": memories}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PersistenceError) as caught:
        KNNLMForCausalLM.from_pretrained(tmp_path / "saved")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inside", [True, False])
def test_folders_of_version_0_1_still_load(home: Path, tmp_path: Path, inside: bool) -> None:
    knn = KNNLMForCausalLM(base_of(home), KNNMemory(home / "store", k=5, temperature=3.0), 0.3)
    knn.save_pretrained(tmp_path / "saved", save_memory=inside)
    config = config_of(tmp_path / "saved")
    (memory,) = config.pop("memories")
    config["memory_settings"] = memory["settings"]
    config["store"] = None if inside else str(home / "store")
    config["store_revision"] = None
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    assert same(KNNLMForCausalLM.from_pretrained(tmp_path / "saved"), knn)


class Uniform:
    """A memory of one's own: every token alike."""

    layer, hidden_size = "final", 24

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def log_probs(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.full((*hidden.shape[:-1], self.vocab_size), 1 / self.vocab_size).log()

    def token_log_probs(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return torch.full(tokens.shape, 1 / self.vocab_size).log()


@register
class Kept(Uniform):
    """One that knows how to save itself."""

    kind = "test_kept"

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "vocab_size": self.vocab_size}

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "note.txt").write_text("kept")

    @classmethod
    def from_pretrained(cls, source: Path, *, vocab_size: int, **hub: Any) -> Kept:
        assert (source / "note.txt").read_text() == "kept"
        return cls(vocab_size)


def test_a_memory_of_ones_own(home: Path, tmp_path: Path) -> None:
    with pytest.raises(PersistenceError, match=r"memory \(Uniform\) cannot be saved: .*register"):
        KNNLMForCausalLM(base_of(home), Uniform(tiny.VOCAB)).save_pretrained(tmp_path / "no")
    mixed = [home / "store", Uniform(tiny.VOCAB)]
    with pytest.raises(PersistenceError, match="Uniform"):
        KNNLMForCausalLM(base_of(home), mixed, [0.1, 0.1]).save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()
    knn = KNNLMForCausalLM(base_of(home), Kept(tiny.VOCAB), 0.3)
    knn.save_pretrained(tmp_path / "saved")
    loaded = KNNLMForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded.memory) is Kept
    assert same(loaded, knn)


def test_what_is_no_memory(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(KNNLMError, match="no datastore there"):
        as_memory(tmp_path / "empty")
    with pytest.raises(PersistenceError, match="nowhere: no such folder"):
        as_memory(tmp_path / "nowhere")
    head_of(home, n=1).save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "config.json").write_text("{")
    with pytest.raises(PersistenceError, match=r"nor a head \(.*config\.json: is damaged"):
        as_memory(tmp_path / "cut")
    with pytest.raises(PersistenceError, match=r"no manifest\.json.* nor a head \(.*is not the"):
        as_memory(home / "gpt2")
    FakeHub(monkeypatch, tmp_path / "hub")
    with pytest.raises(PersistenceError, match=r"neither a datastore .* nor a head") as caught:
        as_memory("me/nothing")
    assert "\n" not in str(caught.value)
