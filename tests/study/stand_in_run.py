"""A run's process without training: writes what a run leaves, and does what `behaviour.json` beside
the study says.

python stand_in_run.py RUN STAGE
"""

import faulthandler
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

FOLDER, STAGE = Path(sys.argv[1]), sys.argv[2]
STUDY = next(p for p in FOLDER.parents if (p / "study.json").exists())
LOG = STUDY.parent / "starts.jsonl"


def main() -> None:
    recipe = yaml.safe_load((FOLDER / "recipe.yaml").read_text())
    steps, rate = recipe["run"]["steps"], recipe["optim"]["lr"]
    variant = FOLDER.parent.name
    with LOG.open("a") as file:
        begun = {"run": str(FOLDER.relative_to(STUDY)), "stage": STAGE, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
        file.write(json.dumps(begun | {"threads": os.environ["OMP_NUM_THREADS"]}) + "\n")
    path = STUDY.parent / "behaviour.json"
    do = json.loads(path.read_text()).get(variant) if path.exists() else None
    if do == "error":
        print("Traceback ...\nerror: the disk is full")
        sys.exit(2)
    if do == "hang":
        faulthandler.dump_traceback_later(0.05, exit=True)
        time.sleep(30)
    if do == "quit":
        sys.exit(1)
    if do == "out of memory":
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "interrupt":
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(30)
    if do == "together":
        # Goes on only while another run is at work.
        deadline = time.monotonic() + 120
        while len(LOG.read_text().splitlines()) < 2:
            if time.monotonic() > deadline:
                sys.exit("alone")
            time.sleep(0.02)
    if STAGE == "measure":
        (FOLDER / "measured.json").write_text("{}")
        return
    # The best rate is 0.004.
    loss = None if do == "diverge" else 3.0 + abs(rate - 0.004) * 100
    rows = [{"step": s, "loss": loss, "grad_norm": 1.0, "tokens_per_second": 100.0} for s in range(1, steps + 1)]
    rows[-1]["validation_loss"] = loss
    (FOLDER / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


main()
