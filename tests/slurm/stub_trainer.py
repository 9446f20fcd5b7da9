"""Stands in for `python -m pretrain train`: the same signals, files and exit codes, and no torch.

What it does, and which faults happen, is in RUN/stub.json:

    {"steps": 40, "interval": 10, "step_s": 0.1, "saves": true, "import_life": 0, "hold_lives": 0,
     "faults": [{"life": 1, "rank": 1, "step": 5, "code": 74, "say": "the last line"}]}

A fault without "life" happens in every life, one with "node" only there, and one with "once" at the
first chance alone. The life `import_life` imports until a signal has come, and the first
`hold_lives` lives do nothing from step 15 on until they are asked to stop: however slow the machine
is, they are there to be stopped.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

if "evaluate" in sys.argv:
    print(json.dumps({"checkpoint": sys.argv[-1], "loss": 1.5}))
    sys.exit()
HOLD = 15
run = Path(os.environ["XLSTM_RUN"])
rank, node = int(os.environ["RANK"]), os.environ["SLURMD_NODENAME"]
plan = {"steps": 40, "interval": 10, "step_s": 0.1, "saves": True, "faults": []}
plan |= {"import_life": 0, "hold_lives": 0}
plan |= json.loads((run / "stub.json").read_text())
life = 0
asked = []


def replace(path, value):
    temporary = path.with_name(f"{path.name}.{rank}.tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def newest_life():
    return max(int(path.name[5:]) for path in (run / "slurm").glob("life-*"))


def newest():
    names = sorted(path.parent.name for path in run.glob("checkpoints/step-*/manifest.json"))
    return int(names[-1].split("-")[1]) if names else 0


def save(step):
    if rank == 0 and plan["saves"]:
        folder = run / f"checkpoints/step-{step:08d}-{life:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / "manifest.json", {"complete": True, "step": step})


def fault(step):
    for number, one in enumerate(plan["faults"]):
        here = one.get("life", life) == life and one.get("rank", rank) == rank
        if here and one.get("node", node) == node and one.get("step", 1) == step:
            if one.get("once"):
                try:
                    (run / f"fault-{number}").touch(exist_ok=False)
                except FileExistsError:
                    continue
            print(one.get("say", "ValueError: what"), flush=True)
            if one["code"] < 0:
                os.kill(os.getpid(), -one["code"])
            sys.exit(one["code"])


while newest_life() == plan["import_life"] and not signal.sigpending():
    time.sleep(0.05)
numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
for number in numbers:
    signal.signal(number, lambda number, frame: asked.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
life, step = newest_life(), newest()
for folder in json.loads(os.environ.get("XLSTM_DATA_COPIES", "{}")).values():
    print(f"reads {folder}: {os.listdir(folder)}")
print(f"life {life} goes on from step {step}, port {os.environ['MASTER_PORT']}", flush=True)
while step < plan["steps"]:
    time.sleep(plan["step_s"])
    while life <= plan["hold_lives"] and step >= HOLD and not asked and newest_life() == life:
        time.sleep(0.05)
    step += 1
    if newest_life() > life:
        sys.exit(76)
    if rank == 0:
        state = {"step": step, "steps": plan["steps"], "step_seconds": plan["step_s"]}
        replace(run / "progress.json", {**state, "checkpoint_step": newest(), "life": life})
    if step % plan["interval"] == 0:
        save(step)
    fault(step)
    if asked and step < plan["steps"]:
        save(step)
        print(f"stopped after step {step}", flush=True)
        sys.exit(75)
save(step)
if rank == 0:
    replace(run / "summary.json", {"steps": step})
