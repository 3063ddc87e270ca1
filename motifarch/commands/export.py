"""`motifarch export`: a checkpoint becomes a Hugging Face folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from motifarch.command_line import Parser, loading, option, path, path_or_url
from motifarch.errors import UserError
from motifarch.field_types import FilePath

DTYPES = ("float32", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of :func:`motifarch.export.export`."""
    parser = Parser(
        prog="motifarch export",
        description=__doc__,
        examples=[
            "motifarch export runs/tiny_cpu",
            "motifarch export runs/tiny_cpu --output model --dtype bfloat16 --with-code",
            "motifarch export runs/sft_tiny_cpu_lora --adapter",
            "motifarch export s3://bucket/tiny_cpu --output model",
            "motifarch export runs/tiny_cpu --with-code --push-to-hub USER/MODEL --private",
        ],
    )
    parser.add_argument(
        "source",
        type=path_or_url,
        help="a run's output folder, or one checkpoint's folder, on disk or as a URL (s3://...); with --with-code also "
        "a Motif model's Hugging Face folder, to which the code is added in place",
    )
    parser.add_argument("--output", type=path, help="folder to write (default: RUN/export)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the saved weights (default: float32)")
    parser.add_argument(
        "--tokenizer", type=option(FilePath), help="a tokenizer folder (default: that of the run's data)"
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a LoRA run: write the adapters alone, as a folder of peft's (default: RUN/adapter); without it they "
        "become part of the weights",
    )
    parser.add_argument(
        "--with-code",
        action="store_true",
        help="write the model code too (modeling_motif.py, plain PyTorch): the folder then loads without motifarch, by "
        "AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)",
    )
    parser.add_argument(
        "--push-to-hub", metavar="NAME", help="upload the folder to the Hugging Face Hub as USER/MODEL, or MODEL"
    )
    parser.add_argument("--private", action="store_true", help="with --push-to-hub: a new repository is private")
    arguments = parser.parse_args(argv)
    source: Path | str = arguments.source
    if arguments.push_to_hub is not None:
        from motifarch.export.hub import check_repository_name

        check_repository_name(arguments.push_to_hub)
    elif arguments.private:
        raise UserError("--private is given without --push-to-hub NAME; give both, or leave --private out")
    if isinstance(source, Path) and (source / "config.json").exists():
        _add_code_to_model(arguments)
        print(f"model code added to {source}: it loads without motifarch, with trust_remote_code=True")
        _push(source, arguments)
        return 0
    with loading():
        from motifarch.export import export
    folder = export(
        source,
        arguments.output,
        dtype=arguments.dtype or "float32",
        tokenizer=arguments.tokenizer,
        with_code=arguments.with_code,
        adapter=arguments.adapter,
    )
    if arguments.adapter:
        print(f"adapters exported to {folder}: peft.PeftModel.from_pretrained(model, FOLDER) adds them to their model")
        _push(folder, arguments)
        return 0
    with_what = "with trust_remote_code=True" if arguments.with_code else "after `import motifarch.models`"
    print(f"exported to {folder}: AutoModelForCausalLM.from_pretrained loads it {with_what}")
    _push(folder, arguments)
    return 0


def _push(folder: Path, arguments: argparse.Namespace) -> None:
    if arguments.push_to_hub is not None:
        from motifarch.export.hub import push_folder

        print(f"pushed to {push_folder(folder, arguments.push_to_hub, private=arguments.private)}")


def _add_code_to_model(arguments: argparse.Namespace) -> None:
    if not arguments.with_code:
        raise UserError(
            f"{arguments.source} is a Hugging Face folder already; add --with-code to make it load without motifarch"
        )
    for name in ("output", "dtype", "tokenizer"):
        if getattr(arguments, name) is not None:
            raise UserError(
                f"--{name} is for exporting a run; {arguments.source} is a Hugging Face folder, to which --with-code "
                f"adds the code in place: leave --{name} out"
            )
    with loading():
        from motifarch.portable import add_code
    add_code(arguments.source)
