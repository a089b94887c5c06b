"""The real packages around transformers take a kNN model, by object and by folder."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny
import torch
from tiny_memory import KINDS, memory_of, memory_of_kind
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from knnlm_hf.build import Datastore
from knnlm_hf.errors import KNNLMError
from knnlm_hf.memory import KNNMemory
from knnlm_hf.modeling import KNNLMConfig, KNNLMForCausalLM

IDS = torch.tensor([[3, 9, 27, 17, 51]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A kNN model whose retrieval changes tokens, and the folder it is saved in."""
    folder = tmp_path_factory.mktemp("ecosystem")
    base = tiny.gpt2()
    store = Datastore.build(
        base, tiny.corpus(), folder / "store", tokenizer=tiny.tokenizer(), progress=False
    )
    knn = KNNLMForCausalLM(base, KNNMemory(store, k=16), 0.8)
    knn.generation_config.pad_token_id = 0
    knn.save_pretrained(folder / "saved")
    return knn, folder / "saved"


def test_auto_classes(saved: tuple[Any, Path]) -> None:
    knn, folder = saved
    assert isinstance(AutoConfig.from_pretrained(folder), KNNLMConfig)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(loaded, KNNLMForCausalLM)
    assert torch.equal(loaded(IDS).logits, knn(IDS).logits)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half(IDS).logits.dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(folder, lmbda=0.1).lmbda == 0.1
    assert AutoTokenizer.from_pretrained(folder)("w3 w9").input_ids == [3, 9]


def test_the_names_that_others_call_by(saved: tuple[Any, Path]) -> None:
    """`pretrained_model_name_or_path` by keyword; the base's loading report beside the model."""
    knn, folder = saved
    loaded, report = KNNLMForCausalLM.from_pretrained(
        pretrained_model_name_or_path=folder, output_loading_info=True
    )
    assert torch.equal(loaded(IDS).logits, knn(IDS).logits)
    assert not report["missing_keys"]


def test_without_importing_knnlm_hf(saved: tuple[Any, Path]) -> None:
    """The folder's own code is enough, in a fresh process."""
    knn, folder = saved
    code = (
        "import torch; from transformers import AutoModelForCausalLM as A\n"
        f"m = A.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "print(type(m).__name__, m.lmbda, m(torch.tensor([[3, 9, 27]])).logits[0, -1, 5].item())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False
    )
    assert run.returncode == 0, run.stderr
    name, lmbda, logit = run.stdout.split()[-3:]
    assert (name, lmbda) == ("GPT2LMHeadModel", "0.8")
    assert float(logit) == pytest.approx(knn(IDS[:, :3]).logits[0, -1, 5].item(), abs=1e-4)


@pytest.mark.parametrize("by", ["folder", "object"])
def test_pipeline(saved: tuple[Any, Path], by: str) -> None:
    knn, folder = saved
    text = "w3 w9 w27 w17"
    if by == "folder":
        generate = pipeline("text-generation", model=str(folder))
    else:
        generate = pipeline("text-generation", model=knn, tokenizer=tiny.tokenizer())
    options = {"max_new_tokens": 5, "do_sample": False}
    made = generate(text, return_tensors=True, **options)[0]["generated_token_ids"]
    assert generate(text, **options)[0]["generated_text"].startswith(text)
    ids = tiny.tokenizer()(text, return_tensors="pt").input_ids
    expected = knn.generate(ids, **options)
    assert made == expected[0].tolist()
    plain = knn.unwrap().generate(ids, **options)
    assert not torch.equal(plain, expected)


def of_kind(kind: str) -> Any:
    """A kNN model with a head, or with a head and neighbours."""
    model = tiny.gpt2()
    knn = KNNLMForCausalLM(model, memory_of_kind(kind, model, "gpt2"), 0.8)
    knn.generation_config.pad_token_id = 0
    return knn


