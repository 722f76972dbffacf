"""Faults on a real Slurm: what tests need for them, and a sweep that is trained through many.

    slurm/devcluster/start
    python tests/slurm/chaos.py --runs 24 --seed 0

Two login processes submit the same sweep of real CPU training at once and go on with ``sync``. One
of them is killed in the middle of its submission, job steps are killed, jobs are requeued, the
controller dies and comes back. Then every run must have ended as if nothing had happened: one job
at a time, each step once in its curve, the same numbers and the same bytes of parameters as a run
that nobody disturbed. Exit status 1 if not.
"""

import argparse
import contextlib
import itertools
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from scaling.config import ModelConfig, RunConfig, TrainSettings
from scaling.data.prepare import find_prepared, prepare
from scaling.rundir import RunDir
from scaling.slurm.profile import ClusterProfile, Shape
from scaling.slurm.submission import Unreachable
from scaling.slurm.sync import submit, sync
from tests.conftest import write_tiny

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
SWEEP = "chaos"
STEPS = 40
SLOW_JOB_S, SLOW_LOGIN_S = 0.3, 0.1
"""Of every link and rename, on average: see ``witness``. [seconds]"""
SETTINGS = TrainSettings(checkpoint_every=4)
PROFILE = ClusterProfile(
    name="chaos", partition="main", settle_s=1, quarantine_s=15, train=SETTINGS,
    shape=Shape(time_min=20),
)  # fmt: skip
fork = multiprocessing.get_context("fork").Process


class Devcluster:
    """The running devcluster, and what can go wrong with it."""

    def __init__(self, conf: str) -> None:
        self.home = Path(conf).parents[1]

    def command(self, *words: str) -> str:
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        return done.stdout

    def pid(self, daemon: str) -> int:
        return int((self.home / "run" / f"{daemon}.pid").read_text())

    def stop(self, daemon: str) -> None:
        self._only("stop", daemon)

    def start(self, daemon: str) -> None:
        self._only("start", daemon)

    def crash(self, daemon: str) -> None:
        """End a daemon without a chance to save anything."""
        pid = self.pid(daemon)
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
            time.sleep(0.05)

    def _only(self, action: str, daemon: str) -> None:
        script = REPOSITORY / "slurm" / "devcluster" / action
        self.command(str(script), "--dir", str(self.home), "--only", daemon)

    @contextlib.contextmanager
    def without(self, *daemons: str) -> Iterator[None]:
        """Daemons are down meanwhile."""
        try:
            for daemon in daemons:
                self.stop(daemon)
            yield
        finally:
            for daemon in daemons:
                self.start(daemon)

    def heal(self, roots: Iterable[Path]) -> None:
        """All daemons run, all nodes are idle, and nothing of these roots' sweeps is queued."""
        with contextlib.suppress(ProcessLookupError, OSError, ValueError):
            os.kill(self.pid("slurmctld"), signal.SIGCONT)
        for daemon in ("slurmdbd", "slurmctld", "slurmd-gpu1", "slurmd-gpu2"):
            self.start(daemon)
        for token in (folder.name for r in roots for folder in r.glob("sweeps/*/chunks/*")):
            self.command("scancel", f"--name={token}")
        self.resume()
        end = time.monotonic() + 60
        while set(self.nodes().values()) != {"idle"} and time.monotonic() < end:
            time.sleep(0.3)
        assert set(self.nodes().values()) == {"idle"}, self.nodes()

    def resume(self) -> None:
        """Give nodes back that Slurm or a test took out of service."""
        for node, state in self.nodes().items():
            if state.startswith(("down", "dr")):
                _works("scontrol", "update", f"nodename={node}", "state=resume")

    def nodes(self) -> dict[str, str]:
        """State of each node, in sinfo's compact form."""
        return dict(row.split() for row in self.command("sinfo", "-hN", "-o%N %t").splitlines())

    def accounts(self, runs: Iterable[RunDir]) -> dict[str, list[dict[str, str]]]:
        """Slurm's own account of these runs' jobs, by job id: one row per start, oldest first."""
        tokens = {a.intent["token"] for run in runs for a in run.attempts()}
        fields = ["JobID", "JobName", "State", "Start", "End", "ExitCode", "NodeList"]
        rows: dict[str, list[dict[str, str]]] = {}
        for line in self.command(
            "sacct", "-nXP", "--duplicates", f"--name={','.join(sorted(tokens))}",
            f"--format={','.join(fields)}",
        ).splitlines():  # fmt: skip
            row = dict(zip(fields, line.split("|"), strict=True))
            rows.setdefault(row["JobID"], []).append(row)
        for starts in rows.values():
            starts.sort(key=lambda row: (row["Start"] in ("Unknown", "None"), row["Start"]))
        return rows


