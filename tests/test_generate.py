"""generate(), whole: every mode is the mixture's, checked against the mixture's own forward."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from architectures import V, tiny, tokenizer
from packaging.version import Version
from tiny_memory import KINDS, asked, memory_of_kind
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TextIteratorStreamer,
    TextStreamer,
)

from knnlm_hf.capture import capturing
from knnlm_hf.memory import CacheMemory
from knnlm_hf.modeling import KNNLMForCausalLM

NEW = 6
IDS = torch.tensor([[3, 9, 27, 17, 51], [5, 25, 61, 49, 53]])
FIXED: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def make(
    model_type: str = "llama", kind: str = "knn", lmbda: float = 0.8, seed: int = 0, **settings: Any
) -> Any:
    """A model and its wrapper; all 48 entries are neighbours, so nothing jumps at rank k."""
    model = tiny(model_type, seed=seed, **settings)
    memory = memory_of_kind(kind, model, model_type, k=48)
    return model, KNNLMForCausalLM(model, memory, lmbda)


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest) -> Any:
    """A model and its wrapper with neighbours, with a head, and with both."""
    return make(kind=request.param)


@pytest.fixture(scope="module")
def neighbours() -> Any:
    """The same with neighbours alone."""
    return make()


def mask(ids: Tensor) -> Tensor:
    return torch.ones_like(ids)


def greedy(model: Any, ids: Tensor, new: int = NEW) -> Tensor:
    """Greedy search written out: whole forwards, no cache."""
    with torch.no_grad():
        for _ in range(new):
            best = model(ids, use_cache=False).logits[:, -1].argmax(dim=-1)
            ids = torch.cat([ids, best[:, None]], dim=1)
    return ids


# Two memories on GPT-2 (learned positions) and llama (rotary), besides a state-space hybrid.
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "jamba"])
def test_greedy(model_type: str) -> None:
    """Peers' bug 4: every generated token is the mixture's, and not the model's."""
    model, knn = make(model_type)
    tokens = knn.generate(IDS, attention_mask=mask(IDS), **FIXED)
    assert torch.equal(tokens, greedy(knn, IDS))
    assert not torch.equal(tokens, model.generate(IDS, attention_mask=mask(IDS), **FIXED))


def test_disabled_is_the_models_generation(both: Any) -> None:
    model, knn = both
    with knn.disable_retrieval():
        tokens = knn.generate(IDS, attention_mask=mask(IDS), **FIXED)
    assert torch.equal(tokens, model.generate(IDS, attention_mask=mask(IDS), **FIXED))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"use_cache": True},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 2},
    ],
    ids=str,
)
def test_caches_give_the_same_tokens(both: Any, settings: dict[str, Any]) -> None:
    _, knn = both
    tokens = knn.generate(IDS, attention_mask=mask(IDS), **FIXED, **settings)
    assert torch.equal(tokens, greedy(knn, IDS))


def test_only_the_last_position_is_searched(neighbours: Any) -> None:
    """One state per step and row, in the prefill too."""
    _, knn = neighbours
    knn.memory.asked.clear()
    knn.generate(IDS, attention_mask=mask(IDS), **FIXED)
    assert asked(knn) == [(2, 1, 32)] * NEW


