"""More of the packages around transformers, used as their own pages say: whole jobs, not calls.

`test_ecosystem.py` has single calls of them; PEFT and accelerate's offload are in
`test_wrapper.py`, compilation and streamers in `test_generate.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, TextStreamer, pipeline

from knnlm_hf.build import Datastore
from knnlm_hf.memory import KNNMemory
from knnlm_hf.modeling import KNNLMForCausalLM
from knnlm_hf.scoring import perplexity

IDS = torch.tensor([[3, 9, 27, 17, 51]])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    folder = tmp_path_factory.mktemp("clients")
    return Datastore.build(
        tiny.gpt2(), tiny.corpus(), folder / "store", tokenizer=tiny.tokenizer(), progress=False
    )


@pytest.fixture(scope="module")
def knn(store: Datastore) -> Any:
    """A kNN model whose retrieval changes tokens."""
    wrapped = KNNLMForCausalLM(tiny.gpt2(), KNNMemory(store, k=16), 0.8)
    wrapped.generation_config.pad_token_id = 0
    return wrapped


def log_likelihood(model: Any, context: list[int], ending: list[int]) -> float:
    with torch.no_grad():
        log_probs = model(torch.tensor([context + ending])).logits[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(ending) - 1)
    return sum(float(log_probs[i, t]) for i, t in zip(places, ending, strict=True))


def test_lm_eval_runs_a_local_task(knn: Any, tmp_path: Path) -> None:
    """A multiple-choice task of our own: each answer is the one that the mixture finds likelier."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = torch.randint(2, tiny.VOCAB, (12, 6), generator=torch.Generator().manual_seed(3))
    documents = []
    for row in rows.tolist():
        words = [f"w{token}" for token in row]
        documents.append({"text": " ".join(words[:4]), "choices": words[4:], "answer": 0})
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, documents)))
    task = {
        "task": "local", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {
            "data_files": {"test": str(tmp_path / "test.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "output_type": "multiple_choice", "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "local.yaml").write_text(json.dumps(task))  # JSON is YAML

    def accuracy(model: Any) -> float:
        results = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tiny.tokenizer(), device="cpu", batch_size=4),
            tasks=["local"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
        )
        return float(results["results"]["local"]["acc,none"])

    def expected(model: Any) -> float:
        wins = [
            log_likelihood(model, row[:4], [row[4]]) > log_likelihood(model, row[:4], [row[5]])
            for row in rows.tolist()
        ]
        return sum(wins) / len(wins)

    assert expected(knn) != expected(knn.unwrap())
    assert accuracy(knn) == pytest.approx(expected(knn))
    assert accuracy(knn.unwrap()) == pytest.approx(expected(knn.unwrap()))


def test_pipeline_in_batches_and_from_a_generator(knn: Any) -> None:
    """Rows of other lengths, padded on the left, continue as they do alone."""
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    generate = pipeline("text-generation", model=knn, tokenizer=tokenizer)
    prompts = ["w3 w9 w27 w17", "w51", "w8 w8", "w20 w4 w11", "w5 w6 w7 w8 w9"]
    options = {"max_new_tokens": 4, "do_sample": False}
    alone = [generate(prompt, **options)[0]["generated_text"] for prompt in prompts]
    batched = generate(prompts, batch_size=3, **options)
    assert [made[0]["generated_text"] for made in batched] == alone
    streamed = generate((prompt for prompt in prompts), batch_size=2, **options)
    assert [made[0]["generated_text"] for made in streamed] == alone


def test_pipeline_with_a_streamer(knn: Any, capsys: pytest.CaptureFixture[str]) -> None:
    generate = pipeline("text-generation", model=knn, tokenizer=tiny.tokenizer())
    text = generate(
        "w3 w9", max_new_tokens=4, do_sample=False, streamer=TextStreamer(tiny.tokenizer())
    )[0]["generated_text"]  # fmt: skip
    assert "".join(capsys.readouterr().out.split()) == "".join(text.split())


@pytest.mark.parametrize(
    "places",
    [
        {"": "cpu"},
        {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h.0": "disk",
         "transformer.h.1": "cpu", "transformer.ln_f": "cpu", "lm_head": "cpu"},
    ],
    ids=["cpu", "disk"],
)  # fmt: skip
def test_device_map(knn: Any, tmp_path: Path, places: dict[str, str]) -> None:
    """A base that accelerate spreads over cpu and disk, wrapped, saved and loaded like that."""
    pytest.importorskip("accelerate")
    knn.unwrap().save_pretrained(tmp_path / "base")
    options = {"device_map": places, "offload_folder": str(tmp_path / "offload")}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    if "disk" in places.values():
        assert base.transformer.h[0].mlp.c_fc.weight.is_meta
    spread = KNNLMForCausalLM(base, knn.memory, 0.8)
    expected = knn(IDS).logits
    torch.testing.assert_close(spread(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    with spread.disable_retrieval():
        plain = spread(IDS).logits.log_softmax(-1)
    assert not torch.allclose(plain, expected, atol=1e-2)
    assert torch.equal(
        spread.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0),
        knn.generate(IDS, max_new_tokens=4, do_sample=False),
    )
    spread.save_pretrained(tmp_path / "saved", save_base=False)
    loaded = KNNLMForCausalLM.from_pretrained(tmp_path / "saved", **options)
    torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_streaming_dataset(knn: Any, tmp_path: Path) -> None:
    """Built and scored from an iterator over files, as from the same texts in memory."""
    texts = [text for text in tiny.text(tiny.corpus(12, seed=4)) if text]
    for name, part in (("a", texts[:5]), ("b", texts[5:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part) + "\n")
    streamed = load_dataset(
        "text", data_files=[str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], split="train",
        streaming=True, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    options: dict[str, Any] = {"tokenizer": tiny.tokenizer(), "progress": False}
    one = Datastore.build(tiny.gpt2(), streamed, tmp_path / "one", **options)
    other = Datastore.build(tiny.gpt2(), texts, tmp_path / "other", **options)
    assert one.digest == other.digest
    assert one.documents == len(texts)
    found = perplexity(knn, streamed.take(4), **options)
    expected = perplexity(knn, texts[:4], **options)
    assert found.perplexity == pytest.approx(expected.perplexity)


class Likelihoods(torch.utils.data.Dataset[float]):
    """A dataset that asks the model it carries, in whatever process it is."""

    def __init__(self, model: Any, rows: list[list[int]]) -> None:
        self.model, self.rows = model, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> float:
        return log_likelihood(self.model, self.rows[i][:2], self.rows[i][2:])


def test_pickled_to_a_dataloader_worker(knn: Any) -> None:
    """A spawned process gets the model by pickle, its memory by the store's path."""
    rows = torch.randint(2, tiny.VOCAB, (5, 6), generator=torch.Generator().manual_seed(6)).tolist()
    expected = [log_likelihood(knn, row[:2], row[2:]) for row in rows]
    loader = DataLoader(
        Likelihoods(knn, rows), batch_size=2, num_workers=1, multiprocessing_context="spawn"
    )
    found = torch.cat(list(loader))
    torch.testing.assert_close(found.float(), torch.tensor(expected), atol=1e-3, rtol=1e-4)
