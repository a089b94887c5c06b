"""The page of a text: every token once, score()'s figures, and nothing of a text is ever HTML."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import hostile_text
import pytest
import tiny
import torch
from hostile_text import ATTACKS, TEXT, TITLE, WORDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory, explanation_page, score
from knnlm_hf.errors import CorpusError, KNNLMError, ModelMismatchError, SettingError
from knnlm_hf.inspection import read
from knnlm_hf.inspection.pieces import around, pieces
from knnlm_hf.inspection.words import level, percent, visible


def seen(text: str) -> str:
    """How the two control characters among the words are shown."""
    return text.replace("\0", "␀").replace("\u202e", "⟨U+202E⟩")


class Page(HTMLParser):
    """What a browser sees: tags with attributes, the text of #text and of each of its tokens."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.text, self.tokens, self.levels = "", [], []
        self.raw: dict[str, list[str]] = {"script": [], "style": [], "visible": []}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.inside.append("#text" if dict(attrs).get("id") == "text" else tag)
        if tag in ("script", "style"):
            self.raw[tag].append("")
        if "#text" in self.inside and tag == "span":
            self.tokens.append("")
            self.levels.append(dict(attrs)["class"].split()[1])

    def handle_endtag(self, tag):
        assert self.inside.pop() in (tag, "#text")

    def handle_data(self, data):
        if self.inside[-1:] and self.inside[-1] in self.raw:
            self.raw[self.inside[-1]][-1] += data
            return
        self.raw["visible"].append(data)
        if "#text" in self.inside:
            self.text += data
            if self.inside[-1] == "span":
                self.tokens[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.raw["script"][0])

    @property
    def words(self) -> str:
        return " ".join("".join(self.raw["visible"]).split())


