"""A checkpoint whose metadata is code, given to every command that reads one."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

from benchmarks.faults.starts import prepare_inputs, quick_train
from motifarch.files import sha256
from motifarch.train.manifest import checkpoint_name, read_manifest, write_manifest


class _Executes:
    """Unpickled, leaves a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


def try_pickles(folder: Path) -> dict[str, Any]:
    """Counts the commands that were tried, that executed it, and that did not refuse it."""
    recipe = prepare_inputs(folder, steps=4, every=2)
    run, hostile, proof = folder / "run", folder / "hostile", folder / "executed"
    first = quick_train(["train", str(recipe)], folder / "first.log")
    if first.wait(300) != 0:
        raise RuntimeError(f"the run failed: {first.log.read_text()[-2000:]}")
    shutil.copytree(run, hostile)
    for path in (hostile / "checkpoints").iterdir():
        _spoil(path, proof)
    newest = hostile / "checkpoints" / checkpoint_name(4)
    train = ["train", str(recipe), "--run.steps", "6"]
    commands = {
        "train, resuming by itself": [*train, "--run.output", str(hostile)],
        "train, run.resume": [*train, "--run.output", str(folder / "a"), "--run.resume", str(newest)],
        "train, run.init_from": [*train, "--run.output", str(folder / "b"), "--run.init_from", str(newest)],
        "export": ["export", str(hostile), "--output", str(folder / "c")],
        "average": ["average", str(hostile), "--output", str(folder / "d")],
    }
    executed, accepted = [], []
    for number, (name, arguments) in enumerate(commands.items()):
        status = quick_train(arguments, folder / f"{number}.log").wait(120)
        if proof.exists():
            executed.append(name)
            proof.unlink()
        if status == 0:
            accepted.append(name)
    counts = {"commands": len(commands), "executed": len(executed), "accepted": len(accepted)}
    faults = [f"{name} executed it" for name in executed] + [f"{name} took it" for name in accepted]
    return {"counts": counts, "faults": faults}


def _spoil(checkpoint: Path, proof: Path) -> None:
    """Puts code into a checkpoint's metadata, and makes the manifest agree."""
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = _Executes(proof)
    path.write_bytes(pickle.dumps(metadata))
    manifest = read_manifest(checkpoint)
    files = {
        name: {"size": (checkpoint / name).stat().st_size, "sha256": sha256(checkpoint / name)}
        for name in manifest["files"]
    }
    write_manifest(checkpoint, step=manifest["step"], about=manifest["about"], files=files)
