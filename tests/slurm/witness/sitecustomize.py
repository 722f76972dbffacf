"""A slow file system, and a witness of who writes, in every process of ``chaos.py``.

Links and renames below ``CHAOS_ROOT`` take about ``CHAOS_SLOW_S`` longer, which stretches all the
moments between two records. A process that starts a generation of a run takes the run's lock before
that and keeps it while it lives, so that the kernel knows of two at once, whatever the records say.
"""

import fcntl
import os
import random
import re
import sys
import time

ROOT = os.environ.get("CHAOS_ROOT", "")
SLOW_S = float(os.environ.get("CHAOS_SLOW_S", "0"))
START = re.compile(r".*/runs/../([a-z2-7]{16})/metrics/[0-9]+\.jsonl")
_held = {}


def hook(event, args):
    if event not in ("os.link", "os.rename"):
        return
    target = os.fsdecode(args[1])
    if target.startswith(ROOT):
        time.sleep(random.uniform(0, 2 * SLOW_S))
        if event == "os.link" and (start := START.fullmatch(target)):
            witness(start[1])


def witness(run):
    lock = _held.setdefault(run, open(f"{ROOT}/witness/{run}", "w"))  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with open(f"{ROOT}/witness/violations", "a") as file:
            job = [os.environ.get(f"SLURM_ARRAY_{k}_ID", "?") for k in ("JOB", "TASK")]
            file.write(f"{run}: job {'_'.join(job)} starts while an older start is alive\n")


if ROOT:
    sys.addaudithook(hook)
