"""Copies on disk of what commands and recipes name by a URL: runs, checkpoints, first weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from motifarch.errors import UserError
from motifarch.files import remove
from motifarch.storage import explained
from motifarch.train.remote_run import RemoteRun
from motifarch.train.run_folder import METRICS, RECORD


def fetch_run(url: str, output: Path, *, last: int = 1) -> Path:
    """Copies a run's newest complete checkpoints, or the one that a URL names, with record and
    figures, into a folder as the run's on disk.

    Returns:
        That folder, or the one checkpoint's in it.

    Raises:
        UserError: nothing complete is there, or it can't be read.
    """
    remote = RemoteRun(url)
    with explained(url):
        there = remote.complete()
    found: list[Path] = []
    for step in there:
        if len(found) == last:
            break
        print(f"fetching {remote.name(step)}", flush=True)
        try:
            found.append(remote.fetch(step, output))
        except ValueError as error:
            print(f"warning: passing over the checkpoint {remote.name(step)}: {error}")
    if not found:
        raise UserError(
            f"{url} holds no complete checkpoint; give the URL of a run's folder (that of checkpoint.mirror), or of "
            "a checkpoint in it"
        )
    remote.fetch_record(output)
    return output if remote.only is None else found[0]


def fetch_folder(url: str, output: Path) -> Path:
    """Copies what `run.init_from` may name into a folder: a run's newest checkpoint, one
    checkpoint, or a Hugging Face folder.

    Returns:
        The checkpoint's folder, or the Hugging Face one.

    Raises:
        UserError: nothing of the kind is there, or it can't be read.
    """
    remote = RemoteRun(url)
    remove(output)
    with explained(url):
        names = [name for name in remote.fs.find(remote.root) if "/" not in _within(remote.root, name)]
        if remote.only is None and "config.json" in [_within(remote.root, name) for name in names]:
            print(f"fetching {url}", flush=True)
            output.mkdir(parents=True)
            for name in names:
                remote.fs.get_file(name, str(output / _within(remote.root, name)))
            return output
    found = fetch_run(url, output)
    return found if remote.only is not None else next((found / "checkpoints").iterdir())


def _within(root: str, name: str) -> str:
    return name.removeprefix(root).strip("/")


@contextmanager
def fetched_run(url: str, *, near: Path, last: int = 1) -> Iterator[Path]:
    """A copy as `fetch_run` makes it, for a while, on the disk of a path.

    Raises:
        UserError: as `fetch_run`.
    """
    near.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=near.parent, prefix=f".{near.name}.fetched-") as folder:
        remote = RemoteRun(url)
        yield fetch_run(url, Path(folder) / (remote.url.rpartition("/")[2] or "run"), last=last)


def fetch_figures(url: str, output: Path) -> Path:
    """Copies the records and figures of the runs at a URL into a folder, which is laid out alike.

    Returns:
        That folder.

    Raises:
        UserError: it can't be read.
    """
    remote = RemoteRun(url)
    with explained(url):
        for path in remote.fs.find(remote.root):
            name = _within(remote.root, path)
            if Path(name).name in (RECORD, METRICS):
                copy = output / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                remote.fs.get_file(path, str(copy))
    return output
