"""The recipes that come with the package, by their names: `tiny_cpu`, `motif_2.6b/b200_64`."""

import re
from itertools import takewhile
from pathlib import Path

from motifarch.errors import UserError

FOLDER = Path(__file__).parent / "recipes"
# Studies, settings of other programs.
_OTHERS = ("study", "trainer")


def names() -> list[str]:
    """What `motifarch train` and `motifarch plan` take; a `base` only holds what others share."""
    found = [file.relative_to(FOLDER).with_suffix("") for file in sorted(FOLDER.rglob("*.yaml"))]
    return [str(name) for name in found if name.name != "base" and name.parts[0] not in _OTHERS]


def studies() -> list[str]:
    """What `motifarch benchmark head-ratio` takes."""
    return [f"study/{file.stem}" for file in sorted((FOLDER / "study").glob("*.yaml"))]


def summary(name: str) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = takewhile(lambda line: line.startswith("#"), (FOLDER / f"{name}.yaml").read_text("utf-8").splitlines())
    paragraph = takewhile(bool, (line.removeprefix("#").strip() for line in lines))
    sentence = re.split(r"\. (?=[A-Z])", " ".join(paragraph))[0].rstrip(".")
    return re.sub(r" \[\w+\]", "", sentence)  # marks of sources


def base_of(file: Path) -> Path | None:
    """The recipe that a packaged one builds on."""
    base = re.search(r"^base: *(\S+)", file.read_text("utf-8"), re.MULTILINE)
    return file.parent / base[1] if base else None


def locate(given: str, known: list[str]) -> Path:
    """The file that a command line gives by its path or by its name.

    Raises:
        UserError: no file, and no name of the known ones.
    """
    path = Path(given)
    try:
        if path.exists() or (path.suffix and given not in known):
            return path
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise UserError(f"there is no file {given}: {error.strerror}; give the path of a YAML file") from None
    if given in known:
        return FOLDER / f"{given}.yaml"
    raise UserError(f"there is no file {given}; give the path of a YAML file, or one of {', '.join(known)}")
