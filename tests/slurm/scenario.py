"""What the scenarios share: the fake Slurm, processes that die, and jobs without processes."""

import fcntl
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from scaling.files import create_json, read_json, write_json
from scaling.rundir import RunDir, Superseded, append_line, chunk_folder
from scaling.slurm import job as job_module
from scaling.slurm.claims import claim
from scaling.slurm.job import BUDGET, EXIT_SUPERSEDED


def states(rows):
    return [r["state"] for r in rows]


def one_writer(runs):
    """Every run is done, and exactly one start of it ever wrote."""
    assert [r.result()["status"] for r in runs] == ["done"] * len(runs)
    assert [r.generations() for r in runs] == [[1]] * len(runs)


def whole(run):
    """Every step is in the curve once."""
    return [r["step"] for r in run.curve("train")] == list(range(1, run.spec().steps + 1))


def tree(root):
    """Every file and folder below, with when it was changed."""
    return {str(p): p.lstat().st_mtime_ns for p in root.rglob("*")}


def step(run):
    """Newest step in the metrics."""
    return (run.progress() or {"step": 0})["step"]


def written(run, generation):
    """Newest step that a generation computed."""
    lines = run.metrics_path(generation).read_text().splitlines()
    return max(row["step"] for row in map(json.loads, lines) if row["kind"] == "train")


def how(root, **settings):
    """How the stand-in trains from the next start on."""
    (root / "standin.json").write_text(json.dumps(settings))


def log(root, job, text):
    """A line in the log of a job's rank, as the system would leave it there."""
    folder = root / "sweeps/s/chunks" / job["name"]
    with open(folder / f"{job['main']}_{job['index']}_0_log.err", "a") as file:
        file.write(text + "\n")


