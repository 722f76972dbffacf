"""Random histories of a sweep (F18): several logins, a Slurm that fails, jobs that come and go.

Their runs are wanted evaluated, and more so as time passes.
The driver (submit, sync, status, cancel) and the jobs' claims, checks and ends are the real ones.
To be fast, the fake Slurm's commands are called in this process instead of being run
(``scheduler.command``), ``launcher.start_array`` hands it the three options that it reads instead
of going through submitit, the loop of a job is ``scenario.Rank``, and time is a number. Passes of
logins are not atomic: at any record or sbatch a login may die, or something else happens.

    CLUE_MACHINE=20000 pytest tests/slurm/test_slurm_machine.py     so many histories of each kind
"""

import contextlib
import importlib.util
import io
import itertools
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scenario import FakeSlurm, Rank, Waits, whole, without_code

from scaling.config import DataConfig, Evaluation, ModelConfig, PoolConfig, RunConfig
from scaling.files import write_json
from scaling.rundir import RunDir
from scaling.slurm import budget, job, scheduler, submission, sync
from scaling.slurm import cancel as cancelling
from scaling.slurm.job import EXIT_SUPERSEDED
from scaling.slurm.launcher import Refused
from scaling.slurm.profile import ClusterProfile, Shape
from scaling.slurm.submission import SubmissionError

HISTORIES = int(os.environ.get("CLUE_MACHINE", "100"))
STEPS = 4
STEP_S = 30.0
PROFILE = ClusterProfile(name="fake", settle_s=30, quarantine_s=600, shape=Shape(time_min=60))
RUNS = tuple(
    RunConfig(
        model=ModelConfig(layers=1, d_model=64, heads=1),
        data=DataConfig(corpus_digest="a" * 16, vocab_size=100),
        batch_size=8,
        negatives=8,
        steps=STEPS,
        evaluations=2,
        pool=PoolConfig(size=4, digest="b" * 16),
        seed=seed,
    )
    for seed in range(3)
)
TASKS = tuple(
    Evaluation(corpus_digest="a" * 16, task=task, task_digest="t" * 16)
    for task in ("books", "food", "kitchen")
)
FAILED = ("FAILED", "NODE_FAIL", "TIMEOUT", "PREEMPTED", "OUT_OF_MEMORY")
ALIVE = ("RUNNING", "COMPLETING")
which = st.integers(0, 5)


class Crash(BaseException):
    """A login process dies."""


