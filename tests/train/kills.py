"""Runs killed again and again, and what must be left of it: the run that nobody disturbed.

    python tests/train/kills.py --runs 40 --kills 200 --seed 0
    python tests/train/kills.py --points 999       every boundary of a commit, once each
    python tests/train/kills.py --points 6 --ranks 2

One process imports everything once and forks a worker for every start of a run. Workers are killed
with SIGKILL at a random time, or at a random point of a place: hooks, set in the worker alone,
report through a pipe before and after every fsync, rename, link, removal and file of tensors. Some
kills are power cuts: what was not fsynced is cut off the files, too (directory entries are not).
Exits with 1 if any run differs from its undisturbed twin in a bit of parameters or moments, in a
row of a curve, or in its result.
"""

import os

# Before torch: a process with threads must not fork.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import argparse
import contextlib
import functools
import importlib
import math
import random
import runpy
import select
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from safetensors.numpy import load_file
from test_loop import configure, curve

from scaling.config import ModelConfig, RunConfig, TrainSettings
from scaling.data.corpus import Corpus
from scaling.files import RecordError, read_json, sha256
from scaling.rundir import RunDir
from scaling.train import checkpoint, evaluate, loop
from scaling.train.export import exported

PLACES = ("start-up", "train step", "evaluation", "save", "export", "result")
CLOCK = ("seconds", "gpu_hours", "generation", "micro_batch_tokens")
"""Keys of a result that a restart may change: free memory differs."""
PATIENCE = 120.0
"""A worker that is silent or outlives a killed rank for longer hangs. [s]"""


@dataclass(frozen=True)
class Case:
    """A run to disturb."""

    config: RunConfig
    settings: TrainSettings
    ranks: int = 1

    def __str__(self) -> str:
        c, s = self.config, self.settings
        chunk = s.micro_batch_tokens or "-"
        return (
            f"{c.model.shape:>11} {c.precision} {c.batch_size:>3}/{c.negatives:<3}{c.steps:>4}"
            f"{c.evaluations:>4}{s.checkpoint_every:>4}{s.milestones:>3}{chunk:>5}"
            f"{'-' if s.zero_stage is None else s.zero_stage:>4}{self.ranks:>3}"
        )


HEADER = f"{'model':>11} prec  B/negs steps ev. ck. ms chunk ZeRO r"


@dataclass(frozen=True)
class Target:
    """Where a worker reports that it is to be killed: the ``count``-th point of ``place`` from
    ``step`` on. Where that never comes, rank 0 waits for the kill before it writes the result."""

    place: str
    step: int
    count: int
    wait: bool
    """Stop there until killed; otherwise go on and be killed a little later."""


NEVER = Target("", 0, 1, wait=True)


@dataclass
class Report:
    """A point that a worker passed."""

    place: str
    what: str
    step: int
    time: float


# ---- in the worker ------------------------------------------------------------------------------