def at(
    event: str, what: Callable[[tuple[Any, ...]], bool], do: Callable[[], None], nth: int = 1
) -> None:
    """Call ``do`` before Python carries out the nth ``event`` (``sys.addaudithook``) that is
    ``what``. A hook cannot be removed: for a process that ends soon."""
    left = [nth]

    def hook(name: str, args: tuple[Any, ...]) -> None:
        if left[0] and name == event and what(args):
            left[0] -= 1
            if not left[0]:
                do()

    sys.addaudithook(hook)


def is_sbatch(args: tuple[Any, ...]) -> bool:
    return args[1][0] == "sbatch"


def is_record(name: str) -> Callable[[tuple[Any, ...]], bool]:
    """Links to an attempt's record of this name."""
    return lambda args: os.fsdecode(args[1]).endswith(f"/{name}.json")


# the sweep


def make_runs(root: Path, count: int) -> list[RunDir]:
    """Runs of a tiny model that differ by their seed."""
    corpus = find_prepared(root, root / "tiny.toml")
    return [
        RunDir.create(
            root,
            RunConfig.model_validate(
                {
                    "model": ModelConfig(layers=1, d_model=16, heads=2, dropout=0.1),
                    "data": {
                        "corpus_digest": corpus.card.digest,
                        "vocab_size": corpus.card.vocab_size,
                        "n_services": 2,
                        "items_per_user": 4,
                    },
                    "batch_size": 16,
                    "negatives": 16,
                    "steps": STEPS,
                    "evaluations": 4,
                    "pool": corpus.card.pool,
                    "seed": seed,
                }
            ),
            "tiny",
        )
        for seed in range(count)
    ]