def forked(action: Callable[[], object]) -> int:
    """Run ``action`` in a process of its own; returns its exit status."""
    if (child := os.fork()) == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class FakeSlurm:
    """The fake's state, and what a cluster would do by itself."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def jobs(self) -> list[dict]:
        path = self.home / "jobs.json"
        return json.loads(path.read_text()) if path.exists() else []

    def fault(self, **faults: object) -> None:
        (self.home / "faults.json").write_text(json.dumps(faults))

    def change(self, where: Callable[[dict], bool] = lambda job: True, **values: object) -> None:
        with open(self.home / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            jobs = self.jobs()
            for job in jobs:
                if where(job):
                    job.update(values)
            new = self.home / "jobs.new"
            new.write_text(json.dumps(jobs))
            new.rename(self.home / "jobs.json")

    def set(self, number: int, **values: object) -> None:
        """Change one job."""
        known = self.jobs()[number]
        which = (known["main"], known["index"])
        self.change(lambda j: (j["main"], j["index"]) == which, **values)

    def start(
        self, number: int, node: str = "node1", **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a job's script with a single rank, as Slurm would on a node."""
        job = self.jobs()[number]
        env = {**os.environ, "SLURM_JOB_ID": str(9000 + number), "SLURM_NTASKS": "1",
               "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": node,
               "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "FAKE_NUMBER": str(number),
               **environment}  # fmt: skip
        if job["index"] is None:
            env["SLURM_JOB_ID"] = str(job["main"])
        else:
            env |= {
                "SLURM_ARRAY_JOB_ID": str(job["main"]),
                "SLURM_ARRAY_TASK_ID": str(job["index"]),
            }
        if job.get("restart"):
            env["SLURM_RESTART_COUNT"] = str(job["restart"])
        self.set(number, state="RUNNING", reason="None", node=node)
        log = re.search(r"^#SBATCH --output=(.*)_0_log.out$", job["script"], re.MULTILINE)
        assert log
        place = log.group(1).replace("%A", str(job["main"])).replace("%a", str(job["index"]))

        def private(name: str, flags: int) -> int:
            return os.open(name, flags, 0o600)

        with (
            open(f"{place}_0_log.out", "a", opener=private) as out,
            open(f"{place}_0_log.err", "a", opener=private) as err,
        ):
            return subprocess.Popen(
                ["bash", "-c", job["script"]],
                env=env,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def end(self, number: int, process: subprocess.Popen[bytes]) -> int:
        """Wait for a job's end and record the state it ends in; returns its exit status."""
        process.wait(timeout=120)
        if self.jobs()[number]["state"] in ("RUNNING", "COMPLETING"):
            self.set(number, state="FAILED" if process.returncode else "COMPLETED")
        return process.returncode

    def run(self, number: int, node: str = "node1", **environment: str) -> int:
        """Execute one job from start to end."""
        return self.end(number, self.start(number, node, **environment))

    def rank(self, number: int) -> int:
        """Process of the newest rank of a job, once it is there."""
        for _ in range(200):
            log = self.home / "ranks.log"
            lines = log.read_text().splitlines() if log.exists() else []
            if own := [line.split()[1] for line in lines if line.split()[0] == str(number)]:
                return int(own[-1])
            time.sleep(0.02)
        raise AssertionError(f"job {number} starts no rank")

    def requeue(self, number: int) -> None:
        """As Slurm does by itself after a preemption or the loss of a node."""
        restart = self.jobs()[number].get("restart", 0) + 1
        self.set(number, state="PENDING", reason="BeginTime", restart=restart, node="")

    def finish(self) -> list[int]:
        """Run every job that is pending, as the cluster would in time; their exit statuses."""
        pending = [i for i, job in enumerate(self.jobs()) if job["state"] == "PENDING"]
        return [self.run(number) for number in pending]

    def late(self) -> None:
        """The jobs of submissions whose answer was lost arrive."""
        late = json.loads((self.home / "late.json").read_text())
        (self.home / "late.json").unlink()
        (self.home / "jobs.json").write_text(json.dumps([*self.jobs(), *late]))

    def sbatches(self) -> list[str]:
        """The scripts that sbatch was given, refused ones too."""
        log = self.home / "sbatch.log"
        return log.read_text().split("\n---\n")[:-1] if log.exists() else []


class Waits(Exception):
    """A job would wait for another to end."""


class Rank:
    """The only rank of a job, without a process: training and evaluating are simulated, and nothing
    else.

    Claim, checks and ends are ``scaling.slurm.job``'s own, records are ``RunDir``'s. The archive of
    the code and the packages are not looked at (``without_code``).
    """

    def __init__(self, root: Path, job: Mapping[str, Any], commit_every: int = 2) -> None:
        token, index = job["name"], job["index"]
        folder = chunk_folder(root, token.rpartition("-")[0], token)
        self.run = RunDir(root, read_json(folder / "chunk.json")["runs"][index])
        self.number = next(a.number for a in self.run.attempts() if a.intent["token"] == token)
        self.job = {
            "executor": "slurm",
            "job_id": f"{job['main']}_{index}",
            "restart": job.get("restart", 0),
            "nodes": [job.get("node", "node1")],
            "began": time.time(),
        }
        self.key = (job["main"], index)
        self.commit_every = commit_every
        self.generation = self.done = 0
        self.missing: int | None = None
        self.stop = SimpleNamespace(by="", since=0.0)
        self.status: int | None = None
        """Exit status of the process; None while it lives."""

    @property
    def trains(self) -> bool:
        """It has passed all checks and may write, in training or in evaluating."""
        return self.status is None and self.generation > 0

    @property
    def evaluates(self) -> bool:
        """It is in the second phase of its job."""
        return self.trains and self.missing is not None

    def begin(self) -> None:
        """Claim and begin to train; with ``Waits`` from ``time.sleep`` it is to be tried again."""
        try:
            reason = claim(self.run, self.number, self.job)
        except Waits:
            return
        if reason:
            if self.run.attempts()[-1].number != self.number:
                job_module._record_end(self.run, self.number, self.job, "superseded", reason)
            self.status = EXIT_SUPERSEDED
            return
        attempt = next(a for a in self.run.attempts() if a.number == self.number)
        try:
            job_module._check(self.run, attempt, self.job, 0)
        except job_module.Unfit as e:
            job_module._record_end(self.run, self.number, self.job, e.cause, str(e))
            self.status = 1
            return
        self.allowance = attempt.intent.get("allowance_gpu_hours")
        self.done = max(self.run.committed_steps(), default=0)
        self.seconds = self._committed_seconds()
        if self.run.result() is None:
            self._open()
        else:
            self._begin_to_evaluate()

    def _open(self, **more: Any) -> None:
        self.last = time.time()
        self.generation = self.run.start_generation(
            {
                "resumed_from": self.done,
                "attempt": self.number,
                "job": self.job,
                "time": self.last,
                "seconds": self.seconds,
                "world_size": 1,
                **more,
            }
        )

    def _begin_to_evaluate(self) -> None:
        if self.generation:  # it has trained
            self.job = {**self.job, "began": time.time()}
        self.missing = len(self.run.evaluations()[1])
        if self.missing:
            self._open(missing=self.missing)
        else:
            self._end()

    def _end(self) -> None:
        job_module._record_end(self.run, self.number, self.job, "done", "")
        self.status = 0

    def _evaluate(self) -> None:
        """One evaluation, as long as a step of training."""
        if left := self.run.evaluations()[1]:
            write_json(self.run.path / "transfer" / f"{left[0]}.json", {"key": left[0]})
        self.seconds, self.last = self.seconds + time.time() - self.last, time.time()
        row = {"step": self.done, "seconds": self.seconds, "missing": len(left[1:])}
        with open(self.run.metrics_path(self.generation), "ab") as file:
            append_line(file, {"kind": "evaluation", **row})
        if not left[1:]:
            self._end()

    def step(self) -> None:
        """Stop, or do one step or evaluation, written down at the time that it is now."""
        if self.allowance is not None and self._spent() > float(self.allowance):
            self.stop.by = self.stop.by or BUDGET  # as the alarm does
        try:
            if self.stop.by:
                if not self.evaluates:
                    self._commit()
                attempt = next(a for a in self.run.attempts() if a.number == self.number)
                stop: Any = SimpleNamespace(by=self.stop.by, since=time.monotonic())
                job_module._stopped(self.run, attempt, self.job, stop)
                self.status = 0
                return
            if self.evaluates:
                self._evaluate()
                return
            self.done += 1
            self.seconds, self.last = self.seconds + time.time() - self.last, time.time()
            row = {"kind": "train", "step": self.done, "loss": 1.0, "seconds": self.seconds}
            with open(self.run.metrics_path(self.generation), "ab") as file:
                append_line(file, row)
            steps = self.run.spec().steps
            if self.done % self.commit_every == 0 or self.done == steps:
                self._commit()
            if self.done == steps:
                result = {"status": "done", "step": steps, "world_size": 1}
                result |= {"gpu_hours": self.run.gpu_hours(), "loss": 1.0, "train_loss": 1.0}
                self.run.write_result(self.generation, result)
                self._begin_to_evaluate()
        except Superseded:
            self.status = EXIT_SUPERSEDED

    def finish(self) -> int:
        """From start to end at once; returns the exit status."""
        self.begin()
        while self.status is None:
            self.step()
        return self.status

    def _commit(self) -> None:
        self.run.fence(self.generation)
        if self.done:
            create_json(self._checkpoint(self.done), {"seconds": self.seconds})

    def _checkpoint(self, step: int) -> Path:
        return self.run.path / "ckpt" / f"step-{step:09d}" / "COMMITTED"

    def _committed_seconds(self) -> float:
        return float(read_json(self._checkpoint(self.done))["seconds"]) if self.done else 0.0

    def _spent(self) -> float:
        """What the attempt will have taken if it writes now. [GPU-hours]"""
        return self.run.gpu_hours(self.number) + (time.time() - self.last) / 3600


def without_code(patch: Callable[..., None]) -> None:
    """Have ``Rank`` not look at archive and packages: this process runs from neither."""
    patch(job_module, "verify", lambda root, digest: None)
    patch(job_module, "running_from", lambda root, digest: True)
    patch(job_module, "capture", lambda root: {"environment": "same"})


def simulate(root, fake_slurm):
    """Run every pending job, simulated; their exit statuses."""
    found = []
    for number, job in enumerate(fake_slurm.jobs()):
        if job["state"] == "PENDING":
            fake_slurm.set(number, state="RUNNING")
            found.append(Rank(root, job).finish())
            fake_slurm.set(number, state="FAILED" if found[-1] else "COMPLETED")
    return found
