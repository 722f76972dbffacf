"""A Slurm of one file: sbatch, squeue, sacct, scontrol, scancel and srun on a JSON state.

``FAKE_SLURM`` names a folder: ``jobs.json`` holds the jobs, ``faults.json`` what a command does
instead of its work. Jobs run when a test says so, never by themselves; the output of their ranks
goes where srun would write it, and ``ranks.log`` has the process of each.

Faults: of ``sbatch`` ``timeout`` (nothing accepted), ``timeout_accepted``, ``timeout_late`` (the
job waits in ``late.json`` until the test lets it arrive), ``rejected``, ``slow`` (answers after two
seconds) and ``slow_accepted`` (accepts first); of the others ``down``, ``garbage``, ``truncated``,
``empty``, ``hang`` and ``off``. ``max_submit`` and ``max_array_size`` are the cluster's limits.
"""

import contextlib
import fcntl
import json
import os
import re
import sys
import time
from pathlib import Path

HOME = Path(os.environ["FAKE_SLURM"])


@contextlib.contextmanager
def locked():
    """Nobody else changes the state meanwhile."""
    with open(HOME / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load(name, default):
    path = HOME / name
    return json.loads(path.read_text()) if path.exists() else default


def save(jobs):
    new = HOME / f"jobs.{os.getpid()}"
    new.write_text(json.dumps(jobs))
    new.rename(HOME / "jobs.json")


def fault(name):
    return load("faults.json", {}).get(name)


def fail(message, status=1):
    print(message, file=sys.stderr)
    sys.exit(status)


TIMED_OUT = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


def sbatch(argv):
    script = Path(argv[-1]).read_text()
    with open(HOME / "sbatch.log", "a") as log:
        log.write(script + "\n---\n")
    how = fault("sbatch")
    if how == "slow":
        time.sleep(2)
    if how == "timeout":
        fail(TIMED_OUT)
    if how == "rejected":
        fail("sbatch: error: Batch job submission failed: Invalid partition name specified")
    if how == "down":
        fail("sbatch: error: Unable to contact slurm controller (connect failure)")
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script, re.MULTILINE))
    first, last = map(int, re.match(r"'?(\d+)-(\d+)", options["array"]).groups())
    with locked():
        jobs, late = load("jobs.json", []), load("late.json", [])
        limit = fault("max_submit")
        if limit is not None and sum(map(queued, jobs)) + last + 1 - first > limit:
            fail(
                "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission "
                "failed: Job violates accounting/QOS policy (job submit limit, user's size and/or "
                "time limits)"
            )
        if last >= load("faults.json", {}).get("max_array_size", 1001):
            fail("sbatch: error: Batch job submission failed: Invalid job array specification")
        main = max((j["main"] for j in [*jobs, *late]), default=100) + 1
        array = [
            {
                "main": main,
                "index": index,
                "name": options["job-name"],
                "state": "PENDING",
                "reason": "Priority",
                "script": script,
                "exclude": options.get("exclude", "").strip("'"),
                "restart": 0,
                "end": None,
            }
            for index in range(first, last + 1)
        ]
        if how == "timeout_late":
            (HOME / "late.json").write_text(json.dumps([*late, *array]))
        else:
            save([*jobs, *array])
    if how == "slow_accepted":
        time.sleep(2)
    if how in ("timeout_accepted", "timeout_late"):
        fail(TIMED_OUT)
    print(f"Submitted batch job {main}")


def queued(job):
    return job["state"] in ("PENDING", "RUNNING") and not job.get("purged")


def broken(name):
    how = fault(name)
    if how == "down":
        fail(f"{name}: error: Unable to contact slurm controller (connect failure)")
    if how == "garbage":
        print("\x00\x01 something | else")
        sys.exit(0)
    if how == "truncated":
        sys.stdout.write("10")
        sys.exit(0)
    if how == "empty":
        sys.exit(0)
    if how == "hang":
        time.sleep(60)
    if how == "off":
        fail("Slurm accounting storage is disabled")


def id_of(job):
    return str(job["main"]) if job["index"] is None else f"{job['main']}_{job['index']}"


def value(argv, option):
    return next((a.partition("=")[2] for a in argv if a.startswith(f"--{option}=")), None)


def selected(argv):
    names, job = value(argv, "name"), value(argv, "jobs")
    for j in load("jobs.json", []):
        if (names is None or j["name"] in names.split(",")) and job in (None, id_of(j)):
            yield id_of(j), j


def squeue(argv):
    broken("squeue")
    for _, j in selected(argv):
        if j.get("purged"):
            continue
        if "--format=%T" in argv:
            print(j["state"])
        elif "--format=%i" in argv:
            if queued(j):
                print(j["main"])
        else:
            end = j["end"] or "N/A"
            index = "N/A" if j["index"] is None else j["index"]
            node = j.get("node", "")
            print(f"{j['main']}|{index}|{j['state']}|{end}|{j['reason']}|{node}|{j['name']}")


def sacct(argv):
    broken("sacct")
    since = value(argv, "starttime") or ""
    for job_id, j in selected(argv):
        if not j.get("unaccounted") and not (j["end"] and j["end"] < since):
            node = j.get("node", "None assigned")
            print(f"{job_id}|{j['state']}|{j['end'] or 'Unknown'}|{node}|{j['name']}")


def scontrol(argv):
    broken("scontrol")
    if argv[:2] == ["show", "config"]:
        print(
            "Configuration data as of now\nJobRequeue              = 1\nMaxArraySize            = "
            f"{load('faults.json', {}).get('max_array_size', 1001)}\nPreemptMode             = OFF"
        )
    if argv[0] == "requeue":
        update(argv[1:], state="PENDING", reason="BeginTime", restarts=1)


def scancel(argv):
    broken("scancel")
    update([a for a in argv if not a.startswith("-")], value(argv, "name"), "CANCELLED by 0")


def update(ids, name=None, state="", restarts=0, **values):
    with locked():
        jobs = load("jobs.json", [])
        for j in jobs:
            if ids and {id_of(j), str(j["main"])} & set(ids) and name in (None, j["name"]):
                j.update(values, state=state, restart=j.get("restart", 0) + restarts)
        save(jobs)


def srun(argv):
    numbers = {"%A": "SLURM_ARRAY_JOB_ID", "%a": "SLURM_ARRAY_TASK_ID", "%j": "SLURM_JOB_ID"}
    while argv[0].startswith("-"):
        if argv[0] in ("--output", "--error"):
            path = argv[1].replace("%t", "0")
            for letter, variable in numbers.items():
                path = path.replace(letter, os.environ.get(variable, ""))
            kind = 1 if argv[0] == "--output" else 2
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), kind)
        argv = argv[2:] if argv[0] in ("--output", "--error") else argv[1:]
    with open(HOME / "ranks.log", "a") as log:
        print(os.environ.get("FAKE_NUMBER"), os.getpid(), file=log)
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    globals()[Path(sys.argv[1]).name](sys.argv[2:])
