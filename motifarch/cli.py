"""The `motifarch` command: finds the subcommand, and prints users' errors as one line."""

import atexit
import difflib
import gc
import importlib
import io
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

import motifarch
from motifarch.die_with_parent import die_with_launcher
from motifarch.errors import DISK_ERRORS, PATH_ERRORS, UserError, one_line, tell_torchrun

COMMANDS = {
    "recipes": ("motifarch.commands.recipes", "list the recipes that come with the package"),
    "recipes copy": ("motifarch.commands.copy_recipe", "copy one, to change it"),
    "data prepare": ("motifarch.data.prepare", "turn text into packed token blocks"),
    "data merge": ("motifarch.commands.data_merge", "join what several machines prepared"),
    "data prove": ("motifarch.commands.data_prove", "show that one row is in prepared data, without the rest"),
    "tokenizer train": ("motifarch.commands.tokenizer_train", "train a vocabulary: BPE, or SuperBPE across words"),
    "tokenizer extend": ("motifarch.commands.tokenizer_extend", "add tokens to a vocabulary that exists"),
    "tokenizer measure": ("motifarch.commands.tokenizer_measure", "compare tokenizers on the same text"),
    "plan": ("motifarch.commands.plan", "say what a recipe needs on a number of GPUs"),
    "train": ("motifarch.train.main", "train a model as a recipe says"),
    "runs": ("motifarch.commands.runs", "compare runs, in a table and a plot"),
    "average": ("motifarch.commands.average", "average a run's last checkpoints"),
    "verify": ("motifarch.commands.verify", "check that a run's weights come from its seed, data and recipe"),
    "export": ("motifarch.commands.export", "turn a checkpoint into a Hugging Face folder"),
    "generate": ("motifarch.commands.generate", "sample text from a folder"),
    "serve": ("motifarch.commands.serve", "answer chats over HTTP, as OpenAI's interface has them"),
    "eval": ("motifarch.commands.evaluate", "score a folder on lm-eval's tasks"),
    "grow": ("motifarch.commands.grow", "make a larger model that starts as the same function"),
    "benchmark head-ratio": ("motifarch.study.main", "compare head ratios at equal cost, over seeds"),
    "benchmark report": ("motifarch.commands.report", "write the report of a head-ratio study's results again"),
}
"""In the order of use: the module whose `main` a command is, and what it does."""
_MOVED = {"benchmark all": "python -m benchmarks.run --output DIR"}
_LONGEST = 4000  # of a message, which may repeat what was given
_LOST_PEER = re.compile(r"connection (closed|reset|refused)|broken pipe|socket|remote process exited", re.IGNORECASE)


def usage() -> str:
    """The overview that `motifarch --help` prints."""
    lines = [f"  motifarch {name:<22}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: motifarch COMMAND ...\n\ncommands, in the order of use:",
            *lines,
            "\nexamples:",
            "  motifarch data prepare --source stdlib --output data/stdlib",
            "  motifarch train tiny_cpu",
            "  motifarch export runs/tiny_cpu",
            "  motifarch generate runs/tiny_cpu/export --prompt 'import os'",
            "\nEach command explains itself with --help; motifarch --version says which this is.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and exits: 0 done, 2 an error that the user can mend, 130 interrupted, 1 one
    that nobody foresaw, of which a file then has the whole trace.
    """
    die_with_launcher()
    atexit.register(gc.freeze)  # the interpreter's end would search all that was imported for cycles, for seconds
    if isinstance(sys.stdout, io.TextIOWrapper):  # text that the terminal's encoding lacks ends no command
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = run(arguments)
    except UserError as error:
        _fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except SystemExit:
        raise
    except BrokenPipeError:
        # head, or less, has seen enough; Python must not try to flush once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in DISK_ERRORS | PATH_ERRORS or error.filename is None:
            _stop(error, arguments)
        name = os.fsdecode(error.filename)
        _fail(f"error: {name}: {error.strerror}; check its permissions and the space there, or name another place", 2)
    except BaseException as error:  # a panic in a library of Rust is no Exception
        _stop(error, arguments)
    sys.exit(status)


def _stop(error: BaseException, arguments: list[str]) -> NoReturn:
    """The last resort, for an error that nobody foresaw."""
    if _distributed() and _LOST_PEER.search(str(error)):
        _fail(f"error: rank {_rank()} lost another rank, whose own message says why", 1, wait=False)
    _fail(f"error: {_unforeseen(error, arguments)}", 1, wait=False)


def _unforeseen(error: BaseException, arguments: list[str]) -> str:
    """An error in one line, with the file that has the whole trace."""
    reason = one_line(error)
    trace = f"motifarch {' '.join(arguments)}\n\n{''.join(traceback.format_exception(error))}"
    try:
        # A new file of a name that nobody can foresee, for this user alone: no link is followed.
        with tempfile.NamedTemporaryFile(
            "w", prefix="motifarch-error-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(trace)
        return f"{reason} (unforeseen; the whole trace is in {file.name}, for a report)"
    except OSError as unwritten:
        return f"{reason} (unforeseen; its trace can't be written either: {unwritten.strerror})"


def run(argv: list[str]) -> int:
    """Dispatches to a command's own `main(argv)` and returns its exit status.

    Raises:
        UserError: there is no such command.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"motifarch {motifarch.__version__}")
        return 0
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in _MOVED:
            raise UserError(f"`motifarch {name}` is now `{_MOVED[name]}`, in a clone of the repository")
        if name in COMMANDS:
            return importlib.import_module(COMMANDS[name][0]).main(argv[words:]) or 0
    of_two_words = {name.split()[0] for name in COMMANDS if " " in name}
    if argv[0] in of_two_words and (len(argv) == 1 or argv[1] in ("-h", "--help")):
        print(usage())
        return 0
    given = " ".join(argv[:2]) if argv[0] in of_two_words else argv[0]
    close = difflib.get_close_matches(given, COMMANDS, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UserError(f"unknown command {given!r}{hint} (the commands are {', '.join(COMMANDS)})")


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _distributed() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _fail(message: str, status: int, wait: bool = True) -> NoReturn:
    """Prints a message once for all ranks and exits.

    Most errors meet every rank, and rank 0 speaks for all. The others leave it a moment: torchrun
    ends them once rank 0 is gone, so one that is still alive failed alone, and speaks for itself.
    """
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    if _distributed():
        if wait and _rank():
            time.sleep(2)
        tell_torchrun(message)
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if _distributed():
        # A background save or another rank may never answer again: leave without asking.
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