class Hooks:
    """Reports of where a worker is. Installed in the worker only: nothing is ever taken back."""

    def __init__(self, pipe: int, rank: int, step: int, target: Target | None) -> None:
        self.pipe, self.rank, self.step, self.target = pipe, rank, step, target
        self.place, self.counted = "start-up", 0

    def report(self, *words: object) -> None:
        os.write(self.pipe, ("\t".join(map(str, words)) + "\n").encode())

    def point(self, what: str, tear: Callable[[], object] | None = None) -> None:
        """Pass a point; ``tear`` does what a kill in the middle of the next write would leave."""
        self.report(self.place, what, self.step)
        if (target := self.target) is None:
            return
        self.counted += self.place == target.place and self.step >= target.step
        late = self.place == "result" != target.place
        if self.counted < target.count and not late:
            return
        if tear and target.wait:
            tear()
        self.report("here")
        while self.target and (target.wait or late):
            time.sleep(0.02)
        self.target = None

    def release(self, *_: object) -> None:
        """Go on: another rank was the one to be killed."""
        self.target = None

    def install(self) -> None:
        signal.signal(signal.SIGUSR1, self.release)
        for name in ("fsync", "rename", "link", "unlink", "rmdir", "mkdir"):
            self.around(os, name)
        self.around(loop.Ranks, "join")
        for name in ("build", "start_engine", "create_optimizer_state"):
            self.around(loop, name)
        for name in ("newest", "restore", "clear_leftovers"):
            self.around(checkpoint, name)
        if self.rank:
            self.around(checkpoint, "master")  # collective
        self.around(evaluate, "_embed")
        self.around(RunDir, "start_generation")
        self.around(checkpoint, "save", "save")
        self.around(evaluate.Evaluation, "__call__", "evaluation")
        self.around(loop, "export", "export")
        self.around(RunDir, "write_result", "result")
        self.tearing(checkpoint, "save_file", _half_a_file)
        self.tearing(shutil, "copyfile", _half_a_copy)
        self.tearing(loop, "append_line", _half_a_row)
        backward, update = loop._backward, loop.update

        def stepping(*args: Any, **kwargs: Any) -> Any:
            self.place = "train step"
            self.point("forward")
            return backward(*args, **kwargs)

        def updating(*args: Any, **kwargs: Any) -> Any:
            self.point("update")
            done = update(*args, **kwargs)
            self.step += 1
            return done

        loop._backward, loop.update = stepping, updating

    def around(self, owner: Any, name: str, place: str | None = None) -> None:
        """A point before and one after each call of a function; ``place``: of what is in it."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            outside, self.place = self.place, place or self.place
            self.point(f"before {name}")
            done = function(*args, **kwargs)
            if name == "fsync":
                about = os.fstat(args[0])
                if stat.S_ISREG(about.st_mode):
                    self.report("synced", about.st_ino, about.st_size)
            self.point(f"after {name}")
            self.place = outside
            return done

        setattr(owner, name, wrapped)

    def tearing(self, owner: Any, name: str, tear: Callable[..., object]) -> None:
        """As ``around``, with a point in the middle of what is written."""
        self.around(owner, name)
        function = getattr(owner, name)

        def wrapped(*args: Any) -> Any:
            self.point(f"half of {name}", functools.partial(tear, *args))
            return function(*args)

        setattr(owner, name, wrapped)


def _half_a_file(tensors: Any, path: Path) -> None:
    from safetensors.torch import save

    data = save(tensors)
    path.write_bytes(data[: len(data) // 2])


def _half_a_copy(source: Path, path: Path) -> None:
    data = Path(source).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])


def _half_a_row(file: Any, row: Any) -> None:
    file.write(repr(row).encode()[: len(repr(row)) // 2])
    file.flush()


def work(case: Case, run: RunDir, corpus: Corpus, hooks: Hooks, port: int) -> NoReturn:
    """Be a worker: one rank of one start of a run."""
    status = 1
    try:
        log = os.open(log_of(run), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if case.ranks > 1:
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(case.ranks),
                "RANK": str(hooks.rank),
                "LOCAL_RANK": str(hooks.rank),
            }
        hooks.install()
        loop.train(run, corpus, case.settings)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


# ---- in the parent ------------------------------------------------------------------------------


def preload() -> None:
    """Import what a start of a run would, so that workers need not."""
    for name in (
        "deepspeed",
        "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "pandas",
        "torch._dynamo",
        "torch._inductor.compile_fx",
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def fork(child: Callable[[], NoReturn]) -> int:
    """Run ``child`` in a new process, which it ends itself; its id."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"a process of {threads} threads must not fork")
    if pid := os.fork():
        return pid
    child()


def log_of(run: RunDir) -> Path:
    """What the workers of a run print."""
    return run.root / f"{run.run_key}.log"