class Sweep(RuleBasedStateMachine):
    """A sweep of three runs, and everything that may happen to it."""

    budget_hours: float | None = None

    @initialize()
    def begin(self) -> None:
        place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(dir=place))
        self.root, home = self.folder / "root", self.folder / "fake"
        home.mkdir()
        os.environ["FAKE_SLURM"] = str(home)
        path = Path(__file__).parent / "fake" / "slurm.py"
        spec = importlib.util.spec_from_file_location("fake_slurm_commands", path)
        self.commands = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.commands)
        self.slurm = FakeSlurm(home)
        self.now = 1_800_000_000.0
        self.patches = contextlib.ExitStack()
        patch = self.patch
        patch(time, "time", lambda: self.now)
        patch(time, "sleep", self.sleep)
        for module in (scheduler, submission, cancelling, job):
            patch(module, "command", self.command)
        patch(submission, "start_array", self.start_array)
        patch(sync, "archive", lambda root: "code")
        patch(sync, "check_runs", lambda *_: None)
        without_code(patch)
        self.record, self.write = RunDir.record, submission.write_json
        patch(RunDir, "record", lambda *a: self.ticking(self.record, *a))
        patch(submission, "write_json", lambda *a: self.ticking(self.write, *a))
        self.runs = [RunDir.create(self.root, config, "none") for config in RUNS]
        for run, count in zip(self.runs, (0, 1, 2), strict=True):
            run.want(TASKS[:count])
        self.ranks: list[Rank] = []
        self.zombies: list[Rank] = []
        self.results: dict[Path, bytes] = {}
        self.trained: dict[str, int] = {}
        self.cancelled: dict[str, int] = {}
        self.faults: dict[str, object] = {}
        self.ticks, self.at, self.what = 0, 0, ""
        if self.budget_hours is not None:
            rows = [{"run_key": c.run_key, "n_total": 1, "flops_exact": 1e12} for c in RUNS]
            write_json(self.root / "sweeps/s/plan.json", {"runs": rows})
            budget.set_budget(self.root, "s", self.budget_hours, self.runs)

    def patch(self, owner, name, value) -> None:
        self.patches.enter_context(mock.patch.object(owner, name, value))

    # the world in this process

    def sleep(self, seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():  # others' threads go on
            raise Waits

    def command(self, *words, timeout_s=0.0):
        out, err = io.StringIO(), io.StringIO()
        status = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                getattr(self.commands, words[0])(list(words[1:]))
            except SystemExit as e:
                status = e.code
        if words[0] == "scancel":
            self.told_to_end()
        if status:
            return False, f"{words[0]}: {err.getvalue().strip().splitlines()[-1]}"
        return True, out.getvalue()

    def start_array(self, array):
        self.tick()
        script = self.folder / "script"
        first, last = array.indices[0], array.indices[-1]
        script.write_text(
            f"#SBATCH --job-name={array.token}\n#SBATCH --array={first}-{last}%{array.parallel}\n"
            + (f"#SBATCH --exclude={array.exclude}\n" if array.exclude else "")
        )
        ok, output = self.command("sbatch", str(script))
        self.tick()
        if not ok:
            raise Refused(output)
        main = output.split()[-1]
        return [f"{main}_{i}" for i in array.indices]

    def ticking(self, do, *arguments):
        self.tick()
        done = do(*arguments)
        self.tick()
        return done

    def tick(self) -> None:
        """A moment of a login's pass at which it may die, or something else happens."""
        if not self.at:
            return
        self.ticks += 1
        if self.ticks != self.at:
            return
        self.at = 0
        if self.what == "die":
            raise Crash
        if self.what in ("sync", "submit", "again"):
            self.drive(self.what)
        elif self.what == "cancel":
            self.cancel(7)
        elif self.what == "jobs":
            self.revive(0)
            for _ in range(3):
                self.start(0)

    def drive(self, how: str) -> None:
        """A pass of a login; a scheduler that refuses or is silent is no fault of ours."""
        again = {"retry_failed": True} if how == "again" else {}
        try:
            drive = sync.sync if how == "sync" else sync.submit
            drive(self.root, self.runs, PROFILE, sweep="s", **again)
        except SubmissionError:
            pass
        finally:
            if again:  # one who cancels at the same time may have come first
                self.cancelled.clear()

    def job_of(self, rank: Rank):
        """Number and state of a rank's job."""
        for number, known in enumerate(self.slurm.jobs()):
            if (known["main"], known["index"]) == rank.key:
                return number, known
        raise AssertionError("no such job")

    def told_to_end(self) -> None:
        """A job that was cancelled is completing until its processes have ended."""
        for rank in tuple(self.ranks):
            number, known = self.job_of(rank)
            if known["state"].startswith("CANCELLED"):
                if rank.trains:
                    self.slurm.set(number, state="COMPLETING", cancelled=known["state"])
                    rank.stop.by = rank.stop.by or "SIGTERM"
                else:
                    self.ranks.remove(rank)

    def ended(self, rank: Rank) -> None:
        """Slurm notes that a process is gone."""
        if rank.status is None:
            return
        number, known = self.job_of(rank)
        if rank in self.ranks:
            self.ranks.remove(rank)
            if known["state"] in ALIVE:
                state = "FAILED" if rank.status else "COMPLETED"
                self.slurm.set(number, state=known.get("cancelled") or state)

    # rules: logins and people

    @rule(
        how=st.sampled_from(["sync", "sync", "submit", "again"]),
        at=st.integers(0, 16),
        what=st.sampled_from(["die", "sync", "submit", "again", "cancel", "jobs"]),
    )
    def login(self, how: str, at: int, what: str) -> None:
        self.ticks, self.at, self.what = 0, at, what
        try:
            self.drive(how)
        except Crash:
            pass
        finally:
            self.at = 0

    @precondition(lambda self: not self.faults.get("sbatch"))
    @rule()
    def sync_twice(self) -> None:
        """The second does nothing; where sbatch gives no clear answer it goes on with the rest."""
        self.drive("sync")
        before = self.everything()
        self.drive("sync")
        assert self.everything() == before, "a second sync did something"
        sync.status(self.runs)
        assert self.everything() == before, "status changed something"

    def everything(self):
        files = sorted(str(p) for p in self.root.rglob("*"))
        return files, self.slurm.jobs(), len(self.slurm.sbatches())

    @rule(mask=st.integers(1, 7))
    def cancel(self, mask: int) -> None:
        chosen = [run for i, run in enumerate(self.runs) if mask >> i & 1]
        with contextlib.suppress(SubmissionError):
            cancelling.cancel(chosen)
        for run in chosen:
            if not run.over():
                self.cancelled[run.run_key] = len(run.generations())

    @rule(mask=st.integers(1, 7), task=st.sampled_from(TASKS))
    def want(self, mask: int, task: Evaluation) -> None:
        """A task is added to the sweep."""
        for i, run in enumerate(self.runs):
            if mask >> i & 1:
                run.want([task])

    # rules: Slurm

    @rule(k=which)
    def start(self, k: int) -> None:
        pending = [n for n, j in enumerate(self.slurm.jobs()) if j["state"] == "PENDING"]
        if pending:
            number = pending[k % len(pending)]
            self.slurm.set(number, state="RUNNING", reason="None", node=f"node{k % 2}")
            rank = Rank(self.root, self.slurm.jobs()[number])
            self.ranks.append(rank)
            rank.begin()
            self.ended(rank)

    @precondition(lambda self: self.ranks)
    @rule(k=which, count=st.integers(1, 4))
    def step(self, k: int, count: int) -> None:
        rank = self.ranks[k % len(self.ranks)]
        for _ in range(count):
            if rank.trains:
                self.now += STEP_S
                rank.step()
            elif rank.status is None:
                rank.begin()
        self.ended(rank)

    @precondition(lambda self: self.ranks)
    @rule(k=which, by=st.sampled_from(["SIGUSR2", "SIGTERM"]), completing=st.booleans())
    def signal(self, k: int, by: str, completing: bool) -> None:
        """The wall time ends, or the job is preempted, and Slurm then requeues it by itself."""
        rank = self.ranks[k % len(self.ranks)]
        if not rank.trains:
            return
        number, _ = self.job_of(rank)
        if completing:
            self.slurm.set(number, state="COMPLETING")
        rank.stop.by = by
        rank.step()
        self.ended(rank)
        if completing and self.slurm.jobs()[number]["state"] == "COMPLETED":
            self.slurm.requeue(number)

    @precondition(lambda self: self.ranks)
    @rule(k=which, state=st.sampled_from([*FAILED, "requeue"]))
    def kill(self, k: int, state: str) -> None:
        rank = self.ranks.pop(k % len(self.ranks))
        self.gone(rank, state)

    def gone(self, rank: Rank, state: str) -> None:
        number, known = self.job_of(rank)
        if known["state"] not in ALIVE:
            return
        if known.get("cancelled"):
            self.slurm.set(number, state=known["cancelled"])
        elif state == "requeue":
            self.slurm.requeue(number)
        else:
            self.slurm.set(number, state=state)

    @precondition(lambda self: self.ranks and self.budget_hours is None)
    @rule(k=which, state=st.sampled_from(["NODE_FAIL", "requeue"]))
    def lose_the_node(self, k: int, state: str) -> None:
        """The process goes on where nobody sees it."""
        rank = self.ranks.pop(k % len(self.ranks))
        self.gone(rank, state)
        if rank.trains:
            self.zombies.append(rank)

    @precondition(lambda self: self.zombies)
    @rule(k=which)
    def zombie_steps(self, k: int) -> None:
        zombie = self.zombies[k % len(self.zombies)]
        run = zombie.run
        late = run.generations()[-1] > zombie.generation
        before = run.committed_steps(), run.result()
        zombie.step()
        if late:
            assert (run.committed_steps(), run.result()) == before, "a zombie has committed"
        if zombie.status is not None:
            self.zombies.remove(zombie)

    @rule(k=which)
    def revive(self, k: int) -> None:
        """Slurm requeues a job that it has shown as ended."""
        dead = [
            n for n, j in enumerate(self.slurm.jobs())
            if j["state"] in ("NODE_FAIL", "PREEMPTED") and not j.get("purged")
        ]  # fmt: skip
        if dead:
            self.slurm.requeue(dead[k % len(dead)])

    @rule(accounts=st.booleans())
    def forget_ended_jobs(self, accounts: bool) -> None:
        over = ("COMPLETED", *FAILED)
        self.slurm.change(
            lambda j: j["state"].split()[0] in (*over, "CANCELLED"),
            purged=True, unaccounted=not accounts,
        )  # fmt: skip

    @rule(
        sbatch=st.sampled_from([None, None, "timeout", "timeout_accepted", "timeout_late", "down"]),
        down=st.sampled_from([(), (), ("squeue",), ("sacct",), ("scancel",), ("scontrol",),
                              ("squeue", "sacct", "scancel", "scontrol")]),
        limit=st.sampled_from([None, None, 1, 2]),
    )  # fmt: skip
    def fault(self, sbatch, down, limit) -> None:
        self.faults = {"sbatch": sbatch, "max_submit": limit, **dict.fromkeys(down, "down")}
        self.slurm.fault(**self.faults)

    @rule()
    def late_jobs_arrive(self) -> None:
        if (self.slurm.home / "late.json").exists():
            self.slurm.late()

    @rule(seconds=st.sampled_from([1.0, 40.0, 700.0, 4000.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # what must hold

    @invariant()
    def one_writer(self) -> None:
        keys = [rank.run.run_key for rank in self.ranks if rank.trains]
        assert len(keys) == len(set(keys)), "two jobs train one run"

    @invariant()
    def done_is_the_end(self) -> None:
        for run in self.runs:
            result, records = run.path / "result.json", [*run.path.glob("transfer/*.json")]
            for path in (result, *records):
                if path.exists():
                    assert path.read_bytes() == self.results.setdefault(path, path.read_bytes())
            if result.exists():
                trains = sum("missing" not in start for start in run.starts())
                assert self.trained.setdefault(run.run_key, trains) == trains, "trained again"
            else:
                assert not records, "evaluated before it was trained"

    @invariant()
    def cancelled_is_not_restarted(self) -> None:
        for run in self.runs:
            if run.run_key in self.cancelled:
                assert len(run.generations()) == self.cancelled[run.run_key]

    @invariant()
    def within_the_budget(self) -> None:
        if self.budget_hours is not None:
            spent = sum(run.gpu_hours() for run in self.runs)
            assert spent <= self.budget_hours + 1e-9, f"{spent} GPU-hours"

    def teardown(self) -> None:
        try:
            if hasattr(self, "runs"):
                self.all_of_it_ends_well()
        finally:
            if hasattr(self, "patches"):
                self.patches.close()
            if hasattr(self, "folder"):
                shutil.rmtree(self.folder, ignore_errors=True)

    def all_of_it_ends_well(self) -> None:
        """Faults are over, and somebody asks for all runs: each is trained to its end, and then
        evaluated."""
        self.fault(None, (), None)
        self.late_jobs_arrive()
        if self.budget_hours is not None:
            budget.set_budget(self.root, "s", 1000.0, self.runs)
        for passes in itertools.count():
            assert passes < 12, [(r.result(), r.evaluations()) for r in self.runs]
            while self.ranks:
                for _ in range(2 * STEPS):
                    self.step(0, 1) if self.ranks else None
                self.ranks[:] = self.ranks[1:] + self.ranks[:1]
            self.one_writer()
            self.done_is_the_end()
            if all(run.over() for run in self.runs):
                break
            self.now += 4000.0
            self.drive("again")
            for _ in range(sum(j["state"] == "PENDING" for j in self.slurm.jobs())):
                self.start(0)
        assert all(whole(run) for run in self.runs)
        count = len(self.slurm.jobs())
        self.drive("again")
        assert len(self.slurm.jobs()) == count
        for number, known in enumerate(self.slurm.jobs()):  # of attempts that somebody overtook
            if known["state"] == "PENDING":
                self.slurm.set(number, state="RUNNING")
                assert Rank(self.root, known).finish() == EXIT_SUPERSEDED


class BudgetedSweep(Sweep):
    """As above, with money for two of the three runs at a time."""

    budget_hours = 0.22


CHECKS = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


@pytest.mark.parametrize("machine", [Sweep, BudgetedSweep])
def test_f18_random_histories(machine):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=HISTORIES,
            stateful_step_count=30,
            derandomize="CLUE_MACHINE" not in os.environ,
            database=None,
            deadline=None,
            suppress_health_check=CHECKS,
        ),
    )
