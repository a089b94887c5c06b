"""Folders that are replaced all at once; what is not ours in them stays."""

import os
import shutil
from contextlib import suppress

import faults
import pytest
from faults import Faults, Killed

from knnlm_hf.errors import PersistenceError
from knnlm_hf.folders import filled_at_once, finish

OLD = {"a": "old a", "b": "old b", "sub/c": "old c", ".git/x": "theirs", "notes.txt": "theirs"}
NEW = {"a": "new a", "b": "new b", "sub/c": "new c", "sub/deep/d": "new d", "more/e": "new e"}


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def put(target, files=NEW):
    with filled_at_once(target) as folder:
        fill(folder, files)


def contents(folder):
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_text() for file in files}


@pytest.fixture
def target(tmp_path):
    fill(tmp_path / "home" / "target", OLD)
    return tmp_path / "home" / "target"


def test_files_are_replaced_and_others_stay(target):
    put(target)
    assert contents(target) == {**OLD, **NEW}
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    (target / "a").write_text("changed")
    assert finish(target) is False
    assert (target / "a").read_text() == "changed"


def test_a_new_folder(tmp_path):
    put(tmp_path / "some" / "where")
    assert contents(tmp_path / "some") == {f"where/{name}": text for name, text in NEW.items()}
    mask = os.umask(0)
    os.umask(mask)
    for path in (tmp_path / "some" / "where", tmp_path / "some" / "where" / "more"):
        assert path.stat().st_mode & 0o777 == 0o777 & ~mask


def test_by_hand_one_kill_within(target):
    """Of five files two are in their place: opening puts the others there."""
    fill(target / ".knnlm_hf-new", {"b": "new b", "sub/c": "new c", "more/e": "new e"})
    (target / "a").write_text("new a")
    assert finish(target) is True
    expected = {**OLD, "a": "new a", "b": "new b", "sub/c": "new c", "more/e": "new e"}
    assert contents(target) == expected
    assert not list(target.glob(".knnlm_hf-*"))


@pytest.mark.parametrize("again", ["opened", "the same", "something else"])
def test_killed_at_every_operation(target, tmp_path, again):
    """As before or as after; and what follows does not depend on where it was killed."""
    shutil.copytree(target, tmp_path / "copy")
    seen = set()
    for at in range(1, faults.operations(lambda: put(tmp_path / "copy")) + 1):
        place = tmp_path / f"{again} {at}"
        shutil.copytree(target, place)
        with pytest.raises(Killed), Faults("kill", at).armed():
            put(place)
        if again == "opened":
            finish(place)
        else:
            put(place, NEW if again == "the same" else {"b": "third"})
        for leftover in place.glob(".knnlm_hf-unfinished-*"):
            shutil.rmtree(leftover)
        if again == "opened":
            assert contents(place) in (OLD, {**OLD, **NEW})
            seen.add(contents(place)["a"])
        elif again == "the same":
            assert contents(place) == {**OLD, **NEW}
        else:
            assert contents(place) in ({**OLD, "b": "third"}, {**OLD, **NEW, "b": "third"})
    assert again != "opened" or seen == {"old a", "new a"}


@pytest.mark.parametrize("kind", ["full", "readonly"])
def test_a_disk_that_fails(target, tmp_path, kind):
    shutil.copytree(target, tmp_path / "copy")
    for at in range(1, faults.operations(lambda: put(tmp_path / "copy")) + 1):
        place = tmp_path / f"{kind} {at}"
        shutil.copytree(target, place)
        reason = None
        try:
            with Faults(kind, at).armed():
                put(place)
        except PersistenceError as error:
            reason = str(error)
        finish(place)
        kept = {name: text for name, text in contents(place).items() if name[0:2] != ".k"}
        assert kept == {**OLD, **NEW} or reason
        assert kept in (OLD, {**OLD, **NEW})
        assert reason is None or "No space left" in reason or "Read-only" in reason


def test_readers_beside_a_writer(target):
    """Whoever opens the folder meanwhile takes part in the replacement, and nobody is disturbed."""
    seen = []

    def read():
        finish(target)
        seen.append((target / "a").read_text() + (target / "sub" / "c").read_text())

    with Faults(between=read).armed():
        put(target)
    assert set(seen) == {"old aold c", "new anew c"}
    assert seen == sorted(seen, reverse=True)
    assert contents(target) == {**OLD, **NEW}


def test_two_writers(target, monkeypatch):
    """One puts its files there just before the other's rename: the later one's stay."""
    real, others = os.replace, [{"a": "third a"}]

    def replace(source, place):
        if others:
            fill(target / ".knnlm_hf-new", others.pop())
        real(source, place)

    monkeypatch.setattr(os, "replace", replace)
    put(target, {"b": "new b"})
    assert contents(target) == {**OLD, "a": "third a", "b": "new b"}


@pytest.mark.parametrize(
    ("files", "refusal"),
    [
        ({"a/x": ""}, "a: a file is in the way, expected a folder"),
        ({"sub": ""}, "sub: a folder is in the way, expected a file"),
        ({"sub/c/x": ""}, "c: a file is in the way, expected a folder"),
        ({"link/x": ""}, "link: a link is in the way, expected a folder"),
    ],
)
def test_what_is_in_the_way(target, tmp_path, files, refusal):
    """Refused before anything is replaced."""
    (tmp_path / "elsewhere").mkdir()
    (target / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PersistenceError, match=refusal):
        put(target, {"b": "new b", **files})
    assert contents(target) == OLD
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not list(target.glob(".knnlm_hf-*"))


def test_a_file_that_is_a_link_is_replaced_not_followed(target, tmp_path):
    (tmp_path / "blob").write_text("shared")
    (target / "a").unlink()
    (target / "a").symlink_to(tmp_path / "blob")
    put(target)
    assert contents(target) == {**OLD, **NEW}
    assert (tmp_path / "blob").read_text() == "shared"


@pytest.mark.parametrize("how", ["the new files", "a folder of them", "the folder they go to"])
def test_a_strangers_links_lead_nowhere(target, tmp_path, how):
    outside = tmp_path / "outside"
    fill(outside, {"x": "mine"})
    new = target / ".knnlm_hf-new"
    if how == "the new files":
        new.symlink_to(outside)
    elif how == "a folder of them":
        new.mkdir()
        (new / "sub").symlink_to(outside)
    else:
        fill(new, {"link/x": "theirs", "link/y": "theirs"})
        (target / "link").symlink_to(outside)
    with suppress(PersistenceError):
        finish(target)
    assert contents(outside) == {"x": "mine"}


def test_nothing_of_it_is_pushed(target, monkeypatch):
    """A folder whose saving was interrupted is finished first, and leftovers stay here."""
    from knnlm_hf import persistence

    class Hub:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, **options):
            return contents(target), options["ignore_patterns"]

    monkeypatch.setattr(persistence, "HfApi", Hub)
    fill(target / ".knnlm_hf-new", {"a": "new a"})
    found, ignored = persistence.push_folder(target, "me/it", "model", ignore_patterns=["*.x"])
    assert found == {**OLD, "a": "new a"}
    assert ignored == ["*.x", ".knnlm_hf-*"]