class Start:
    """One start of a run: a worker per rank, whose reports are read while they live."""

    def __init__(
        self,
        case: Case,
        run: RunDir,
        corpus: Corpus,
        step: int,
        target: Target | None = None,
        victim: int = 0,
    ) -> None:
        self.reports: list[list[Report]] = [[] for _ in range(case.ranks)]
        self.synced: dict[int, int] = {}
        self.here = False
        self.pids: list[int] = []
        self.pipes: dict[int, int] = {}
        self.torn: dict[int, bytes] = {}
        self.status: dict[int, int] = {}
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.began = time.monotonic()
        for rank in range(case.ranks):
            ours, theirs = os.pipe()
            aimed = target if rank == victim else NEVER if target and rank == 0 else None
            hooks = Hooks(theirs, rank, step, aimed)
            self.pids.append(fork(lambda h=hooks: work(case, run, corpus, h, port)))
            os.close(theirs)
            self.pipes[ours] = rank

    def listen(self, until: Callable[[], bool], deadline: float) -> bool:
        """Read reports until a condition holds, all workers have ended, or a time has come.

        Returns:
            Whether the condition holds.
        """
        while not until() and self.pipes and (left := deadline - time.monotonic()) > 0:
            for pipe in select.select(list(self.pipes), [], [], min(left, 60))[0]:
                self._read(pipe)
        return until()

    def _read(self, pipe: int) -> None:
        rank, data = self.pipes[pipe], os.read(pipe, 65536)
        if not data:  # the worker has ended
            os.close(pipe)
            del self.pipes[pipe]
            self.status[rank] = os.waitpid(self.pids[rank], 0)[1]
            return
        *lines, self.torn[rank] = (self.torn.get(rank, b"") + data).split(b"\n")
        for line in lines:
            first, *words = line.decode().split("\t")
            if first == "here":
                self.here = True
            elif first == "synced":
                self.synced[int(words[0])] = int(words[1])
            else:
                now = time.monotonic() - self.began
                self.reports[rank].append(Report(first, words[0], int(words[1]), now))

    def kill(self, rank: int) -> bool:
        """Kill a worker with SIGKILL; whether that is what ended it."""
        if rank not in self.status:
            os.kill(self.pids[rank], signal.SIGKILL)
        self.listen(lambda: rank in self.status, math.inf)
        status = self.status[rank]
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL

    def end(self, seconds: float = PATIENCE) -> bool:
        """Wait for all workers; those that do not end are killed, and False returned."""
        ended = self.listen(lambda: False, time.monotonic() + seconds) or not self.pipes
        for rank in range(len(self.pids)):
            self.kill(rank)
        return ended


@dataclass
class Row:
    """What became of a run."""

    case: Case
    places: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    cuts: int = 0
    remains: int = 0
    """Temporary names and half-removed old checkpoints, which no reader takes."""
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    outlived: float = 0.0
    """Longest time that a rank lived on after a killed one. [s]"""

    @property
    def kills(self) -> int:
        return self.places.total()

    def __str__(self) -> str:
        counts = "".join(f"{self.places[place]:>11}" for place in PLACES)
        verdict = "; ".join(self.faults) or "identical"
        return (
            f"{self.case}{counts}{self.cuts:>6}{self.kills:>7}{self.remains:>9}"
            f"{self.seconds:>7.1f}  {verdict}"
        )


COLUMNS = "".join(f"{place:>11}" for place in PLACES) + "  cuts  kills  remains      s"