def test_scores_are_the_mixture(both: Any) -> None:
    _, knn = both
    made = knn.generate(
        IDS, attention_mask=mask(IDS), return_dict_in_generate=True, output_logits=True, **FIXED
    )
    whole = knn(made.sequences).logits[:, 4:-1]
    torch.testing.assert_close(torch.stack(made.logits, 1), whole, rtol=0, atol=1e-4)
    transition = knn.compute_transition_scores(made.sequences, made.logits)
    chosen = whole.gather(-1, made.sequences[:, 5:, None])[..., 0]
    torch.testing.assert_close(transition, chosen, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_left_padded_rows_equal_the_row_alone(model_type: str, kind: str) -> None:
    """Peers' bug 3: padding is neither seen nor searched with."""
    _, knn = make(model_type, kind)
    short, long = IDS[:1, 2:], IDS[1:]
    padded = torch.cat([torch.nn.functional.pad(short, (2, 0)), long])
    attention_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    tokens = knn.generate(padded, attention_mask=attention_mask, **FIXED)
    assert torch.equal(
        tokens[:1, 5:], knn.generate(short, attention_mask=mask(short), **FIXED)[:, 3:]
    )
    assert torch.equal(tokens[1:], knn.generate(long, attention_mask=mask(long), **FIXED))


def test_sampling_is_from_the_mixture(both: Any) -> None:
    """Many samples of one token follow P(w|c); and the seed decides."""
    _, knn = both
    torch.manual_seed(0)
    samples = knn.generate(
        IDS[:1], attention_mask=mask(IDS[:1]), do_sample=True, top_k=0, max_new_tokens=1,
        num_return_sequences=4000,
    )  # fmt: skip
    counts = torch.bincount(samples[:, -1], minlength=V) / 4000
    probs = knn(IDS[:1]).logits[0, -1].exp()
    assert (counts - probs).abs().max() < 0.04
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(knn.generate(IDS, attention_mask=mask(IDS), do_sample=True, max_new_tokens=8))
    assert torch.equal(*runs)


def test_beams_find_the_likeliest_text(both: Any) -> None:
    """With as many beams as tokens, two steps of beam search are exhaustive."""
    _, knn = both
    ids = IDS[:1]
    made = knn.generate(
        ids, attention_mask=mask(ids), num_beams=V, num_return_sequences=3, max_new_tokens=2,
        do_sample=False, length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    first = knn(ids).logits[0, -1]
    texts = torch.cat([ids.expand(V, -1), torch.arange(V)[:, None]], dim=1)
    total = first[:, None] + knn(texts).logits[:, -1]
    best = total.flatten().topk(3)
    pairs = torch.stack([best.indices // V, best.indices % V], dim=1)
    assert torch.equal(made.sequences[:, 5:], pairs)
    torch.testing.assert_close(made.sequences_scores, best.values, rtol=0, atol=1e-4)


def test_beams_in_a_batch(both: Any) -> None:
    _, knn = both
    tokens = knn.generate(IDS, attention_mask=mask(IDS), num_beams=3, **FIXED)
    for row, text in enumerate(IDS):
        alone = knn.generate(text[None], attention_mask=mask(text[None]), num_beams=3, **FIXED)
        assert torch.equal(tokens[row : row + 1], alone)


def test_prompt_lookup(neighbours: Any) -> None:
    """Several positions are verified at once, each against the mixture."""
    if Version(transformers.__version__) < Version("5.10"):
        pytest.skip("prompt lookup asks for an end token there")
    _, knn = neighbours
    ids = torch.tensor([[3, 9, 27, 3, 9, 27, 3, 9]])
    knn.memory.asked.clear()
    tokens = knn.generate(ids, attention_mask=mask(ids), prompt_lookup_num_tokens=3, **FIXED)
    assert any(shape[1] > 1 for shape in asked(knn))
    assert torch.equal(tokens, greedy(knn, ids))


@pytest.mark.parametrize("who", ["target", "assistant", "both"])
def test_assisted_decoding(both: Any, who: str) -> None:
    """Assisted greedy decoding gives the target's greedy text, whoever drafts."""
    model, knn = both
    draft, draft_knn = make(seed=1)
    target = model if who == "assistant" else knn
    assistant = draft if who == "target" else draft_knn
    ids = IDS[:1]
    tokens = target.generate(ids, attention_mask=mask(ids), assistant_model=assistant, **FIXED)
    assert torch.equal(tokens, greedy(target, ids))
    assert bool(asked(draft_knn)) == (who != "target")


def test_assistant_that_exits_early(both: Any) -> None:
    """It never reaches the last layer: its drafts are the plain model's, not an error."""
    _, knn = both
    ids = IDS[:1]
    tokens = knn.generate(ids, attention_mask=mask(ids), assistant_early_exit=1, **FIXED)
    assert torch.equal(tokens, greedy(knn, ids))


def test_several_sequences(both: Any) -> None:
    _, knn = both
    tokens = knn.generate(
        IDS, attention_mask=mask(IDS), do_sample=True, num_return_sequences=3, max_new_tokens=4
    )
    assert tokens.shape == (6, 9)


def test_processors_see_the_mixture(both: Any) -> None:
    _, knn = both
    seen: list[Tensor] = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            seen.append(scores.clone())
            scores[:, 11] = 1e4
            return scores

    tokens = knn.generate(
        IDS, attention_mask=mask(IDS), logits_processor=LogitsProcessorList([Look()]),
        max_new_tokens=3, do_sample=False,
    )  # fmt: skip
    assert (tokens[:, 5:] == 11).all()
    torch.testing.assert_close(seen[0], knn(IDS).logits[:, -1], rtol=0, atol=1e-4)


def test_banned_tokens_stay_banned(both: Any) -> None:
    """Repetition penalties and bans act on the mixture's log-probabilities."""
    _, knn = both
    first = greedy(knn, IDS, 1)[:, -1].tolist()
    tokens = knn.generate(
        IDS, attention_mask=mask(IDS), bad_words_ids=[[t] for t in first], repetition_penalty=1.3,
        **FIXED,
    )  # fmt: skip
    assert not set(tokens[:, 5:].flatten().tolist()) & set(first)


def test_streaming(both: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, knn = both
    ids = IDS[:1]
    expected = tokenizer().decode(greedy(knn, ids)[0, 5:])
    streamer = TextStreamer(tokenizer(), skip_prompt=True)
    knn.generate(ids, attention_mask=mask(ids), streamer=streamer, **FIXED)
    assert capsys.readouterr().out.split() == expected.split()


def test_streaming_from_a_thread(both: Any) -> None:
    _, knn = both
    ids = IDS[:1]
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60)
    arguments = {"attention_mask": mask(ids), "streamer": streamer, **FIXED}
    thread = threading.Thread(target=knn.generate, args=(ids,), kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == tokenizer().decode(greedy(knn, ids)[0, 5:]).split()


def test_inputs_embeds(both: Any) -> None:
    _, knn = both
    if isinstance(knn.memory, CacheMemory):
        pytest.skip("it cannot know the tokens of embeddings: see test_cache.py")
    embeds = knn.get_input_embeddings()(IDS)
    tokens = knn.generate(inputs_embeds=embeds, attention_mask=mask(IDS), **FIXED)
    assert torch.equal(tokens, greedy(knn, IDS)[:, 5:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, kind: str) -> None:
    _, knn = make(kind=kind, dtype=dtype)
    knn.to(dtype)
    made = knn.generate(
        IDS, attention_mask=mask(IDS), return_dict_in_generate=True, output_logits=True, **FIXED
    )
    assert all(step.dtype == torch.float32 for step in made.logits)
    whole = knn(made.sequences).logits[:, 4:-1]
    torch.testing.assert_close(torch.stack(made.logits, 1).exp(), whole.exp(), rtol=0, atol=0.03)


@pytest.mark.parametrize("kind", ["knn", "both"])
def test_continuous_batching(kind: str) -> None:
    """generate_batch: rows of different lengths in one packed forward, in a worker thread."""
    model, knn = make(kind=kind)
    texts = [IDS[0].tolist(), IDS[1, :3].tolist(), [7, 8]]
    config = knn.generation_config
    config.max_new_tokens, config.do_sample, config.eos_token_id = NEW, False, -1

    def run(model: Any) -> list[list[int]]:
        small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
        outputs = model.generate_batch(
            texts, generation_config=config, continuous_batching_config=small, progress_bar=False
        )
        return [output.generated_tokens for output in outputs.values()]

    attention = knn.config._attn_implementation
    mixed = run(knn)
    knn.set_attn_implementation(attention)
    expected = [greedy(knn, torch.tensor([t]))[0, len(t) :].tolist() for t in texts]
    assert mixed == expected
    with knn.disable_retrieval():
        off = run(knn)
    model.set_attn_implementation(attention)
    assert off == [greedy(model, torch.tensor([t]))[0, len(t) :].tolist() for t in texts]
    assert off != mixed


def test_threads_do_not_disturb_each_other(both: Any) -> None:
    """Two generations on one wrapper, one of them without retrieval."""
    model, knn = both
    truth = {True: greedy(knn, IDS), False: greedy(model, IDS)}
    wrong: list[bool] = []

    def work(retrieve: bool) -> None:
        for _ in range(5):
            if retrieve:
                tokens = knn.generate(IDS, attention_mask=mask(IDS), **FIXED)
            else:
                with knn.disable_retrieval():
                    tokens = knn.generate(IDS, attention_mask=mask(IDS), **FIXED)
            if not torch.equal(tokens, truth[retrieve]):
                wrong.append(retrieve)

    threads = [threading.Thread(target=work, args=(n % 2 == 0,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def skip_unless_torch_compiles(bare: Any) -> None:
    """Torch 2.6 compiles no GPT-2 of transformers 5.4, and so none with a wrapper."""
    torch.compiler.reset()
    try:
        torch.compile(bare, backend="eager", fullgraph=True)(IDS)
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"torch {torch.__version__} compiles no model without a wrapper: {error}")
    torch.compiler.reset()  # what was compiled for a model without hooks would serve one with them


@pytest.mark.parametrize(("off_first", "kind"), [(True, "knn"), (False, "knn"), (False, "both")])
@torch.no_grad()
def test_compiled_equals_eager(off_first: bool, kind: str) -> None:
    """In both orders of use: what was compiled without retrieval is not used with it."""
    skip_unless_torch_compiles(tiny("gpt2"))
    model, knn = make("gpt2", kind)
    eager, plain = knn(IDS, labels=IDS), model(IDS).logits
    compiled = torch.compile(knn, backend="eager")
    if off_first:
        with knn.disable_retrieval():
            assert torch.equal(compiled(IDS).logits, plain)
    for _ in range(2):
        torch.testing.assert_close(compiled(IDS).logits, eager.logits)
        with knn.disable_retrieval():
            torch.testing.assert_close(compiled(IDS).logits, plain)
    torch.testing.assert_close(compiled(IDS, labels=IDS).loss, eager.loss)
    made = compiled.generate(IDS, attention_mask=mask(IDS), **FIXED)
    assert torch.equal(made, greedy(knn, IDS))
    assert not knn.memories[-1].traced


@torch.no_grad()
def test_the_model_alone_still_compiles_whole() -> None:
    skip_unless_torch_compiles(tiny("gpt2"))
    model, knn = make("gpt2")
    expected = model(IDS).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):  # before the wrapper is used, and after
        torch.testing.assert_close(compiled(IDS).logits, expected)
        assert not torch.allclose(knn(IDS).logits, expected.log_softmax(-1))
    with capturing(knn.capture_point) as collector:
        torch.compile(model, backend="eager")(IDS)
    assert collector.raw is not None


@torch.no_grad()
def test_compiled_by_inductor() -> None:
    """Inductor loses logaddexp(log_softmax, log(scatter_add)): the mixture must not reach it."""
    torch.compiler.reset()
    model, knn = make("gpt2")
    compiled = torch.compile(knn)
    torch.testing.assert_close(compiled(IDS).logits, knn(IDS).logits, rtol=0, atol=1e-4)
    lm = model(IDS).logits.log_softmax(dim=-1)
    assert (compiled(IDS).logits - lm).abs().max() > 0.5
    assert not knn.memory.traced
