"""What experiments are given: a model, three splits, and everything made of them, made once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from knnlm_hf import identity
from knnlm_hf.build import Datastore
from knnlm_hf.capture import find
from knnlm_hf.errors import CaptureError, CorpusError, KNNLMError
from knnlm_hf.study.corpora import Text, read_text
from knnlm_hf.study.forward import (
    Evaluation,
    evaluate,
    load_evaluation,
    rows_of,
    save_evaluation,
    spread,
)
from knnlm_hf.study.settings import Settings
from knnlm_hf.study.workspace import Workspace, digest
from knnlm_hf.windows import Window, check_window

Split = Literal["train", "valid", "test"]
FEWEST_ENTRIES = 320
"""Of the training text: its smallest part, 5 %, has to have as many as a code's 16 centroids."""


class Study:
    """A model, a corpus in three splits, a size, and a workspace.

    Everything here is made when it is first asked for, kept in the workspace, and found there by
    the next experiment and the next run.

    Args:
        model: a causal language model.
        tokenizer: needed where a split is text.
        train, valid, test: corpora, as for `Datastore.build`.
        folder: the workspace.
        stores: finished datastores of this model and training text, to use instead of building
            them again: linked into the workspace, or copied where it is on another disk.
        settings: budgets.
        show: progress bars on stderr.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        train: Any,
        valid: Any,
        test: Any,
        folder: str | Path,
        stores: Sequence[str | Path] = (),
        settings: Settings | None = None,
        show: bool = True,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.workspace = Workspace(folder)
        self.settings = settings or Settings()
        self.show = show
        self._corpora = {"train": train, "valid": valid, "test": test}
        self._texts: dict[str, Text] = {}
        self._stores = {store.layer: store for store in map(Datastore.open, stores)}
        self._config = model.config.get_text_config(decoder=True)
        self.window, self.stride = check_window(None, None, self._config)

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self._config.vocab_size)

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Those of the settings; else those of att and ffn that the model has, or final."""
        if self.settings.layers is not None:
            for layer in self.settings.layers:
                find(self.model, layer)
            return self.settings.layers
        found = tuple(layer for layer in ("att", "ffn") if _has(self.model, layer))
        return found or ("final",)

    def text(self, split: Split) -> Text:
        """The documents of a split as token ids; of train, the first `train_tokens`.

        Raises:
            CorpusError: it cannot be read, has nothing to predict, or is too short to train on.
        """
        if split not in self._texts:
            limit = self.settings.train_tokens if split == "train" else None
            text = read_text(
                self._corpora[split], self.tokenizer, self._config, limit, self.workspace
            )
            entries = sum(max(0, len(part) - 1) for part in text.documents)
            if not entries:
                raise CorpusError(
                    f"{split} has {len(text)} tokens in {len(text.documents)} documents, expected "
                    "a document of 2 tokens or more: there is nothing to predict"
                )
            if split == "train" and entries < FEWEST_ENTRIES:
                raise CorpusError(
                    f"train has {len(text)} tokens, {entries} of them to predict, expected at least"
                    f" {FEWEST_ENTRIES}: the smallest datastore of a study is a twentieth of it"
                )
            self._texts[split] = text
        return self._texts[split]

    def rows(self, split: Split, stride: int | None = None) -> list[Window]:
        """The windows of valid or test that are scored: `eval_tokens` predictions in all."""
        everything = rows_of(self.text(split).documents, self.window, stride or self.stride)
        return spread(everything, self.settings.eval_tokens)

    @cached_property
    def model_digest(self) -> str:
        """Identifies the model by its weights and configuration, not by its name."""
        return model_digest(self.model)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """All that results depend on: the model, the tokens of the splits, the settings."""
        splits: tuple[Split, ...] = ("train", "valid", "test")
        return {
            "model": self.model_digest,
            **{split: self.text(split).digest for split in splits},
            "settings": self.settings.to_dict(),
        }

    def keep(
        self, kind: str, name: str, inputs: dict[str, Any], make: Callable[[Path], object]
    ) -> Path:
        """Something of an experiment's own, made once; see `Workspace.keep`."""
        return self.workspace.keep(kind, name, inputs, make)

    def evaluation(
        self, split: Split, model: Any = None, name: str = "base", *, stride: int | None = None
    ) -> Evaluation:
        """A split as a model sees it: log-probabilities, and the states of all `layers`.

        Args:
            split: valid or test.
            model: another model, on the same tokens (one that was trained further, say).
            name: of that model, for people.
            stride: new tokens per window, other than the study's.
        """
        chosen = self.model if model is None else model
        inputs = {
            "model": self.model_digest if model is None else model_digest(model),
            "text": self.text(split).digest,
            "eval_tokens": self.settings.eval_tokens,
            "layers": self.layers,
            "stride": stride or self.stride,
        }

        def make(path: Path) -> None:
            found = evaluate(
                chosen, self.rows(split, stride), self.layers,
                batch_size=self.settings.batch_size, show=self.show,
            )  # fmt: skip
            save_evaluation(found, path)

        return load_evaluation(self.keep("evaluations", f"{name}-{split}", inputs, make))

    def store(self, layer: str = "att") -> Datastore:
        """The datastore of the training text at a layer."""
        inputs = {
            "model": self.model_digest, "text": self.text("train").digest, "layer": layer,
        }  # fmt: skip

        given = self._stores.get(layer)
        batch_size = self.settings.batch_size if given is None else given.manifest.batch_size

        def make(path: Path) -> None:
            is_given = given is not None and not path.exists()
            if given is not None and is_given:
                shutil.copytree(given.path, path, copy_function=_link)
            try:  # a finished store is checked against model, text and settings, and returned
                Datastore.build(
                    self.model, self.text("train").documents, path, tokenizer=self.tokenizer,
                    layer=layer, batch_size=batch_size, progress=self.show,
                )  # fmt: skip
            except KNNLMError:
                if is_given:
                    shutil.rmtree(path)
                raise

        store = Datastore.open(self.workspace.keep("stores", layer, inputs, make, resumes=True))
        if store.removed is not None:
            raise KNNLMError(
                f"{store.path}: {len(store.removed_documents)} documents are removed, but they are "
                "in the training text of the study: leave them out of it, and of the store"
            )
        return store


def model_digest(model: Any) -> str:
    """Identifies a model by a sample of its weights and its configuration."""
    facts = identity.describe(model)
    return digest([facts["config"], facts["weights"], str(model.dtype)])


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _has(model: Any, layer: str) -> bool:
    try:
        find(model, layer)
    except CaptureError:
        return False
    return True