class Trial:
    """A run, its undisturbed twin, and the kills between them."""

    def __init__(self, case: Case, corpus: Corpus, root: Path, rng: random.Random) -> None:
        self.case, self.corpus, self.rng = case, corpus, rng
        self.whole = RunDir.create(root / "whole", case.config, "tiny")
        self.run = RunDir.create(root / "killed", case.config, "tiny")
        files = (p.stat() for p in self.run.path.rglob("*") if p.is_file())
        self.synced = {about.st_ino: about.st_size for about in files}
        self.row = Row(case)
        self.step = self.starts = 0
        began = time.monotonic()
        self.undisturbed = self.start(self.whole)
        self.undisturbed.end()
        if any(self.undisturbed.status.values()):
            raise RuntimeError(f"an undisturbed run fails:\n{log_of(self.whole).read_text()}")
        self.row.seconds = time.monotonic() - began

    def start(self, run: RunDir, target: Target | None = None, victim: int = 0) -> Start:
        return Start(self.case, run, self.corpus, self.step, target, victim)

    def disturb(self, kills: int) -> None:
        """Start and kill until the kills are spent or the run has ended before one."""
        while self.row.kills < kills and not self.row.faults:
            victim = self.rng.randrange(self.case.ranks)
            target, delay = self.draw(victim, kills - self.row.kills)
            cut, node = self.rng.random() < 0.25, self.rng.random() < 0.25
            if not self.strike(target, delay, victim, cut=cut, node=node):
                return

    def draw(self, victim: int, left: int) -> tuple[Target, float]:
        """Where the next kill is to hit, and how long after it, or after the start. [s]"""
        steps, rng = self.case.config.steps, self.rng
        reports = self.undisturbed.reports[victim]
        if rng.random() < 0.4:
            began = next(r.time for r in reports if r.place == "train step")
            left_s = (reports[-1].time - began) * (1 - self.step / steps)
            return NEVER, rng.uniform(0, began + left_s)
        late = 4.0 if left == 1 and victim == 0 else 0.0  # little can be killed after it
        place = rng.choices(PLACES, (2, 2, 3, 10, 2, late))[0]
        first = 0 if place == "start-up" else self.step + 1
        first += first and int(rng.random() * 2 * (steps - self.step) / (left + 1))
        times = Counter(r.step for r in reports if r.place == place)
        count = rng.randint(1, max(times.values(), default=1))
        wait = rng.random() < 0.6
        return Target(place, min(first, steps), count, wait), 0 if wait else rng.uniform(0, 0.004)

    def strike(
        self, target: Target, delay: float, victim: int = 0, cut: bool = False, node: bool = False
    ) -> bool:
        """One start and one kill; False if the run had ended before.

        Args:
            cut: lose what was not fsynced, too.
            node: kill the other ranks as well, and not only the victim.
        """
        began = time.monotonic()
        start = self.start(self.run, target, victim)
        if target is NEVER:
            start.listen(lambda: start.here, began + delay)
        else:
            if not start.listen(lambda: start.here, began + PATIENCE) and start.pipes:
                self.row.faults.append(f"silent for {PATIENCE:.0f} s")
            start.listen(lambda: False, time.monotonic() + delay)
        alone = victim in start.status
        killed = start.kill(victim)
        # Until every process group stands (DeepSpeed makes some of its own), a rank waits for its
        # peers in the store for half an hour: there it is the scheduler who ends the others.
        node |= not any(r.what == "after start_engine" for r in start.reports[victim])
        if victim and 0 not in start.status:
            os.kill(start.pids[0], signal.SIGUSR1)
        died = time.monotonic()
        if not start.end(0 if node else PATIENCE) and not node:
            self.row.faults.append(f"a rank outlives the killed one by {PATIENCE:.0f} s")
        self.row.outlived = max(self.row.outlived, time.monotonic() - died)
        self.row.seconds += time.monotonic() - began
        if killed and not alone:
            reports = start.reports[victim]
            last = reports[-1] if reports else Report("start-up", "fork", 0, 0)
            self.row.places[last.place] += 1
            self.row.points[f"{last.place}: {last.what}"] += 1
        elif any(start.status.values()):
            self.row.faults.append("a start fails by itself")
        self.synced |= start.synced
        if killed and cut:
            self.row.cuts += 1
            for path in self.run.path.rglob("*"):
                if path.is_file() and (about := path.stat()):
                    kept = self.synced.get(about.st_ino, 0)
                    if about.st_size > kept:
                        os.truncate(path, kept)
        self.audit()
        return killed

    def finish(self) -> Row:
        """Let the run come to its end and compare."""
        if not self.row.faults:
            began = time.monotonic()
            start = self.start(self.run)
            if not start.end() or any(start.status.values()):
                self.row.faults.append("the last start fails")
            self.audit()
            self.row.seconds += time.monotonic() - began
        if not self.row.faults:
            self.row.faults += self.differences()
        left = list(self.run.path.rglob(".tmp-*"))
        self.row.remains = len(left) + len(self._broken(checkpoint.committed(self.run)))
        return self.row

    def audit(self) -> None:
        """What must hold after every kill; moves ``step`` to where the next start resumes."""
        run, faults = self.run, self.row.faults
        kept = checkpoint.committed(run)[-self.case.settings.keep_checkpoints :]
        faults += self._broken(kept)
        newest = int(kept[-1].name.removeprefix("step-")) if kept else 0
        for begun in run.starts()[self.starts :]:
            self.starts += 1
            if begun["resumed_from"] != self.step:
                faults.append(f"resumed from {begun['resumed_from']} and not from {self.step}")
        if newest < self.step:
            faults.append(f"step {newest} is the newest after step {self.step} was")
        self.step = newest
        for step, folder in exported(run).items():
            card, file = read_json(folder / "config.json"), folder / "model.safetensors"
            if (card["step"], card["sha256"]) != (step, sha256(file)):
                faults.append(f"the export of step {step} is not whole")
        config = run.spec()
        steps = range(1, config.steps + 1)
        for kind, expected in (("train", steps), ("pool", config.evaluation_steps)):
            there = [row["step"] for row in run.curve(kind)]
            if there != list(expected)[: len(there)]:
                faults.append(f"steps missing or doubled in curve {kind!r}: {there}")
        if log_of(run).exists() and "passed over" in log_of(run).read_text():
            faults.append("a start met a damaged checkpoint")

    @staticmethod
    def _broken(folders: Sequence[Path]) -> list[str]:
        broken = []
        for folder in folders:
            try:
                if f"step-{checkpoint.read(folder).step:09d}" != folder.name:
                    broken.append(f"{folder.name} is of another step")
            except RecordError as e:
                broken.append(str(e))
        return broken

    def differences(self) -> Iterator[str]:
        """In what the run differs from its undisturbed twin."""
        run, whole = self.run, self.whole
        for kind in ("train", "pool"):
            ours, theirs = curve(run, kind), curve(whole, kind)
            if ours != theirs:
                pairs = zip(ours, theirs, strict=False)
                at = next((b["step"] for a, b in pairs if a != b), None)
                yield f"curve {kind!r} differs from step {at} on"
        results = [run.result(), whole.result()]
        one, other = ({k: v for k, v in (r or {}).items() if k not in CLOCK} for r in results)
        if one != other or not one:
            yield f"result differs in {[k for k in other if one.get(k) != other[k]]}"
        newest = [checkpoint.newest(run), checkpoint.newest(whole)]
        for name in checkpoint.TENSORS:
            if differing := _unequal(*(c.path / f"{name}.safetensors" for c in newest)):
                yield f"{name} differs in {', '.join(differing)}"
        ours, theirs = exported(run), exported(whole)
        if list(ours) != list(theirs) or any(
            _unequal(ours[s] / "model.safetensors", theirs[s] / "model.safetensors") for s in theirs
        ):
            yield "exports differ"