def undisturbed(root: Path, count: int) -> None:
    """Train the same runs one after the other in this process, with a job's threads."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from scaling.train.loop import train

    corpus = find_prepared(root, root / "tiny.toml")
    for run in make_runs(root, count):
        train(run, corpus, SETTINGS.model_copy(update={"threads": 1}))


def login(root: Path, count: int, order: int, dies: tuple[str, int] | None) -> None:
    """A login process: submit, then sync until all runs are over.

    Args:
        order: 1, or -1 for the runs from last to first: two that start at once each win some.
        dies: the record, or ``sbatch``, before which it dies, and the how many-th of these.
    """
    os.environ |= {"CHAOS_ROOT": str(root), "CHAOS_SLOW_S": str(SLOW_LOGIN_S)}
    runpy.run_path(str(HERE / "witness" / "sitecustomize.py"))
    os.environ |= {"CHAOS_SLOW_S": str(SLOW_JOB_S), "PYTHONPATH": str(HERE / "witness")}

    def die() -> None:
        (root / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if dies is not None:
        what, nth = dies
        if what == "sbatch":
            at("subprocess.Popen", is_sbatch, die, nth)
        else:
            at("os.link", is_record(what), die, nth)
    runs = make_runs(root, count)[::order]
    with contextlib.suppress(Unreachable):
        submit(root, runs, PROFILE, sweep=SWEEP)
    sync(root, runs, PROFILE, sweep=SWEEP, watch=True, interval_s=1.0)


# the faults


class Faults:
    """Disturbs the runs until all plans are carried out or all runs are over."""

    def __init__(
        self, cluster: Devcluster, runs: list[RunDir], rng: random.Random, crash: bool
    ) -> None:
        self.cluster, self.runs, self.rng, self.crash = cluster, runs, rng, crash
        self.done: Counter[str] = Counter()
        self.early = False
        """Whether the next fault may hit a job before it trains."""
        self.hit: set[tuple[str, int]] = set()
        """Jobs and their starts that were: a start that dies is shown as running for a while."""

    def over(self) -> bool:
        return all(run.result() is not None for run in self.runs)

    def carry_out(self, plan: list[str], end: float) -> None:
        for fault in plan:
            time.sleep(self.rng.uniform(0.3, 1.5))
            self.early = self.rng.random() < 0.25
            while not self.over() and time.monotonic() < end:
                if getattr(self, fault)():
                    self.done[fault] += 1
                    break
                time.sleep(0.5)

    def step_killed(self) -> bool:
        # Two attempts in a row without progress are the end of a run, and shall be.
        spared = [
            run for run in self.runs
            if sum(a.intent["step"] >= max(run.committed_steps(), default=0)
                   for a in run.attempts()) > 1
        ]  # fmt: skip
        return self._strike(spared, "scancel", "--signal=KILL", "{}.0")

    def requeued(self) -> bool:
        return self._strike([], "scontrol", "requeue", "{}")

    def controller_restarted(self) -> bool:
        if self._running([]) is None:
            return False
        (self.cluster.crash if self.crash else self.cluster.stop)("slurmctld")
        time.sleep(self.rng.uniform(1, 3))
        self.cluster.start("slurmctld")
        return True

    def _running(self, spared: list[RunDir]) -> tuple[str, int] | None:
        """Job and number of starts of a run that trains by now, or has claimed, if ``early``."""
        rows = self.cluster.command("squeue", "-hr", "-tR", "-o%i").split()
        found = []
        for run in self.runs:
            attempts, starts = run.attempts(), run.starts()
            claim = attempts[-1].claim if attempts else None
            if claim and claim["job_id"] in rows and run not in spared:
                trains = bool(starts) and starts[-1]["attempt"] == attempts[-1].number
                start = (claim["job_id"], len(starts))
                if (trains or self.early) and start not in self.hit:
                    found.append(start)
        return self.rng.choice(sorted(found)) if found else None

    def _strike(self, spared: list[RunDir], *command: str) -> bool:
        """Let a command, whose last word ``{}`` is part of, hit one of these."""
        if (start := self._running(spared)) is None:
            return False
        self.hit.add(start)
        return _works(*command[:-1], command[-1].format(start[0]))


def _works(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


# what must hold afterwards


def violations(
    runs: list[RunDir],
    references: list[RunDir],
    accounts: dict[str, list[dict[str, str]]],
    witnessed: list[str],
) -> list[str]:
    """What went wrong, in words; empty if nothing did."""
    found = []
    for run, reference in zip(runs, references, strict=True):
        found += [f"{run.run_key}: {w}" for w in (*_writers(run, accounts), *_same(run, reference))]
    return found + witnessed


def _writers(run: RunDir, accounts: dict[str, list[dict[str, str]]]) -> Iterator[str]:
    """At most one start of the run at any time."""
    result, starts = run.result(), run.starts()
    attempts = [a for a in run.attempts() if a.claim]
    claims = {a.number: a.claim["job_id"] for a in attempts}
    if result is None or (result["status"], result["step"]) != ("done", STEPS):
        yield f"not done: {result}"
    elif result["generation"] != starts[-1]["generation"]:
        yield f"its result is of generation {result['generation']} of {len(starts)}"
    order = [(s["attempt"], s["job"]["restart"]) for s in starts]
    if order != sorted(set(order)):
        yield f"its attempts and restarts are out of order: {order}"
    if wrong := [s for s in starts if s["job"]["job_id"] != claims.get(s["attempt"])]:
        yield f"jobs that did not hold the claim trained: {wrong}"
    # Slurm's own account of the jobs that hold a claim: one ends before the next begins. It gives
    # ids to other jobs again when it has lost its state, and then never says how the first ended.
    spans = sorted(
        (row["Start"], row["End"], row["JobID"])
        for a in attempts
        for row in accounts.get(a.claim["job_id"], [])
        if row["JobName"] == a.intent["token"] and row["Start"] not in ("Unknown", "None")
    )
    if not {s["job"]["job_id"] for s in starts} <= {job for _, _, job in spans}:
        yield "Slurm does not know a job that trained"
    for (_, end, one), (begin, _, other) in itertools.pairwise(spans):
        if begin < end and end != "Unknown":
            yield f"job {other} began at {begin}, job {one} ended at {end}"


def _same(run: RunDir, reference: RunDir) -> Iterator[str]:
    """Each step once, and every number as in a run that nobody disturbed."""
    if run.result() is None:
        return
    if (steps := [row["step"] for row in run.curve("train")]) != list(range(1, STEPS + 1)):
        yield f"steps of its curve: {steps}"
    for kind in ("train", "pool"):
        if timeless(run.curve(kind)) != timeless(reference.curve(kind)):
            yield f"its {kind} curve is not that of the undisturbed run"
    final = f"ckpt/step-{STEPS:09d}/params.safetensors"
    if (run.path / final).read_bytes() != (reference.path / final).read_bytes():
        yield "its parameters are not those of the undisturbed run"


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics rows without what a clock says."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "speed")} for row in rows]


def table(
    runs: list[RunDir], faults: Counter[str], accounts: dict[str, list[dict[str, str]]]
) -> str:
    """What happened."""
    attempts = [a for run in runs for a in run.attempts()]
    starts = [s for run in runs for s in run.starts()]
    computed = sum(_computed(run) for run in runs)
    ended = Counter(row["State"].split()[0] for rows in accounts.values() for row in rows)
    superseded = sum(r["ExitCode"] == "93:0" for rows in accounts.values() for r in rows)
    classes = Counter(a.end["class"] if a.end else "(no record)" for a in attempts)
    rows = {
        **{f"faults: {kind.replace('_', ' ')}": n for kind, n in sorted(faults.items())},
        "runs": len(runs),
        "done": sum((run.result() or {}).get("status") == "done" for run in runs),
        "attempts": len(attempts),
        "attempts without a submit record": sum(a.submit is None for a in attempts),
        **{f"attempts ended: {name}": n for name, n in sorted(classes.items())},
        "jobs": len(accounts),
        **{f"job starts ended: {name}": n for name, n in sorted(ended.items())},
        "superseded jobs": superseded,
        "starts that trained": len(starts),
        "of these restarts of the same job": sum(s["job"]["restart"] > 0 for s in starts),
        "most starts of one run": max(len(run.starts()) for run in runs),
        "steps computed": computed,
        "steps computed twice": computed - STEPS * len(runs),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {n:>5}" for name, n in rows.items())


def _computed(run: RunDir) -> int:
    files = (run.metrics_path(g).read_text() for g in run.generations())
    return sum(text.count('"kind": "train"') for text in files)


def settled(cluster: Devcluster, runs: list[RunDir]) -> dict[str, list[dict[str, str]]]:
    """Slurm's account once all jobs have left the queue and their ends have arrived."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        accounts = cluster.accounts(runs)
        words = {row["State"] for rows in accounts.values() for row in rows}
        if accounts and not words & {"RUNNING", "PENDING", "COMPLETING"}:
            break
        time.sleep(1)
    return accounts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, help="step kills, and as many requeues; runs / 2")
    parser.add_argument(
        "--crash",
        action="store_true",
        help="the controller does not save its state: it then forgets jobs that run, gives their "
        "ids to others, and two starts may be alive; only the fence keeps the older from writing. "
        "Of a job that ended in the last moments it learns when nodes register, after 7 minutes",
    )
    parser.add_argument("--minutes", type=float, default=15, help="give up after this")
    parser.add_argument("--root", type=Path, help="an empty folder; default: a temporary one")
    parser.add_argument(
        "--slurm-conf", type=Path, default=REPOSITORY / "work" / "devcluster" / "etc" / "slurm.conf"
    )
    args = parser.parse_args()
    os.environ["SLURM_CONF"] = str(args.slurm_conf)
    cluster, rng = Devcluster(str(args.slurm_conf)), random.Random(args.seed)
    begun = time.monotonic()
    base = args.root or Path(tempfile.mkdtemp(prefix="chaos-"))
    root, other = base / "disturbed", base / "undisturbed"
    prepare(write_tiny(root, 128, 8, 24, 0.3, 5, 0), root)
    shutil.copytree(root, other)
    (root / "witness").mkdir()
    runs = make_runs(root, args.runs)

    # In the middle of its first submission, wherever that is.
    dies = rng.choice([("intent", args.runs // 2), ("sbatch", 1), ("submit", 1)])
    number = args.faults or max(1, args.runs // 2)
    plan = ["step_killed"] * number + ["requeued"] * number
    rng.shuffle(plan)
    plan.insert(len(plan) // 2, "controller_restarted")
    faults = Faults(cluster, runs, rng, args.crash)
    work = [
        fork(target=login, args=(root, args.runs, 1, dies)),
        fork(target=login, args=(root, args.runs, -1, None)),
        fork(target=undisturbed, args=(other, args.runs)),
    ]
    end = begun + 60 * args.minutes
    try:
        victim, second, alone = work
        for process in (victim, alone):
            process.start()
        # Whoever is faster submits: with the other beside it, it might never come to where it dies.
        victim.join(30)
        second.start()
        if victim.exitcode == -signal.SIGKILL and (root / "died").exists():
            faults.done[f"login_killed before {dies[0]} {dies[1]}"] += 1
        # A new one in its place: two drive the sweep all the time.
        work.append(fork(target=login, args=(root, args.runs, 1, None)))
        work[-1].start()
        faults.carry_out(plan, end)
        while any(process.is_alive() for process in work) and time.monotonic() < end:
            cluster.resume()  # a controller that lost its state drains nodes
            time.sleep(1)
        accounts = settled(cluster, runs)
    finally:
        for process in work:
            process.kill()
        cluster.heal([root])
    how = ", crash" * args.crash
    print(f"chaos: {args.runs} runs, seed {args.seed}{how}, {time.monotonic() - begun:.0f} s")
    print(table(runs, faults.done, accounts))
    file = root / "witness" / "violations"
    witnessed = file.read_text().splitlines() if file.exists() else []
    if args.crash:
        print(f"starts while an older one was alive: {len(witnessed)}")
        witnessed = []
    found = violations(runs, make_runs(other, args.runs), accounts, witnessed)
    missed = [f"not carried out: {f}" for f in set(plan) if not faults.done[f]]
    if victim.exitcode != -signal.SIGKILL:
        missed.append(f"not carried out: the first login was to die, and ended {victim.exitcode}")
    if exits := [p.exitcode for p in work[1:] if p.exitcode]:
        missed.append(f"processes of ours ended with {exits}")
    print("\n".join([f"VIOLATION {v}" for v in (*found, *missed)]) or "no violation")
    if not args.root and not found:
        shutil.rmtree(base)
    else:
        print(f"kept: {base}")
    return 1 if found or missed else 0


if __name__ == "__main__":
    sys.exit(main())
