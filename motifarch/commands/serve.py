"""`motifarch serve`: transformers' own server, which then knows motifarch's models."""

from collections.abc import Sequence
from pathlib import Path

from motifarch.command_line import Parser, loading, path
from motifarch.errors import UserError
from motifarch.model_folder import read_object

_EPILOG = """\
Options are those of `transformers serve`, after the folder; `transformers serve --help` lists them.
Ask it with any client of OpenAI's interface; "model" is FOLDER as it was given here, or left out:

  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Hello"}]}'

A folder exported --with-code needs no motifarch: transformers serve FOLDER --trust-remote-code
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: imports motifarch's models and hands over to ``transformers serve``.

    Raises:
        UserError: the folder is none, or of a patched model for continuous batching; or
            transformers' serving extra is not installed.
    """
    parser = Parser(
        prog="motifarch serve",
        usage="motifarch serve FOLDER [options of transformers serve]",
        description=__doc__,
        epilog=_EPILOG,
        examples=[
            "motifarch serve runs/tiny_cpu/export --port 8000",
            "motifarch serve model --continuous-batching --dtype bfloat16",
        ],
    )
    parser.add_argument("folder", type=path, help="a folder that motifarch export wrote, or any language model's")
    arguments, options = parser.parse_known_args(argv)
    folder: Path = arguments.folder
    with loading():
        from transformers.utils.import_utils import is_serve_available

        import motifarch.models  # noqa: F401  # it and the next make their models known to the Auto classes
        from motifarch.inference.generate import check_folder
        from motifarch.integrations.configuration import MODEL_TYPE as PATCHED
    check_folder(folder)
    if "@" in str(folder):
        raise UserError(f"{folder} has an @ in its name, which the server takes for a revision; rename it")
    if "--continuous-batching" in options and read_object(folder / "config.json").get("model_type") == PATCHED:
        raise UserError(
            f"{folder} is of a patched model, whose attention continuous batching does not serve; "
            "leave --continuous-batching out"
        )
    if not is_serve_available():
        raise UserError("serving needs fastapi, uvicorn and openai: pip install 'motifarch[serve]'")
    from transformers.cli.transformers import app  # it imports what the extra brings

    app(["serve", str(folder), *options], prog_name="motifarch")
    return 0
