"""The build itself: batches of windows through the model, states into shards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knnlm_hf import forwards
from knnlm_hf.capture import evaluating, find, states
from knnlm_hf.corpus import Documents
from knnlm_hf.datastore import atomic
from knnlm_hf.datastore.card import card
from knnlm_hf.datastore.folder import TOKENIZER, existing, locked
from knnlm_hf.datastore.ledger import CorpusCheck, Ledger
from knnlm_hf.datastore.manifest import DTYPES, NAME, Manifest
from knnlm_hf.datastore.writer import ShardText, StoreWriter
from knnlm_hf.errors import DatastoreError, KNNLMError
from knnlm_hf.progress import track
from knnlm_hf.types import is_finite
from knnlm_hf.windows import Batch, batches


class StoreBuild:
    """One run of a build, from nothing or from the finished shards of an earlier one."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        texts: Documents,
        folder: Path,
        manifest: Manifest,
    ) -> None:
        self.model, self.tokenizer, self.texts = model, tokenizer, texts
        self.folder, self.manifest = folder, manifest
        self.point = find(model, manifest.layer)
        self.device: torch.device = next(model.parameters()).device
        self.writer: StoreWriter | None = None
        self.waiting: list[ShardText] = []  # texts that came before the writer was there
        self.check = CorpusCheck(folder, manifest)
        self.finished = len(manifest.shards)
        self.began = False  # whether the store's settings were first written by this run

    def run(self, progress: bool) -> None:
        """Write what is missing."""
        done = self.manifest.entries
        settings = self.manifest
        ledger = Ledger(settings.shard_size, self._take_text)
        batch_size = forwards.rows_at_once(self.model, settings.batch_size)
        rows = batches(ledger.read(self.texts), settings.window, settings.stride, batch_size)
        base: Any = getattr(self.model, "disable_retrieval", nullcontext)
        try:
            with evaluating(self.model), base():
                tracked = track(rows, "building", lambda b: b.new, show=progress)
                for keys_ND in self._all_keys(tracked, done):
                    self._append(keys_ND)
            ledger.finish()
            if self.writer is None:
                raise DatastoreError(
                    f"{self.folder}: the corpus is not the one that the store was begun with: it "
                    f"ends after {ledger.entries:,} entries, the unfinished store has {done:,} and "
                    "more"
                )
            with atomic.explaining(self.folder):
                text = card(self.writer.manifest, ledger.entries, ledger.documents)
                atomic.write_bytes(self.folder / "README.md", text.encode())
                self.writer.finish(ledger.documents)
        except KNNLMError:
            if self.began and self.writer is not None and not self.writer.manifest.shards:
                for shard in self.folder.glob("shard-*.safetensors"):  # nothing there to resume
                    atomic.discard(shard)
                for name in ("README.md", NAME, TOKENIZER):
                    atomic.discard(self.folder / name)
            raise
        finally:
            if self.writer is not None:
                self.writer.close()

    def _all_keys(self, rows: Iterable[Batch], done: int) -> Iterator[Tensor]:
        """The keys of all batches, in order, without those of the first `done` entries."""
        position = 0

        def missing() -> Iterator[tuple[Batch, int]]:
            nonlocal position
            for batch in rows:
                first, position = position, position + batch.new
                if position > done:  # else all of it is in finished shards
                    yield batch, max(0, done - first)

        def keys(of: tuple[Batch, int]) -> Tensor:
            batch, present = of
            return self._keys(batch)[present:]

        return forwards.run(self.model, keys, missing())

    def _take_text(self, index: int, text: ShardText) -> None:
        if index < self.finished:
            self.check(index, text)
        elif self.writer is None:
            self.waiting.append(text)
        else:
            self.writer.put(text)

    def _append(self, keys_ND: Tensor) -> None:
        with atomic.explaining(self.folder):
            if self.writer is None:
                self.writer = self._begin(keys_ND.shape[1])
                for text in self.waiting:
                    self.writer.put(text)
            self.writer.append(keys_ND)

    def _begin(self, dim: int) -> StoreWriter:
        """Write the settings before the first shard, so that they are known however it ends."""
        if self.manifest.dim == 0:
            copy = self.folder / TOKENIZER
            if self.tokenizer is not None:
                atomic.remove(copy)
                atomic.write_folder(copy, self.tokenizer.save_pretrained)
            self.began = True
            self.manifest = replace(self.manifest, dim=dim)
            self.manifest.save(self.folder)
        elif self.manifest.dim != dim:
            raise DatastoreError(
                f"{self.folder}: the store has {self.manifest.dim}-d keys, the model gives {dim}-d"
            )
        return StoreWriter(self.folder, self.manifest)

    def _keys(self, batch: Batch) -> Tensor:
        """(N, D) states before the batch's new tokens, in the store's dtype on the CPU."""
        mask_BT = batch.attention_mask
        masked = {} if mask_BT is None else {"attention_mask": mask_BT.to(self.device)}
        input_ids = batch.input_ids.to(self.device)
        hidden_BTD = states(self.model, self.point, input_ids, **masked)
        hidden_ND = hidden_BTD[batch.is_new.to(hidden_BTD.device)]
        keys_ND = hidden_ND.to("cpu", DTYPES[self.manifest.dtype])
        if not is_finite(keys_ND):
            self._refuse(batch, hidden_ND.cpu(), keys_ND)
        return keys_ND

    def _refuse(self, batch: Batch, hidden_ND: Tensor, keys_ND: Tensor) -> None:
        row = int((~keys_ND.isfinite()).any(dim=1).nonzero()[0])
        b, t = batch.is_new.nonzero()[row].tolist()
        place = f"document {int(batch.documents[b])}, token {int(batch.starts[b]) + t + 1}"
        if bool(hidden_ND[row].isfinite().all()):
            peak = float(hidden_ND[row].float().abs().max())
            raise DatastoreError(
                f"{place}: the state has a value of {peak:.3g}, too large for "
                f"{self.manifest.dtype}: build with dtype='bfloat16' or 'float32'"
            )
        raise DatastoreError(
            f"{place}: the model's state at layer {self.manifest.layer!r} is NaN or infinite: such "
            "keys cannot be searched; load the model in bfloat16 or float32"
        )


def build_in(
    folder: Path,
    wanted: Manifest,
    model: Any,
    tokenizer: Any,
    texts: Documents,
    resume: bool,
    progress: bool,
) -> None:
    """Build a store of these settings in `folder`, or finish the one there."""
    with locked(folder):
        manifest = existing(folder, wanted, resume, model, tokenizer)
        if manifest is not None and manifest.complete:
            check_corpus(folder, manifest, texts, progress)
        else:
            StoreBuild(model, tokenizer, texts, folder, manifest or wanted).run(progress)


def check_corpus(folder: Path, manifest: Manifest, texts: Documents, progress: bool) -> None:
    """Check that a finished store was built from this corpus, without the model."""
    ledger = Ledger(manifest.shard_size, CorpusCheck(folder, manifest))
    pieces = track(ledger.read(texts), "comparing", lambda d: len(d.tokens), show=progress)
    for _ in pieces:
        pass
    ledger.finish()
    if ledger.entries != manifest.entries:
        raise DatastoreError(
            f"{folder}: the corpus is not the one that the store was built from: it has "
            f"{ledger.entries:,} entries, the store {manifest.entries:,}. Give the same corpus, or "
            "build into another folder"
        )