@pytest.fixture(scope="module")
def knn(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return hostile_text.knn(tmp_path_factory.mktemp("inspection") / "store")


@pytest.fixture(scope="module")
def page(knn: Any) -> str:
    return explanation_page(knn, TEXT, title=TITLE)


def test_every_token_stands_there_once(page: str) -> None:
    found = Page(page)
    assert found.text == seen(hostile_text.tokenizer().decode(TEXT))
    assert found.tokens == [seen(WORDS[i]) for i in TEXT]
    assert len(found.data["tokens"]) == len(TEXT)
    assert [facts["id"] for facts in found.data["tokens"][1:]] == TEXT[1:]


def test_nothing_of_a_text_is_html(page: str) -> None:
    """The tags are the page's own, whatever the words of text, contexts and title are."""
    found = Page(page)
    ours = {
        "html", "head", "meta", "link", "title", "style", "body", "header", "h1", "h2", "p", "main",
        "section", "div", "table", "thead", "tbody", "tr", "th", "td", "ul", "ol", "li", "span",
        "b", "strong", "noscript", "aside", "button", "footer", "script",
    }  # fmt: skip
    assert {tag for tag, _ in found.tags} <= ours
    assert [a for tag, a in found.tags if tag == "script"] == [
        {"type": "application/json", "id": "data"}, {}
    ]  # fmt: skip
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert not {"src", "srcset", "action"} & attributes.keys()
        assert attributes.get("href") in (None, "data:,"), tag
    for tag in ("html", "script", "style", "title", "table"):  # every end is an end of ours
        assert page.count(f"</{tag}>") == len([t for t, _ in found.tags if t == tag])
    assert "<" not in found.raw["script"][0]
    assert TITLE in found.words


def test_contexts_come_through_unchanged(page: str, knn: Any) -> None:
    """What the script will show of a neighbour is the text around its entry."""
    data, store = Page(page).data, knn.memory.store
    shown = 0
    for facts, said in zip(data["tokens"][1:], knn.explain(TEXT, top=5), strict=False):
        near = {n.rank: n for n in said.neighbours + said.carriers}
        assert [rank for _, _, rank in facts["n"]] == sorted(near)
        for place, weight, rank in facts["n"]:
            memory, document, token, (before, word, after) = data["contexts"][place]
            entry = near[rank].entry
            assert (memory, document, token) == (0, store.document(entry), store.values[entry])
            around_it = hostile_text.tokenizer().decode(store.context(entry, 14, 7))
            assert before + word + after == seen(around_it)
            assert word == seen(WORDS[token])
            assert float(weight.split()[0].strip("<")) == pytest.approx(
                100 * near[rank].weight, rel=6e-3, abs=1e-3
            )
            shown += 1
    assert len(data["contexts"]) < shown  # shared


def test_no_script_runs_but_ours(page: str) -> None:
    found = Page(page)
    policy = next(
        a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for kind, source in (("script", found.raw["script"][1]), ("style", found.raw["style"][0])):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "innerHTML" not in page
    assert not re.search(r"(?:https?:)?//\w", found.raw["style"][0] + found.raw["script"][1])


def test_figures_are_those_of_score(knn: Any, page: str) -> None:
    scores = score(knn, [TEXT], progress=False)
    reading = read(knn, TEXT)
    assert reading.perplexity == pytest.approx(scores.perplexity(), rel=1e-5)
    assert reading.base_perplexity == pytest.approx(scores.base_perplexity, rel=1e-5)
    assert reading.memory_perplexity == pytest.approx(scores.memory_perplexity(), rel=1e-5)
    assert reading.oracle_perplexity == pytest.approx(scores.oracle(), rel=1e-5)
    found = Page(page)
    assert f"model alone{scores.base_perplexity:.2f}" in found.words
    assert f"mixture{scores.perplexity():.2f}" in found.words
    better = int((scores.memory_log_probs() > scores.lm_log_probs).sum())
    assert f"Of {len(scores)} predicted tokens the memory was likelier on {better}." in found.words
    columns = scores.lm_log_probs, scores.memory_log_probs(), scores.log_probs()
    for facts, *row in zip(found.data["tokens"][1:], *columns, strict=True):
        for text, log_prob in zip(facts["p"], row, strict=True):
            assert text.startswith("<") or float(text.split()[0]) == pytest.approx(
                100 * log_prob.exp().item(), rel=6e-3
            )
    ratios = (columns[1].double() - columns[0].double()).tolist()
    sides = {"m": -1, "e": 0, "k": 1}
    for shown, ratio in zip(found.levels[1:], ratios, strict=True):
        assert sides[shown[0]] == (0 if abs(ratio) < math.log(1.25) else math.copysign(1, ratio))


def test_levels() -> None:
    steps = [0.05, 0.2, 0.7, 0.9, 1.0, 1.2, 1.3, 2.9, 3.1, 9.9, 10.1]
    levels = ["m3", "m2", "m1", *["even"] * 3, "k1", "k1", "k2", "k2", "k3"]
    assert [level(math.log(times)) for times in steps] == levels
    assert level(-math.inf) == "m3"


def test_shares_of_documents(knn: Any) -> None:
    """By hand: λ · weight / P, of every neighbour shown that carries the token."""
    expected: dict[int, float] = {}
    for said in knn.explain(TEXT, top=12)[:-1]:
        for near in said.carriers:
            share = 0.4 * near.weight / math.exp(said.token_log_prob)
            expected[near.document] = expected.get(near.document, 0) + share
    rows = read(knn, TEXT, top=12).documents()
    assert {document: pytest.approx(share) for _, document, _, share in rows} == expected
    assert [row[3] for row in rows] == sorted((row[3] for row in rows), reverse=True)
    assert 0 < sum(expected.values()) < len(TEXT)


def test_a_long_text_is_cut_and_says_so(knn: Any, page: str) -> None:
    found = Page(explanation_page(knn, TEXT, limit=40))
    assert len(found.tokens) == 40
    assert "The text goes on: its first 40 tokens are shown" in found.words
    reading = read(knn, TEXT, limit=40)
    assert reading.perplexity == pytest.approx(score(knn, [TEXT[:40]], progress=False).perplexity())
    for whole in (page, explanation_page(knn, TEXT[:40], limit=40)):
        assert "goes on" not in Page(whole).words


def test_size_is_bounded_by_the_tokens_and_neighbours_shown(knn: Any) -> None:
    few, many = (len(Page(explanation_page(knn, TEXT, top=n)).data["contexts"]) for n in (1, 5))
    assert few <= 2 * len(TEXT)
    assert few < many <= 10 * len(TEXT)


def test_text_is_what_its_ids_are(knn: Any) -> None:
    words = [*ATTACKS[:9], "w40", "w41", *ATTACKS[2:5]]  # no \r or \0, which files lack too
    ids = [WORDS.index(word) for word in words]
    page = explanation_page(knn, " ".join(words), hostile_text.tokenizer())
    for same in (ids, torch.tensor(ids), torch.tensor([ids])):
        assert explanation_page(knn, same) == page


def test_several_memories_and_a_subsample(knn: Any, tmp_path: Path) -> None:
    half = knn.memory.store.subsample(0.5, tmp_path / "half")
    two = KNNLMForCausalLM(tiny.gpt2(), [knn.memory, KNNMemory(half, k=5)], [0.4, 0.2])
    data = Page(explanation_page(two, TEXT)).data
    assert data["memories"] == 2
    assert {memory for memory, *_ in data["contexts"]} == {0, 1}
    for memory, _, _, parts in data["contexts"]:
        assert (parts is None) == (memory == 1)  # a subsample has no text
    for token, said in zip(read(two, TEXT).tokens, two.explain(TEXT), strict=False):
        one, other = (math.exp(each) for each in said.token_memory_log_prob)
        assert math.exp(token.memory) == pytest.approx((0.4 * one + 0.2 * other) / 0.6, abs=1e-6)
        assert len(data["tokens"][token.number]["e"]) == 2
    silent = KNNLMForCausalLM(tiny.gpt2(), knn.memory, 0.0)
    assert Page(explanation_page(silent, TEXT)).levels == Page(explanation_page(knn, TEXT)).levels


def test_refuses(knn: Any, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="2 tokens"):
        explanation_page(knn, "w40")
    with pytest.raises(CorpusError, match="vocabulary"):
        explanation_page(knn, [3, 99])
    with pytest.raises(SettingError, match="limit is 1"):
        explanation_page(knn, TEXT, limit=1)
    with pytest.raises(SettingError, match="top is 0"):
        explanation_page(knn, TEXT, top=0)
    with pytest.raises(ModelMismatchError, match="another tokenizer"):
        explanation_page(knn, "w40 w41", tiny.tokenizer())
    bare = Datastore.build(tiny.gpt2(), tiny.corpus(), tmp_path / "bare", progress=False)
    with pytest.raises(KNNLMError, match="no tokenizer"):
        explanation_page(KNNLMForCausalLM(tiny.gpt2(), bare), TEXT)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, as GPT-2's without merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_character_of_several_tokens() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a 日🙂.").input_ids
    assert pieces(ids, tokenizer) == ["a", " ", "", "", "日", "", "", "", "🙂", "."]
    assert pieces(ids[:4], tokenizer) == ["a", " ", "", "\ufffd"]  # cut inside of one
    assert around(ids, 4, tokenizer) == ("a ", "日", "🙂.")
    assert around(ids, 3, tokenizer) == ("a ", "", "日🙂.")
    assert around(ids, 0, tokenizer) == ("", "a", " 日🙂.")


@pytest.mark.parametrize("text", ["w3 w9 w27", "w3", "w5 w5 w5 w5"])
def test_pieces_keep_the_space_before_a_word(text: str) -> None:
    ids = tiny.tokenizer()(text).input_ids
    found = pieces(ids, tiny.tokenizer())
    assert "".join(found) == text
    assert [piece.strip() for piece in found] == text.split()
    assert around(ids, len(ids) - 1, tiny.tokenizer())[1] == text.split()[-1]


def test_words() -> None:
    assert [percent(math.log(p)) for p in (1, 0.5, 0.01234, 2e-6)] == [
        "100\u00a0%", "50\u00a0%", "1.23\u00a0%", "< 0.001\u00a0%"
    ]  # fmt: skip
    assert percent(-math.inf) == "0\u00a0%"
    assert [visible(text) for text in (" fox", "\n", "  ", "")] == ["fox", "↵", "␣", "␣"]