def _unequal(one: Path, other: Path) -> list[str]:
    """Names of the tensors in which two files differ in a bit, a type or a shape."""
    tensors = [load_file(one), load_file(other)]
    names = sorted({*tensors[0], *tensors[1]})
    told = [{n: (a.dtype, a.shape, a.tobytes()) for n, a in loaded.items()} for loaded in tensors]
    return [n for n in names if told[0].get(n) != told[1].get(n)]


def draw_case(corpus: Corpus, number: int, rng: random.Random, ranks: int | None = None) -> Case:
    """The ``number``-th of all runs: ZeRO stages and numbers of ranks by turns, the rest drawn."""
    if ranks is None:
        ranks = 2 if number % 5 == 4 else 1
    stage = (None, 0, 1, 2)[number % 4]
    batch = rng.choice((8, 16, 32))
    heads = rng.choice((1, 2))
    steps = rng.randint(24, 40)
    model = ModelConfig(
        system=rng.choice(("clue", "clue", "clue", "single")),
        layers=rng.choice((1, 1, 2)),
        d_model=rng.choice((8, 16, 24)),
        heads=heads,
        dropout=0.1,
    )
    config = configure(
        corpus,
        batch_size=batch,
        negatives=rng.choice([n for n in (4, 8, 16, 32) if n <= batch]),
        steps=steps,
        evaluations=rng.randint(1, 6),
        seed=number,
        precision="bf16" if stage and rng.random() < 0.3 else "fp32",
        distinct_items=rng.random() < 0.3,
    )
    settings = TrainSettings(
        threads=1,
        zero_stage=stage,
        checkpoint_every=rng.randint(1, 7),
        keep_checkpoints=rng.choice((2, 2, 3)),
        milestones=rng.choice((0, 0, 2, 4)),
        micro_batch_tokens=rng.choice((None, 256)),
    )
    return Case(config.model_copy(update={"model": model}), settings, ranks)


