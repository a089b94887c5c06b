"""The shape of the package: floors, lazy names, annotations that ship."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import knnlm_hf

SOURCE = Path(knnlm_hf.__file__).parent

# From the ground up. A room may import those before it, and itself; nothing above.
ROOMS = [
    "errors", "types", "interpolation", "progress", "parallel", "folders", "persistence",
    "untrusted", "windows", "texts", "corpus", "capture", "forwards", "identity", "loading",
    "datastore", "index", "memory", "modeling", "build", "scores", "scoring", "tuning", "sources",
    "inspection", "demo", "study", "cli",
]  # fmt: skip


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports anywhere in it, function bodies and TYPE_CHECKING included."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "knnlm_hf":
                names = [f"knnlm_hf.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "knnlm_hf" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms


def public_home(name: str) -> str:
    """The room of `name`, where a file imports it from the package itself."""
    return knnlm_hf._HOMES.get(name, name)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.name)
def test_imports_point_downward(path):
    relative = path.relative_to(SOURCE)
    room = relative.parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in ROOMS, f"{room} has no floor: add it to ROOMS"
    for other in imported_rooms(path):
        target = public_home(other)
        if target == "__version__":
            continue
        assert ROOMS.index(target) <= ROOMS.index(room), f"{relative} imports {other} from above"


def test_importing_the_package_is_cheap():
    code = (
        "import sys, knnlm_hf; "
        "print([m for m in ('torch', 'faiss', 'transformers', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_exact_search_needs_no_faiss():
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "from knnlm_hf import KNNLMForCausalLM, KNNMemory, Datastore, score, tune"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", knnlm_hf.__all__)
def test_public_names_exist(name):
    assert getattr(knnlm_hf, name) is not None
    assert name in dir(knnlm_hf)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        knnlm_hf.no_such_name  # noqa: B018


def test_annotations_ship():
    assert (SOURCE / "py.typed").is_file()
