"""A Slurm of one file: sbatch, squeue, sacct, scontrol, scancel and srun on a JSON state.

``FAKE_SLURM`` names a folder: ``jobs.json`` holds the jobs, ``faults.json`` what a command does
instead of its work. Jobs run when a test says so, never by themselves.
"""

import fcntl
import json
import os
import re
import sys
import time
from pathlib import Path

HOME = Path(os.environ["FAKE_SLURM"])


def load(name, default):
    path = HOME / name
    return json.loads(path.read_text()) if path.exists() else default


def save(jobs):
    new = HOME / f"jobs.{os.getpid()}"
    new.write_text(json.dumps(jobs))
    new.rename(HOME / "jobs.json")


def fail(message, status=1):
    print(message, file=sys.stderr)
    sys.exit(status)


def sbatch(argv):
    script = Path(argv[-1]).read_text()
    (HOME / "sbatch.log").open("a").write(script + "\n---\n")
    fault = load("faults.json", {}).get("sbatch")
    if fault == "timeout":
        fail("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    if fault == "rejected":
        fail("sbatch: error: Batch job submission failed: Invalid partition name specified")
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script, re.MULTILINE))
    first, last = map(int, re.match(r"'?(\d+)-(\d+)", options["array"]).groups())
    jobs = load("jobs.json", [])
    limit = load("faults.json", {}).get("max_submit")
    if limit is not None and sum(map(queued, jobs)) + last + 1 - first > limit:
        fail(
            "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: "
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
        )
    if last >= load("faults.json", {}).get("max_array_size", 1001):
        fail("sbatch: error: Batch job submission failed: Invalid job array specification")
    main = max((j["main"] for j in jobs), default=100) + 1
    for index in range(first, last + 1):
        jobs.append(
            {
                "main": main,
                "index": index,
                "name": options["job-name"],
                "state": "PENDING",
                "reason": "Priority",
                "script": script,
                "end": None,
            }
        )
    save(jobs)
    if fault == "timeout_accepted":
        fail("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    print(f"Submitted batch job {main}")


def queued(job):
    return job["state"] in ("PENDING", "RUNNING") and not job.get("purged")


def broken(name):
    fault = load("faults.json", {}).get(name)
    if fault == "down":
        fail(f"{name}: error: Unable to contact slurm controller (connect failure)")
    if fault == "garbage":
        print("\x00\x01 something | else")
        sys.exit(0)
    if fault == "truncated":
        sys.stdout.write("10")
        sys.exit(0)
    if fault == "hang":
        time.sleep(60)
    if fault == "off":
        fail("Slurm accounting storage is disabled")


def selected(argv):
    names = next((a[7:].split(",") for a in argv if a.startswith("--name=")), None)
    jobs = [a[7:] for a in argv if a.startswith("--jobs=")]
    for j in load("jobs.json", []):
        job_id = str(j["main"]) if j["index"] is None else f"{j['main']}_{j['index']}"
        if (names is None or j["name"] in names) and (not jobs or job_id in jobs):
            yield job_id, j


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
    for job_id, j in selected(argv):
        if not j.get("unaccounted"):
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
        update(argv[1:], "PENDING")


def scancel(argv):
    broken("scancel")
    update([a for a in argv if not a.startswith("-")], "CANCELLED by 0")


def update(ids, state):
    jobs = load("jobs.json", [])
    for j in jobs:
        if f"{j['main']}_{j['index']}" in ids or str(j["main"]) in ids:
            j["state"] = state
    save(jobs)


def srun(argv):
    while argv[0].startswith("-"):
        argv = argv[2:] if argv[0] in ("--output", "--error") else argv[1:]
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    command = Path(sys.argv[1]).name
    with open(HOME / "lock", "a") as lock:
        if command in ("sbatch", "scancel", "scontrol"):
            fcntl.flock(lock, fcntl.LOCK_EX)
        globals()[command](sys.argv[2:])
