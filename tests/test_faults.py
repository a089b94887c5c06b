"""Every file operation of every writer fails once, in several ways: nothing lost, nothing wrong.

After each fault the state on the disk is the one before the work or the one after it, whole; and
the same work, done again, ends in the same state as work that was not disturbed.
"""

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import faults
import pytest
import tiny
import torch
from faults import Faults, Killed
from filelock import FileLock, Timeout
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from knnlm_hf import Datastore, KNNLMForCausalLM, KNNMemory, MultiEmbeddingHead, persistence
from knnlm_hf.errors import DatastoreError, KNNLMError
from knnlm_hf.index import built_indexes
from knnlm_hf.memory import MLPMemory

faiss = pytest.importorskip("faiss")

MODEL = tiny.gpt2(n_embd=8)
OLD, NEW = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10, 11]], [[3, 4, 5], [], [12, 13, 14, 15, 16]]
SPECS = ["Flat", "IVF2,Flat"]
TRIED = {}


@pytest.fixture(scope="module", autouse=True)
def total(request):
    """Print the number of faults tried, past pytest's capture."""
    disable_progress_bar()
    yield
    enable_progress_bar()
    shown = ", ".join(f"{name} {count}" for name, count in TRIED.items())
    line = f"{sum(TRIED.values()):,} faults tried: {shown}"
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{line}")


def build(path):
    return Datastore.build(
        MODEL, OLD, path, window=4, stride=2, batch_size=4, shard_size=5, progress=False
    )


def with_indexes(path):
    store = build(path)
    for spec in SPECS:
        store.build_index(spec, progress=False)
    store.remove([2])


def state(path):
    """What a reader makes of a store: rows, removed documents, and what its indexes find."""
    store = Datastore.open(path)
    store.verify()
    found = []
    for _, info in built_indexes(path / "indexes"):
        if info.digest == store.manifest.rows_digest:
            memory = KNNMemory(store, k=3, index=info.factory)
            found.append((info.factory, memory.search(store.keys[:4]).ids.tolist()))
    return (
        store.values.tolist(), store.keys[:].tolist(), store.document_starts.tolist(),
        store.removed_documents, sorted(found),
    )  # fmt: skip


def nothing_or(state_of):
    """`state_of`, or "nothing" where it is refused."""

    def found(path):
        try:
            return state_of(path)
        except KNNLMError:
            return "nothing"

    return found


def remove(path):
    Datastore.open(path).remove([0])


def grow(path):
    Datastore.open(path).append(MODEL, NEW, progress=False)


def index_again(path):
    Datastore.open(path).build_index("Flat", seed=1, progress=False)


def compact(path):
    if not (path / "compacted").exists():  # else it is whole
        Datastore.open(path).compact(path / "compacted", progress=False)


def compacted(path):
    return state(path / "compacted") if (path / "compacted").exists() else state(path)


def head(seed=0):
    torch.manual_seed(seed)
    made = MultiEmbeddingHead(8, 61, n=2, layer="att")
    torch.nn.init.normal_(next(made.parameters()))
    return made


def save_head(path):
    head(1).save_pretrained(path / "head")


def head_state(path):
    return [p.tolist() for p in MultiEmbeddingHead.from_pretrained(path / "head").parameters()]


def train(path):
    store = Datastore.open(path)
    trained = MultiEmbeddingHead.train_on(
        store, n=1, epochs=3, batch_size=8, checkpoint=path / "checkpoint", progress=False
    )
    TRAINED.append([p.tolist() for p in trained.parameters()])


TRAINED = []


def last_trained(path):
    """Training leaves nothing on the disk: its result is the head."""
    return TRAINED[-1] if TRAINED else "nothing"


def save_wrapper(path):
    knn = KNNLMForCausalLM(MODEL, KNNMemory(path, k=2, index="exact", temperature=2.0), lmbda=0.5)
    knn.save_pretrained(path / "knn", save_base=True, save_memory=False)


def wrapper_state(path):
    knn = KNNLMForCausalLM.from_pretrained(path / "knn")
    return knn.lmbda, knn.memory.k, knn(torch.tensor([[1, 2, 3]])).logits.tolist()


def mixed(seed):
    """A model beside a head of its own."""
    return KNNLMForCausalLM(tiny.gpt2(seed, n_embd=8), head(seed), lmbda=(1 + seed) / 4)


def save_over(path):
    mixed(1).save_pretrained(path / "knn")