@pytest.mark.parametrize("by", ["folder", "object", "head", "both"])
def test_lm_eval(saved: tuple[Any, Path], by: str) -> None:
    """Log-likelihoods, rolling ones and generation are the mixture's, whatever the memory."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from lm_eval.api.instance import Instance

    knn, folder = (of_kind(by), Path()) if by in KINDS else saved
    if by == "folder":
        model = huggingface.HFLM(pretrained=str(folder), device="cpu", dtype="float32")
    else:
        model = huggingface.HFLM(pretrained=knn, tokenizer=tiny.tokenizer(), device="cpu")

    def ask(kind: str, *arguments: Any) -> Any:
        instance = Instance(kind, {}, arguments, 0)
        return getattr(model, kind)([instance], disable_tqdm=True)[0]

    ids = tiny.tokenizer()("w3 w9 w27 w17 w51", return_tensors="pt").input_ids
    log_probs = knn(ids).logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    total, _ = ask("loglikelihood", "w3 w9 w27", " w17 w51")
    assert total == pytest.approx(log_probs[2:].sum().item(), abs=1e-3)
    rolling = ask("loglikelihood_rolling", "w3 w9 w27 w17 w51")
    whole = torch.cat([torch.tensor([[0]]), ids], dim=1)
    expected = knn(whole).logits[0, :-1].gather(1, whole[0, 1:, None]).sum().item()
    assert rolling == pytest.approx(expected, abs=1e-3)
    text = ask("generate_until", "w3 w9 w27", {"until": [], "max_gen_toks": 4, "do_sample": False})
    made = knn.generate(ids[:, :3], max_new_tokens=4, do_sample=False)[0, 3:]
    assert text.split() == tiny.tokenizer().decode(made, skip_special_tokens=True).split()


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_evaluate(saved: tuple[Any, Path], tmp_path: Path, kind: str) -> None:
    """Trainer's loss is the mixture's mean negative log-likelihood."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    knn = saved[0] if kind == "knn" else of_kind(kind)
    rows = torch.randint(2, tiny.VOCAB, (4, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True
    )
    trainer = Trainer(knn, arguments, eval_dataset=data)
    loss = trainer.evaluate()["eval_loss"]
    if not hasattr(trainer, "_loss_shifts_labels"):  # before that it counted T labels, not T-1
        loss *= 12 / 11
    with torch.no_grad():
        log_probs = knn(rows).logits[:, :-1].gather(2, rows[:, 1:, None])
        plain = knn.unwrap()(rows, labels=rows).loss.item()
    assert loss == pytest.approx(-log_probs.mean().item(), abs=1e-4)
    assert not math.isclose(loss, plain, abs_tol=0.05)


def test_trainer_trains_and_saves(saved: tuple[Any, Path], tmp_path: Path) -> None:
    """A trained base is no longer the one referred to: its weights go into the checkpoint."""
    pytest.importorskip("accelerate")

    from transformers import Trainer, TrainingArguments

    saved[0].unwrap().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    knn = KNNLMForCausalLM(base, saved[0].memory, 0.8)
    rows = torch.randint(2, tiny.VOCAB, (4, 12), generator=torch.Generator().manual_seed(1))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(knn, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in rows])
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = KNNLMForCausalLM.from_pretrained(tmp_path / "saved", allow_mismatch=True)
    assert torch.equal(loaded(IDS).logits, knn.eval()(IDS).logits)
    assert not torch.allclose(loaded(IDS).logits, saved[0](IDS).logits, atol=1e-2)


def test_explain(saved: tuple[Any, Path]) -> None:
    """Each neighbour's weight, text and document, and the log-probabilities of the prediction."""
    knn, _ = saved
    store, memory = knn.memory.store, knn.memory
    explained = knn.explain(IDS, top=3)
    assert [e.position for e in explained] == [0, 1, 2, 3, 4]
    assert [e.token for e in explained] == [9, 27, 17, 51, None]
    assert [e.token_text for e in explained] == ["w9", "w27", "w17", "w51", None]
    logits = knn(IDS).logits[0]
    with knn.disable_retrieval():
        lm = knn(IDS).logits[0].log_softmax(dim=-1)
    for t, e in enumerate(explained):
        assert e.predicted == logits[t].argmax()
        assert e.predicted_text == f"w{e.predicted}"
        assert e.log_prob == pytest.approx(logits[t].max().item(), abs=1e-5)
        assert e.lm_log_prob == pytest.approx(lm[t, e.predicted].item(), abs=1e-5)
        mixed = 0.2 * math.exp(e.lm_log_prob) + 0.8 * math.exp(e.memory_log_prob)
        assert math.log(mixed) == pytest.approx(e.log_prob, abs=1e-4)
        assert len(e.neighbours) == 3
        for n in e.neighbours:
            assert n.token == store.values[n.entry]
            assert n.document == store.document(n.entry)
            assert n.context is not None
            assert f"w{n.token}" in n.context.split()
    whole = knn.explain(IDS[0], top=99)[2]
    assert len(whole.neighbours) == 16
    assert sum(n.weight for n in whole.neighbours) == pytest.approx(1, abs=1e-5)
    carried = sum(n.weight for n in whole.neighbours if n.token == whole.predicted)
    assert math.exp(whole.memory_log_prob) == pytest.approx(carried, abs=1e-5)
    best = max(n.similarity for n in whole.neighbours)
    for n in whole.neighbours:
        ratio = math.exp((n.similarity - best) / memory.temperature)
        assert n.weight / whole.neighbours[0].weight == pytest.approx(ratio, rel=1e-3)


def test_explain_refuses(saved: tuple[Any, Path]) -> None:

    knn, _ = saved
    for ids in (IDS.expand(2, -1), torch.empty(0, dtype=torch.long)):
        with pytest.raises(KNNLMError, match="expected one text"):
            knn.explain(ids)
    with pytest.raises(KNNLMError, match="top is 0"):
        knn.explain(IDS, top=0)
    model = architectures.tiny("gpt2")
    without = KNNLMForCausalLM(model, memory_of(model, "gpt2", "att"))
    with pytest.raises(KNNLMError, match=r"TinyMemory.* has no neighbours to show"):
        without.explain(IDS)


def test_explain_without_text(saved: tuple[Any, Path], tmp_path: Path) -> None:
    """No tokenizer: ids alone. A subsample: no context, as its text is not whole."""
    knn, _ = saved
    store = Datastore.build(knn.unwrap(), tiny.corpus(), tmp_path / "ids", progress=False)
    bare = KNNLMForCausalLM(knn, store).explain(IDS, top=1)[0]
    assert (bare.token_text, bare.predicted_text, bare.neighbours[0].context) == (None,) * 3
    given = KNNLMForCausalLM(knn, store).explain(IDS, top=1, tokenizer=tiny.tokenizer())[0]
    assert given.neighbours[0].context
    sample = store.subsample(0.5, tmp_path / "half")
    half = KNNLMForCausalLM(knn, sample).explain(IDS, top=1, tokenizer=tiny.tokenizer())[0]
    assert half.neighbours[0].context is None
    assert half.neighbours[0].token_text is not None
