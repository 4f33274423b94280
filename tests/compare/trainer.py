"""Stands in for ``igpo-fast``: writes what a run writes, in no time. Reads nothing of the project, to start quickly.

    trainer.py FOLDER train|sft [--config FILE] section.key=value ...

FOLDER has NAME.yaml, the configuration of a run, and may have do.json: name of a run -> what it does instead of
training well. Each call appends what it does to FOLDER/calls, one line each.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def said(*words):
    with open(folder / "calls", "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def wait_for(path):
    for _ in range(1000):
        if path.exists():
            return
        time.sleep(0.01)
    sys.exit(f"error: {path.name} never came")


folder, command = Path(sys.argv[1]), sys.argv[2]
given = dict(text.partition("=")[::2] for text in sys.argv[3:] if "=" in text)
run = Path(given["run.dir"])
do = json.loads((folder / "do.json").read_text()) if (folder / "do.json").exists() else {}
if command == "sft":
    said("sft", given["train.seed"])
    if do.get(f"sft-{given['train.seed']}") == "slow":
        time.sleep(0.3)
    if do.get("sft") == "fail":
        sys.exit("Traceback\nerror: no warm start")
    sys.exit()

what = do.get(run.name, "")
if what == "refuse":
    sys.exit("error: no data")
if what == "crash":
    sys.exit("Traceback\nZeroDivisionError")
if what == "refused beside another":
    sys.exit("error: another process trains here\nstep 54/400, says the other\n")
run.mkdir(exist_ok=True)
(run / "config.yaml").write_text((folder / f"{run.name}.yaml").read_text())
metrics = run / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) - 1 if metrics.exists() else -1
said("train", run.name, "after", done, "threads", os.environ["OMP_NUM_THREADS"], "group", os.getpgrp())
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
steps, every = int(given["train.steps"]), int(given["eval.every"])
for step in range(done + 1, steps + 1):
    row = {"step": step, "time/step": 2.0, "tokens/rollout": 10, "tokens/packed": 5, "group/collapsed": 0.5}
    if step % every == 0 or step == steps:
        row |= {"eval/f1": int(given["train.seed"]) / 10 + step / 100, "eval/f1_se": 0.02, "eval/turns": 3.0}
    with metrics.open("a") as file:
        file.write(json.dumps(row) + "\n")
    if step != 1:
        continue
    if what == "fail":
        sys.exit("Traceback\nerror: out of memory; lower it\n")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "early":
        sys.exit()
    (folder / f"{run.name}.began").touch()
    if what.startswith(("wait for ", "interrupt with ")):
        wait_for(folder / f"{what.split()[-1]}.began")
    if what.startswith("interrupt"):
        for _ in range(2 if what == "interrupt twice" else 1):
            os.kill(os.getppid(), signal.SIGINT)
            while not stopped:
                time.sleep(0.01)
            stopped.clear()
        break
    if what == "until stopped":
        while not stopped:
            time.sleep(0.01)
        time.sleep(0.2)  # the step ends
        if len(stopped) > 1:
            said("asked again", run.name)
        break
else:
    sys.exit()
said("stopped", run.name)
sys.exit(130)