def kill_table(
    corpus: Corpus, root: Path, runs: int, kills: int, seed: int, ranks: int | None = None
) -> list[Row]:
    """Disturb runs until there are so many of them and so many kills; prints a row for each."""
    print(HEADER + COLUMNS, flush=True)
    rows: list[Row] = []
    while len(rows) < runs or sum(row.kills for row in rows) < kills:
        number = len(rows)
        rng = random.Random(f"{seed} {number}")
        trial = Trial(draw_case(corpus, number, rng, ranks), corpus, root / str(number), rng)
        left = kills - sum(row.kills for row in rows)
        trial.disturb(math.ceil(left / max(1, runs - number)))
        rows.append(trial.finish())
        print(rows[-1], flush=True)
        if rows[-1].faults:
            print(f"    kept in {root / str(number)}", flush=True)
            if not rows[-1].kills and len(rows) >= runs:
                break
        else:
            shutil.rmtree(root / str(number))
    return rows


def crash_points(
    corpus: Corpus, root: Path, seed: int, stage: int, ranks: int, most: int
) -> list[Row]:
    """Die at every point of a commit, each in a start that goes on from where the last one died.

    Args:
        ranks: each of them dies at its points.
        most: so many points of a rank at most, evenly spread.
    """
    steps = min(40, 8 + most * ranks)  # some points come after the rename: a step is won
    config = configure(corpus, dropout=0.1, steps=steps, evaluations=2, batch_size=8, negatives=8)
    settings = TrainSettings(threads=1, zero_stage=stage, checkpoint_every=1)
    trial = Trial(Case(config, settings, ranks), corpus, root / "points", random.Random(seed))
    print(HEADER + COLUMNS, flush=True)
    planned = 0
    for victim, reports in enumerate(trial.undisturbed.reports):
        points = sum(r.place == "save" and r.step == config.steps // 2 for r in reports)
        for i in range(min(most, points)):
            n = 1 + i * points // min(most, points)
            planned += 1
            before = trial.step
            target = Target("save", before + 1, n, wait=True)
            trial.strike(target, 0, victim, cut=planned % 2 == seed % 2)
            if trial.step not in (before, before + 1):
                trial.row.faults.append(f"point {n}: step {trial.step} follows {before}")
            if trial.row.faults:
                break
    row = trial.finish()
    if row.places != {"save": planned} and not row.faults:
        row.faults.append(f"{planned} points, but kills {dict(row.places)}")
    print(row)
    print("\n".join(f"{n:>6}  {what}" for what, n in row.points.items()))
    return [row]


def prepared(root: Path) -> Corpus:
    """A small corpus, prepared in another process: DuckDB has threads."""

    def prepare() -> NoReturn:
        status = 1
        try:
            tests = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))
            tests["prepare"](tests["write_tiny"](root, 128, 8, 24, 0.3, 5, 0), root)
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(status)

    if os.waitpid(fork(prepare), 0)[1]:
        raise RuntimeError("the corpus could not be prepared")
    return Corpus.open(next(root.glob("corpora/tiny-*")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, help="of every run (a fifth of them has 2)")
    parser.add_argument(
        "--points", type=int, help="die once at so many points of a commit instead (999: at all)"
    )
    parser.add_argument("--stage", type=int, default=1, help="of --points: ZeRO stage")
    parser.add_argument("--corpus", type=Path, help="a prepared corpus (default: a tiny one)")
    parser.add_argument("--root", type=Path, help="folder to work in (default: a temporary one)")
    asked = parser.parse_args()
    root = asked.root or Path(tempfile.mkdtemp(prefix="kills-"))
    preload()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until a worker has its hooks
    corpus = Corpus.open(asked.corpus) if asked.corpus else prepared(root)
    began = time.monotonic()
    if asked.points:
        rows = crash_points(corpus, root, asked.seed, asked.stage, asked.ranks or 1, asked.points)
    else:
        rows = kill_table(corpus, root, asked.runs, asked.kills, asked.seed, asked.ranks)
    places: Counter[str] = sum((row.places for row in rows), Counter())
    kills, seconds = places.total(), time.monotonic() - began
    faults = sum(bool(row.faults) for row in rows)
    print(
        f"\n{kills} kills in {len(rows)} runs, {sum(row.cuts for row in rows)} of them power cuts: "
        + ", ".join(f"{places[place]} {place}" for place in PLACES)
        + f"\n{seconds:.0f} s, {seconds / max(1, kills):.2f} s a kill; ranks outlived a killed one "
        f"by {max(row.outlived for row in rows):.1f} s at most"
        + f"\n{f'{faults} runs differ' if faults else 'all runs are as if undisturbed'}"
    )
    if not faults and asked.root is None:
        shutil.rmtree(root)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