def auto_state(path):
    knn = AutoModelForCausalLM.from_pretrained(path / "knn")
    rows = [p.tolist() for p in (*knn.unwrap().parameters(), *knn.memory.parameters())]
    return knn.lmbda, rows


def several(path, seed):
    torch.manual_seed(seed)
    memories = [
        KNNMemory(path, k=2 + seed, index="exact", temperature=2.0),
        MLPMemory(8, 61, width=2, layers=1) if seed else head(),
    ]
    knn = KNNLMForCausalLM(MODEL, memories, lmbda=[0.1 + seed / 10, 0.2])
    knn.save_pretrained(path / "knn", save_base=False, save_memory=True)


def before_several(path):
    build(path)
    (path / "knn").mkdir()
    (path / "knn" / "notes.txt").write_text("mine")
    several(path, 0)


def save_several(path):
    several(path, 1)


def several_state(path):
    assert (path / "knn" / "notes.txt").read_text() == "mine"
    knn = KNNLMForCausalLM.from_pretrained(path / "knn", base_model=MODEL)
    kinds = [memory.settings() for memory in knn.memories]
    return knn.lmbdas, kinds, knn(torch.tensor([[1, 2, 3]])).logits.tolist()


def nothing(path):
    path.mkdir()


WORK = {  # name: what is there before, the work, the state that is looked at, further kinds
    "build": (nothing, build, nothing_or(state)),
    "index": (with_indexes, index_again, state),
    "remove": (with_indexes, remove, state),
    "append": (with_indexes, grow, state),
    "compact": (with_indexes, compact, compacted),
    "save a head": (nothing, save_head, nothing_or(head_state)),
    "save a head over another": (
        lambda path: head().save_pretrained(path / "head"),
        save_head,
        head_state,
    ),
    "train a head": (build, train, last_trained),
    "save a model": (build, save_wrapper, nothing_or(wrapper_state)),
    "save a model over another": (
        lambda path: mixed(0).save_pretrained(path / "knn"),
        save_over,
        auto_state,
    ),
    "save several memories over others": (before_several, save_several, several_state),
}


@pytest.fixture(params=WORK)
def work(request, tmp_path_factory):
    """The folder before, the work, its state before and after, and how many operations it takes."""
    prepare, run, look = WORK[request.param]
    folder = tmp_path_factory.mktemp("faults")
    before, after = folder / "before", folder / "after"
    prepare(before)
    shutil.copytree(before, after)
    TRAINED.clear()
    first = look(before)
    count = faults.operations(lambda: run(after))
    return request.param, before, run, look, (first, look(after)), count


@pytest.mark.parametrize("kind", ["kill", "full", "readonly"])
def test_every_operation_fails_once(work, kind, tmp_path):
    name, before, run, look, states, count = work
    assert count >= 5
    # A kill at every operation; of the others, which spoil all that follow, some.
    step = 1 if kind == "kill" else 1 + count // 12
    for at in range(1, count + 1, step):
        path = tmp_path / "s"
        shutil.copytree(before, path)
        TRAINED.clear()
        with Faults(kind, at).armed():
            if kind == "kill":
                with pytest.raises(Killed):
                    run(path)
            else:
                refused(run, path)
        tried(name)
        if at % 3:  # else the work is done again without having been looked at
            assert look(path) in states, (kind, at)
        run(path)
        assert look(path) == states[1], (kind, at)
        assert not list(path.rglob("*.tmp")), (kind, at)
        shutil.rmtree(path)


@pytest.mark.parametrize("name", ["index", "remove", "append"])
def test_a_reader_beside_a_writer(name, tmp_path):
    """Before every operation of the writer a reader opens the store: as before, or as after."""
    prepare, run, look = WORK[name]
    prepare(tmp_path / "s")
    shutil.copytree(tmp_path / "s", tmp_path / "after")
    run(tmp_path / "after")
    states = [look(tmp_path / "s"), look(tmp_path / "after")]
    seen = []
    kept = Datastore.open(tmp_path / "s")
    held = kept.values.tolist(), kept.keys[:].tolist()

    def read():
        found = look(tmp_path / "s")
        seen.append(states.index(found) if name != "index" else found in states)
        tried("reader beside a writer")

    with Faults(between=read).armed():
        run(tmp_path / "s")
    read()
    assert len(seen) > 5
    assert seen == sorted(seen)  # never back
    assert seen[-1] == 1
    assert (kept.values.tolist(), kept.keys[:].tolist()) == held


