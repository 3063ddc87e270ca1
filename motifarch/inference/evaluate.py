"""A Hugging Face folder on lm-eval's tasks, or on your own."""

import difflib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import motifarch
from motifarch.errors import UserError
from motifarch.inference.generate import check_folder, load

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def evaluate(
    folder: Path,
    tasks: Sequence[str],
    *,
    limit: float | None = None,
    batch_size: int | str = 1,
    num_fewshot: int | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> dict[str, Any]:
    """Scores of a model, as lm-eval's ``simple_evaluate`` gives them.

    Log-likelihoods are summed in float32, whatever the model computes in.

    Args:
        folder: a Hugging Face folder: exported, released or any causal language model's.
        tasks: names of lm-eval's tasks, groups and tags (``mmlu_*`` for many), YAML files of tasks,
            or folders of them.
        limit: examples of each task, or below 1 a share of them; all by default.
        batch_size: rows at once, or "auto" for as many as the memory holds.
        num_fewshot: solved examples before each question; by default what each task says.
            (A task that says 0 keeps 0.)
        dtype: of the weights; "auto" leaves them as they are saved.
        device: default: the GPU if there is one.

    Returns:
        lm-eval's results: "results" by task and metric, "groups", "configs", "n-shot", "n-samples",
        "versions", ...

    Raises:
        UserError: lm-eval is missing, a task is unknown or cannot be loaded, or the folder does not
            load.
    """
    check_folder(folder)
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise UserError(
            f"motifarch eval needs lm-eval, which is not installed ({error}): pip install 'motifarch[eval]'"
        ) from None

    # Before the model, which may take minutes to load.
    manager = index_tasks(tasks)
    found = load_tasks(manager, resolve_tasks(manager, tasks))
    model, tokenizer = load(folder, dtype=dtype, device=device)
    logging.disable(logging.WARNING)  # lm-eval warns that a loaded model is no name of one
    try:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
    finally:
        logging.disable(logging.NOTSET)
    results = simple_evaluate(
        harness,
        tasks=found,
        task_manager=manager,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=str(model.device),
        limit=limit,
        log_samples=False,
    )
    return {"motifarch": motifarch.__version__, "folder": str(folder), **results}


def index_tasks(tasks: Sequence[str]) -> "TaskManager":
    """lm-eval's index of the tasks in files and folders, and of its own where a name may mean one.

    Raises:
        UserError: there is no such file.
    """
    from lm_eval.tasks import TaskManager

    paths = [Path(task) for task in tasks if _is_path(task)]
    # A group's file names its tasks, which may be its neighbours.
    folders = [str(path if path.is_dir() else path.parent) for path in paths if path.is_dir() or _is_group(path)]
    manager = TaskManager(include_path=folders, include_defaults=False)
    names = {task for task in tasks if not _is_path(task)} | _grouped(manager)
    if names <= set(manager.all_tasks):
        return manager
    with Console(stderr=True).status("indexing lm-eval's own tasks"):  # some 15,000: that takes seconds
        return TaskManager(include_path=folders)


def resolve_tasks(manager: "TaskManager", tasks: Sequence[str]) -> list[str]:
    """What to load, each once: names, and paths of YAML files; of a folder its groups and the tasks
    in none of them.

    Raises:
        UserError: there is no such task, or no task in a folder.
    """
    specs: list[str] = []
    for task in tasks:
        found = _in_files(manager, Path(task)) if _is_path(task) else manager.match_tasks([task])
        if not found:
            close = difflib.get_close_matches(task, manager.all_tasks, n=4, cutoff=0.5)
            hint = f"; close to it are {', '.join(close)}" if close else ""
            raise UserError(f"lm-eval has no task {task!r}{hint}; `lm-eval ls tasks` lists all")
        specs += found
    return list(dict.fromkeys(specs))


def load_tasks(manager: "TaskManager", specs: Sequence[str]) -> list[Any]:
    """Tasks and groups of them, with their data.

    Raises:
        UserError: some cannot be loaded, would run code that a model wrote, or are asked for twice.
    """
    found = [item for spec in specs for item in _load(manager, spec)]
    try:
        manager.load(found)
    except ValueError as error:
        raise UserError(f"a task is asked for twice, alone or in groups: {error}; name it once") from None
    return found


def _is_path(task: str) -> bool:
    return "/" in task or task.endswith((".yaml", ".yml")) or Path(task).is_dir()


def _is_group(file: Path) -> bool:
    try:
        return re.search(r"^group\s*:", file.read_text(encoding="utf-8"), re.MULTILINE) is not None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the task {file} cannot be read ({error}); give a YAML file, or a folder of them") from None


def _grouped(manager: "TaskManager") -> set[str]:
    """Names of tasks and groups that a group holds."""
    members = [member for name in manager.all_groups for member in (manager.task_index[name].cfg or {}).get("task", [])]
    names = [member.get("task") if isinstance(member, dict) else member for member in members]
    return {name for name in names if isinstance(name, str)}


def _in_files(manager: "TaskManager", path: Path) -> list[str]:
    """What the index has of a file or folder; else the file, for lm-eval to read."""
    files = {name: manager.task_index[name].yaml_path for name in manager.all_tasks}
    names = [name for name, file in files.items() if file and file.resolve().is_relative_to(path.resolve())]
    if not path.is_dir():
        return names or [str(path)]
    if not names:
        raise UserError(f"{path} holds no task that lm-eval can read: a .yaml file with `task: NAME` and its settings")
    grouped = _grouped(manager)
    return [name for name in names if name not in grouped]


def _load(manager: "TaskManager", spec: str) -> list[Any]:
    """The task, the group, or a tag's tasks."""
    try:
        loaded = manager.load([spec])
    except ConnectionError as error:
        raise UserError(
            f"task {spec!r} needs a data set from the Hugging Face Hub, which is out of reach ({error}): connect, or "
            "download it once where there is a network and take the cache along (HF_HOME)"
        ) from None
    except Exception as error:  # a task is code and settings of anybody's: errors of every kind
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"task {spec!r} cannot be loaded ({reason}); mend its settings or data, or leave it out"
        ) from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"task {name!r} runs code that the model writes, which motifarch eval does not; leave it out"
            )
    inner = {child for children in loaded.get("group_map", {}).values() for child in children}
    return [item for name, item in {**loaded.get("groups", {}), **loaded["tasks"]}.items() if name not in inner]
