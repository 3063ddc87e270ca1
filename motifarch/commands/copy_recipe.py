"""`motifarch recipes copy`: a recipe that comes with the package as files of your own."""

from collections.abc import Sequence
from pathlib import Path

from motifarch import packaged_recipes
from motifarch.command_line import Parser, option, path
from motifarch.errors import UserError
from motifarch.field_types import FilePath
from motifarch.files import atomic_write


def copy(name: str, folder: Path) -> list[Path]:
    """Copies a recipe and the recipes that it builds on into a folder, under their names.

    Returns:
        The files, the recipe itself first. Those that are there already and the same are left.

    Raises:
        UserError: no such recipe, or a file of another content is in the way.
    """
    texts = {folder / file.relative_to(packaged_recipes.FOLDER): file.read_text("utf-8") for file in _files(name)}
    for target, text in texts.items():
        if target.exists() and not (target.is_file() and target.read_bytes() == text.encode()):
            raise UserError(f"{target} is there already and differs from the recipe; move it away, or give another DIR")
    try:
        for target, text in texts.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target) as file:
                file.write(text)
    except OSError as error:
        raise UserError(f"can't write {error.filename or folder}: {error.strerror}; give another DIR") from None
    return list(texts)


def _files(name: str) -> list[Path]:
    """The recipe's file and those of its bases."""
    known = [*packaged_recipes.names(), *packaged_recipes.studies()]
    if name not in known:
        raise UserError(f"there is no recipe {name!r}; give one of {', '.join(known)}")
    files = [packaged_recipes.FOLDER / f"{name}.yaml"]
    while base := packaged_recipes.base_of(files[-1]):
        files.append(base)
    return files


def main(argv: Sequence[str] | None = None) -> int:
    """Copies a recipe as a command line says.

    Raises:
        UserError: no such recipe, or a file of another content is in the way.
    """
    parser = Parser(
        prog="motifarch recipes copy",
        description="Copy a recipe, and those that it builds on, to change them.",
        examples=[
            "motifarch recipes copy tiny_cpu                       # recipes/tiny_cpu.yaml",
            "motifarch recipes copy motif_2.6b/b200_64 my_recipes  # and the base.yaml that it builds on",
        ],
    )
    parser.add_argument("name", type=option(FilePath), metavar="NAME", help="as `motifarch recipes` lists them")
    parser.add_argument("folder", type=path, nargs="?", default=Path("recipes"), metavar="DIR", help="default: recipes")
    arguments = parser.parse_args(argv)
    made = copy(arguments.name, arguments.folder)
    for file in made:
        print(file)
    command = "benchmark head-ratio" if arguments.name in packaged_recipes.studies() else "train"
    print(f"next: motifarch {command} {made[0]}" + (" --output DIR" if command != "train" else ""))
    return 0