@pytest.mark.parametrize("name", ["build", "index", "remove", "append"])
def test_two_writers(name, tmp_path):
    """While one writes, others are refused, and spoil nothing."""
    prepare, run, look = WORK[name]
    prepare(tmp_path / "s")
    shutil.copytree(tmp_path / "s", tmp_path / "alone")
    run(tmp_path / "alone")
    others = [build] if name == "build" else [remove, grow, index_again]
    refusals = []

    def write():
        lock = FileLock(tmp_path / "s" / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            is_writing = len(refusals) < 12
        else:
            is_writing = False
            lock.release()
        for other in others if is_writing else ():
            with pytest.raises(DatastoreError, match="another process"):
                other(tmp_path / "s")
            refusals.append(other)
            tried("two writers")

    with Faults(between=write).armed():
        run(tmp_path / "s")
    assert refusals
    assert look(tmp_path / "s") == look(tmp_path / "alone")


def damage_every_file(folder, look):
    """Change each file in several ways: it is refused in one line, or nothing has changed."""
    whole, refusals = look(folder), 0
    ignored = {".lock", "README.md"}  # which nothing reads
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in ignored):
        data = file.read_bytes()
        for what, changed in faults.damaged(data):
            file.write_bytes(changed)
            tried("damaged files")
            try:
                found = look(folder)
            except KNNLMError as error:
                refusals += 1
                found = whole if "\n" not in str(error) else str(error)
            assert found == whole, (file.name, what)
        file.write_bytes(data)
    assert refusals
    assert look(folder) == whole


def test_damaged_files_of_a_store(tmp_path):
    with_indexes(tmp_path / "s")
    damage_every_file(tmp_path / "s", state)


def test_damaged_files_of_a_head(tmp_path):
    head().save_pretrained(tmp_path / "head")
    damage_every_file(tmp_path, head_state)


def test_damaged_files_of_a_checkpoint(tmp_path):
    build(tmp_path / "s")
    checkpoint = tmp_path / "s" / "checkpoint"

    def trained(folder):
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.copytree(folder, checkpoint)
        train(tmp_path / "s")
        return TRAINED[-1]

    count = faults.operations(lambda: train(tmp_path / "s"))
    shutil.rmtree(checkpoint)
    with pytest.raises(Killed), Faults("kill", count - 3).armed():
        train(tmp_path / "s")
    checkpoint.rename(tmp_path / "kept")
    damage_every_file(tmp_path / "kept", trained)


@pytest.mark.parametrize("fails", ["create_repo", "upload_folder"])
@pytest.mark.parametrize("what", ["store", "head", "model"])
def test_a_push_that_fails(fails, what, tmp_path, monkeypatch):
    """One line, no temporary folder left, nothing here changed; and it can be done again."""
    build(tmp_path / "s")
    knn = KNNLMForCausalLM(MODEL, KNNMemory(tmp_path / "s", k=2, index="exact"), lmbda=0.5)
    pushed = {"store": Datastore.open(tmp_path / "s"), "head": head(), "model": knn}[what]
    uploads = []

    class Hub:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            if fails == "create_repo" and not uploads:
                uploads.append(None)
                raise ConnectionError("the line is dead\nquite dead")
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path, **_):
            if fails == "upload_folder" and not uploads:
                uploads.append(None)
                raise ConnectionError("the line is dead\nquite dead")
            uploads.append({f.name for f in Path(folder_path).rglob("*") if f.is_file()})
            return "url"

    monkeypatch.setattr(persistence, "HfApi", Hub)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    before = state(tmp_path / "s")
    tried("push")
    with pytest.raises(KNNLMError, match="the line is dead") as caught:
        pushed.push_to_hub("me/it")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "tmp").iterdir())
    assert state(tmp_path / "s") == before
    assert pushed.push_to_hub("me/it") == "url"
    assert uploads[-1] > ({"manifest.json"} if what == "store" else {"config.json"})
    assert not list((tmp_path / "tmp").iterdir())


def tried(name):
    TRIED[name] = TRIED.get(name, 0) + 1


def refused(run, path):
    """One clear line; or success, where only deleting what is no longer needed failed."""
    try:
        run(path)
    except KNNLMError as error:
        message = str(error)
    else:
        return
    assert "\n" not in message
    assert any(reason in message for reason in ("No space left", "Read-only file system"))
