"""Install a wheel into an empty folder and import every module of the source tree from it.

Run by `make wheel`. It catches a wheel that lost a subpackage, which tests of the tree cannot.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src"
_IMPORT_ALL = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.argv[1]), (name, module.__file__)
print("imported", len(sys.argv) - 2, "modules of the wheel")
"""


def main(wheel: str) -> None:
    files = (path for path in SOURCE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    expected = {str(path.relative_to(SOURCE)) for path in files}  # data files too
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        missing = expected - set(archive.namelist())
        if missing:
            sys.exit(f"the wheel lacks {', '.join(sorted(missing))}")
        archive.extractall(folder)
        modules = [
            name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for name in sorted(expected)
            if name.endswith(".py")
        ]
        subprocess.run([sys.executable, "-c", _IMPORT_ALL, folder, *modules], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
