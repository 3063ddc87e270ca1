"""Unpacks the tests of the installed version of transformers into build/, from its source
distribution on the package index: python tests/transformers_suite/download.py
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    name = f"transformers-{version('transformers')}"
    folder = Path(__file__).parents[2] / "build" / name
    if folder.exists():
        return
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", work]
        subprocess.run([*pip, name.replace("-", "==")], check=True)
        with tarfile.open(next(Path(work).glob("*.tar.gz"))) as archive:
            members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
            archive.extractall(work, members, filter="data")
        unpacked = Path(work) / name
        (unpacked / "tests" / "__init__.py").touch()
        # What tests read beside them: the package, and a list of models on the hub, none of ours.
        (unpacked / "src").mkdir()
        package = find_spec("transformers")
        assert package is not None
        assert package.origin is not None
        (unpacked / "src" / "transformers").symlink_to(Path(package.origin).parent)
        (unpacked / "tests" / "utils").mkdir()
        (unpacked / "tests" / "utils" / "tiny_model_summary.json").write_text("{}")
        unpacked.rename(folder)


if __name__ == "__main__":
    main()
