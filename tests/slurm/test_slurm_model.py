"""The submission protocol, all interleavings of a small world (docs/decisions/0003).

One run; login processes that look, decide, submit and die; Slurm, which answers late, loses
answers, kills and requeues; jobs that look, claim, look again and write; a person who cancels. The
states are enumerated breadth first, so a counterexample is a shortest one. What a login and a job
decide is the real code (``derive``, ``refusal``, ``predecessors``); the order of steps is written
here after ``sync``, ``submission``, ``job`` and ``cancel``. Steps are atomic, as ``link`` and
``rename`` are, and records are seen at once: a file system that lags is not modelled, so neither
is ``settle_s``. Of a job there is its rank 0, the one that decides. Where a run is wanted
evaluated, its job does that once there is a result, and a task may be declared when all is over.
"""

import gc
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import pytest

from scaling.rundir import Attempt
from scaling.slurm.claims import predecessors, refusal
from scaling.slurm.state import (
    Facts,
    Job,
    Phase,
    Rules,
    Snapshot,
    State,
    Verdict,
    derive,
    meaning,
)
from scaling.slurm.sync import _wanted

# the world


class Try(NamedTuple):
    """An attempt: its records, and below them its job."""

    step: int
    """Committed step when it was made."""
    again: bool = False
    """It was made for somebody who knew that the run was cancelled."""
    trained: bool = False
    """It was made to evaluate: there was a result."""
    old: bool = False
    """Its quarantine is over, or if it has a submit record, the time for news of its job."""
    submit: bool = False
    claim: bool = False
    cancel: bool = False
    end: str = ""
    """Class in the end record."""
    job: str = ""
    """Slurm's word; empty: no job; ``?``: sent, and not there yet (perhaps never)."""
    process: str = ""
    """What the process of the newest start does next; empty: there is none."""


class World(NamedTuple):
    """One state: the records, Slurm, every process, and what may still go wrong."""

    tries: tuple[Try, ...] = ()
    step: int = 0
    """Newest committed step, 0 or 1; a result needs 1."""
    trained: bool = False
    """There is a result."""
    done: bool = False
    """There is nothing left to do: it is evaluated too, if that is wanted."""
    logins: tuple[tuple[Any, ...], ...] = ()
    zombie: tuple[int, str, bool] | None = None
    """A process that Slurm thinks dead: index of its attempt, what it does next, and whether a
    later start of its job opened the newest generation."""
    person: tuple[Any, ...] = ()
    """Somebody in the middle of a cancel."""
    cancelled: bool = False
    """A cancel has returned, and nobody asked for the run since."""
    crashes: int = 0
    lost: int = 0
    faults: int = 0
    zombies: int = 0
    cancels: int = 0
    asks: int = 0
    declares: int = 0

    @property
    def stage(self) -> int:
        """0: not trained; 1: trained, and not evaluated; 2: over."""
        return self.trained + self.done


@dataclass(frozen=True)
class Bounds:
    """How much may happen."""

    attempts: int = 2
    logins: int = 2
    crashes: int = 0
    """Login processes that die between two steps (they start anew)."""
    lost: int = 0
    """Answers of sbatch that do not come; the job comes at any later time, or never."""
    faults: int = 0
    """Jobs killed, requeued, or failing by themselves."""
    zombies: int = 0
    """Processes that outlive what Slurm knows of them."""
    cancels: int = 0
    asks: int = 0
    """Times that somebody asks for a failed or cancelled run again."""
    silent: bool = False
    """The controller may not answer a login process."""
    evaluates: bool = False
    """The run is wanted evaluated."""
    declares: int = 0
    """Tasks declared when all is over."""
    window: bool = False
    """Time passes between a look at the fence and the commit behind it."""


@dataclass(frozen=True)
class Protocol:
    """A sound protocol; a test leaves one part out."""

    claim: bool = True
    second_look: bool = True
    """A job looks at the records again once it has claimed."""
    predecessors: bool = True
    """A job waits for older jobs that claimed."""
    quarantine_s: float = 600
    fence: bool = True
    silence_is_no_verdict: bool = True
    exclusive_intent: bool = True
    records_again: bool = True
    """A pass reads the records again after it has asked Slurm."""
    judges_what_it_asked_for: bool = True
    """A pass does not judge an attempt that it did not ask Slurm about."""
    asks_about_ended: bool | None = True
    """A job waits for an older one that Slurm says runs, although a record says that it ended.
    None: as ``predecessors`` does."""
    cancel_is_inherited: bool | None = True
    """An attempt after a cancelled one is cancelled, unless it was asked for. None: as ``derive``
    and ``refusal`` do."""
    result_ends_training: bool = True
    """A job that finds a result evaluates only."""
    cancel_looks_last: bool = True
    """``cancel`` asks for the jobs of all attempts, after it has marked them."""


SOUND = Protocol()
CODE = Protocol(
    asks_about_ended=None,
    cancel_is_inherited=None,
)
"""The steps of the code, where ``predecessors``, ``derive`` and ``refusal`` decide alone."""


class Edge(NamedTuple):
    """A transition."""

    name: str
    world: World
    broken: str = ""
    """Invariant that it violates."""
    fault: bool = False
    """Something goes wrong or somebody interferes: no progress may depend on it."""


IDLE = ("idle",)
WRITING = ("write", "stale", "fenced", "fenced stale")
EVALUATING = ("next", "evaluate", "say")
TRAINING = frozenset(("open", *WRITING, *EVALUATING))
"""What a process does after its last look."""

# the decisions, from the real code

NOW = 0.0
OLD, YOUNG, LATER = NOW - 1000, NOW - 1, NOW + 1


class Seen(NamedTuple):
    """What is on disk of an attempt."""

    step: int
    submit: bool = False
    claim: bool = False
    cancel: bool = False
    end: str = ""
    again: bool = False
    trained: bool = False


def seen(tries: tuple[Try, ...], inherited: bool | None) -> tuple[Seen, ...]:
    found, cancel = [], False
    for t in tries:
        cancel = t.cancel or (inherited is True and cancel and not t.again)
        again = t.again if inherited is None else True
        found.append(Seen(t.step, t.submit, t.claim, cancel, t.end, again, t.trained))
    return tuple(found)


@cache
def records_of(tries: tuple[Seen, ...], since: float) -> tuple[Attempt, ...]:
    found = []
    for number, t in enumerate(tries, 1):
        job = {"job_id": str(number), "time": since}
        intent = {"token": f"t{number}", "index": 0, "executor": "slurm", "step": t.step}
        intent["missing"] = 1 if t.trained else None
        found.append(
            Attempt(
                number,
                {**intent, "time": since, "again": t.again},
                job if t.submit else None,
                job if t.claim else None,
                {"by": "ann"} if t.cancel else None,
                {"class": t.end} if t.end else None,
            )
        )
    return tuple(found)


@cache
def verdict(
    tries: tuple[Seen, ...],
    step: int,
    stage: int,
    asked: int,
    word: str,
    since: float,
    rules: Rules,
) -> Verdict:
    """``derive`` on these records and a snapshot of the job of attempt ``asked`` alone."""
    facts = Facts(
        "k" * 16, "done" if stage else None, step, records_of(tries, since), missing=stage == 1
    )
    jobs = {(f"t{asked}", 0): Job(str(asked), word)} if word not in ("", "!") else {}
    return derive(facts, Snapshot(jobs, word != "!"), NOW, rules)


@cache
def refused(tries: tuple[Seen, ...], done: bool, number: int) -> bool:
    job = {"executor": "slurm", "job_id": str(number)}
    return refusal(records_of(tries, YOUNG), done, number, job) is not None


@cache
def waited_for(tries: tuple[Seen, ...], number: int, ended: bool | None) -> tuple[int, ...]:
    if ended:
        tries = tuple(t._replace(end="") for t in tries)
    older = predecessors(records_of(tries, YOUNG), number)
    return tuple(a.number for a in older if ended is not False or a.end is None)


def visible(job: str) -> str:
    """What a snapshot shows of a job."""
    return "" if job == "?" else job


@cache
def alive(job: str) -> bool:
    """As ``scheduler.may_write``, for a controller that answers."""
    word = meaning(job) if visible(job) else None
    return word is not None and word.phase is Phase.RUNNING


# the transitions


class Model:
    """All transitions of a world, within bounds, for a protocol."""

    def __init__(self, bounds: Bounds, protocol: Protocol) -> None:
        self.bounds = bounds
        self.protocol = protocol
        self.rules = Rules(protocol.quarantine_s, 30)

    def start(self) -> World:
        b = self.bounds
        return World(
            logins=(IDLE,) * b.logins, crashes=b.crashes, lost=b.lost, faults=b.faults,
            zombies=b.zombies, cancels=b.cancels, asks=b.asks, declares=b.declares,
        )  # fmt: skip

    def _seen(self, w: World) -> tuple[Seen, ...]:
        return seen(w.tries, self.protocol.cancel_is_inherited)

    def edges(self, w: World) -> Iterator[Edge]:
        for i in range(len(w.logins)):
            yield from self._login(w, i)
        for i, t in enumerate(w.tries):
            if t.job:
                yield from self._slurm(w, i, t)
            if t.process:
                for what, process, after, broken in self._process(w, i, t.process):
                    yield Edge(f"job {i + 1} {what}", self._moved(after, i, process), broken)
        if w.zombie is not None:
            i, process, later = w.zombie
            for what, then, after, broken in self._process(w, i, process, zombie=True):
                z = None if then in ("", "exit") else (i, then, after.zombie[2])
                yield Edge(f"zombie {i + 1} {what}", after._replace(zombie=z), broken)
            if process in TRAINING and not later and not w.tries[i].end:
                after = changed(w, i, end="comm")._replace(zombie=None)
                yield Edge(f"zombie {i + 1} fails and says so", after, fault=True)
        yield from self._person(w)
        if w.done and w.declares:
            after = w._replace(done=False, declares=w.declares - 1)
            yield Edge("a task is declared", after, fault=True)
        if w.tries and not w.tries[-1].old and not w.done:
            yield Edge("time passes", changed(w, len(w.tries) - 1, old=True))

    # a login process

    def _login(self, w: World, i: int) -> Iterator[Edge]:
        """One pass: records, snapshot, records again, verdict, close, intent, sbatch, submit."""
        phase, *local = w.logins[i]
        who = f"login {'AB'[i]}"
        newest = w.tries[-1] if w.tries else None

        def to(world: World, *state: Any) -> World:
            return world._replace(logins=(*w.logins[:i], state, *w.logins[i + 1 :]))

        if phase in ("intent", "check", "sbatch", "submit") and w.crashes:
            after = to(w, *IDLE)._replace(crashes=w.crashes - 1)
            yield Edge(f"{who} dies before {phase}", after, fault=True)
        if phase == "idle":
            for ask in (False, True) if w.asks else (False,):
                after = w._replace(asks=w.asks - ask)
                how = "reads, asked to try again" if ask else "reads"
                if newest is not None and not w.done and not newest.end:
                    # Without a second reading it will judge by this one.
                    kept = () if self.protocol.records_again else (self._seen(w), w.step)
                    after = to(after, "read", ask, len(w.tries), *kept)
                    yield Edge(f"{who} {how} (newest is {len(w.tries)})", after, fault=ask)
                elif (edge := self._judged(w, after, to, ask, len(w.tries), "", YOUNG)) is not None:
                    yield edge._replace(name=f"{who} {how}: {edge.name}", fault=ask)
        elif phase == "read":
            ask, number, *kept = local
            count = len(w.tries)
            since = OLD if newest.old else YOUNG
            live = newest.job in ("PENDING", "RUNNING")
            job = visible(w.tries[number - 1].job)
            words = {job, "!"} if self.bounds.silent else {job}
            if job not in ("PENDING", "RUNNING"):
                words.add("")  # Slurm forgets ended jobs
            for word in sorted(words):
                after = to(w, "looked", ask, number, word, count, since, live, *kept)
                said = {"": f"knows no job {number}", "!": "does not answer"}
                what = said.get(word, f"says {word} of job {number}")
                yield Edge(f"{who} looks: Slurm {what}", after, fault=word == "!")
        elif phase == "looked":
            ask, number, word, count, since, live, *kept = local
            if len(w.tries) > count:
                since, live = LATER, False
            if len(w.tries) > number and self.protocol.judges_what_it_asked_for:
                yield Edge(f"{who} reads again: a newer attempt", to(w, *IDLE))
                return
            edge = self._judged(w, w, to, ask, number, word, since, live, kept)
            edge = edge or Edge("nothing to do", to(w, *IDLE))
            yield edge._replace(name=f"{who} reads again: {edge.name}")
        elif phase == "close":
            number, step, knows, cause = local
            after = to(w, "intent", number, step, knows)
            if not w.tries[number - 1].end:
                after = changed(after, number - 1, end=cause)
            yield Edge(f"{who} records that {number} ended ({cause})", after)
        elif phase == "intent":
            number, step, knows = local
            if len(w.tries) == number and number < self.bounds.attempts:
                # Of older attempts nobody asks how old they are.
                past = tuple(t._replace(old=False, submit=False) for t in w.tries)
                new = Try(step, knows, w.trained)
                after = to(w, "sbatch", number)._replace(tries=(*past, new))
                yield Edge(f"{who} makes attempt {number + 1}", after)
            elif len(w.tries) > number and not self.protocol.exclusive_intent:
                yield Edge(f"{who} makes attempt {number + 1} again", to(w, "sbatch", number))
            else:
                yield Edge(f"{who}: attempt {number + 1} is there", to(w, *IDLE))
        elif phase == "sbatch":
            (number,) = local
            broken = "one job" if w.tries[number].job else ""
            after = to(changed(w, number, job="PENDING"), "submit", number)
            yield Edge(f"{who}: sbatch {number + 1}", after, broken)
            if w.lost:
                after = to(changed(w, number, job="?"), *IDLE)._replace(lost=w.lost - 1)
                yield Edge(f"{who}: sbatch {number + 1}, no answer", after, broken, fault=True)
        elif phase == "submit":
            (number,) = local
            after = to(w, *IDLE)
            if number + 1 == len(w.tries):
                after = changed(after, number, submit=True, old=False)
            # Who looked before knows a time that this record is later than.
            others = tuple(
                (*x[:5], YOUNG, *x[6:]) if x[0] == "looked" and x[4] == number + 1 else x
                for x in after.logins
            )
            yield Edge(f"{who} records the answer for {number + 1}", after._replace(logins=others))

    def _judged(
        self,
        w: World,
        after: World,
        to: Any,
        ask: bool,
        number: int,
        word: str,
        since: float,
        live: bool = False,
        kept: Any = (),
    ) -> Edge | None:
        """The end of a pass's look: None if there is nothing to do."""
        tries, step = kept or (self._seen(w), w.step)
        answered = word != "!"
        if not answered and not self.protocol.silence_is_no_verdict:
            word = ""
        v = verdict(tries, step, 0 if kept else w.stage, number, word, since, self.rules)
        if (not answered and self.protocol.silence_is_no_verdict) or not _wanted(v, ask):
            return None
        newest = w.tries[-1] if w.tries else None
        broken = ""
        if w.done:
            broken = "done is the end"
        elif live and not newest.end and not ask:
            broken = "no second job beside a live one"
        elif w.cancelled and not ask:
            broken = "cancelled stays cancelled"
        knows = bool(tries and tries[-1].cancel)
        if ask and knows:
            # A cancel that has marked this attempt and is still under way came before.
            person = ("mark", *w.person[1:3], True) if w.person[:1] == ("mark",) else w.person
            after = after._replace(cancelled=False, person=person)
        last = len(tries)
        if last and not tries[-1].end and v.state in (State.FAILED, State.LOST):
            after = to(after, "close", last, step, knows, str(v.cause))
        else:
            after = to(after, "intent", last, step, knows)
        return Edge(f"{v.state} ({v.cause}), start", after, broken)

    # Slurm

    def _slurm(self, w: World, i: int, t: Try) -> Iterator[Edge]:
        n = i + 1
        if t.job == "?":
            yield Edge(f"job {n} arrives", changed(w, i, job="PENDING"), fault=True)
        elif t.job == "PENDING":
            yield Edge(f"job {n} starts", changed(w, i, job="RUNNING", process="look"))
        elif t.process == "exit":
            word = "FAILED" if t.end not in ("", "done") else "COMPLETED"
            yield Edge(f"job {n} ends", changed(w, i, job=word, process=""))
        elif w.faults:
            hurt = w._replace(faults=w.faults - 1)
            if t.job == "RUNNING":
                for word in ("NODE_FAIL", "PENDING"):
                    after = changed(hurt, i, job=word, process="")
                    what = "is requeued" if word == "PENDING" else "loses its node"
                    yield Edge(f"job {n} {what}", after, fault=True)
                    if w.zombies:
                        after = after._replace(zombie=(i, t.process, False), zombies=w.zombies - 1)
                        yield Edge(f"job {n} {what}, its process lives on", after, fault=True)
                if t.process in TRAINING and not t.end:
                    after = changed(hurt, i, end="comm", process="exit")
                    yield Edge(f"job {n} fails and says so", after, fault=True)
            else:
                after = changed(hurt, i, job="PENDING")
                yield Edge(f"job {n} is requeued after its end", after, fault=True)

    # a process on a node: of the newest start of a job, or a zombie

    def _process(
        self, w: World, i: int, process: str, zombie: bool = False
    ) -> Iterator[tuple[str, str, World, str]]:
        """What it does, what comes next (empty: it leaves), the world after, what it broke."""
        n, records = i + 1, self._seen(w)
        if process == "look":
            if refused(records, w.done, n):
                yield "looks and leaves", "", w, ""
            else:
                yield "looks", "wait", w, ""
        elif process == "wait":
            # A controller that does not answer changes nothing: the job waits on.
            older: tuple[int, ...] = ()
            if self.protocol.predecessors:
                older = waited_for(records, n, self.protocol.asks_about_ended)
            if any(alive(w.tries[k - 1].job) for k in older):
                yield f"waits for {older}", "look", w, ""
            else:
                yield "finds no older job alive", "claim", w, ""
        elif process == "claim":
            after = changed(w, i, claim=True) if self.protocol.claim else w
            if self.protocol.second_look:
                yield "claims", "look again", after, ""
            else:
                yield "claims", "open", after, self._wrongly(w, i)
        elif process == "look again":
            if refused(records, w.done, n):
                yield "looks again and leaves", "", w, ""
            else:
                yield "looks again and trains", "open", w, self._wrongly(w, i)
        elif process == "next" or (
            process == "open" and w.trained and self.protocol.result_ends_training
        ):
            if w.done:
                yield "finds nothing to evaluate", "say", w, ""
            else:
                yield "opens a generation to evaluate", "evaluate", self._opened(w, i, zombie), ""
        elif process == "evaluate":
            yield "evaluates", "say", self._over(w), ""
        elif process == "say":
            yield "says that it is done", "exit", self._said(w, i), ""
        elif process == "open":
            # Only a zombie may have written a result since the last look.
            wrong = w.trained and not self.bounds.zombies
            yield (
                "opens a generation", "write", self._opened(w, i, zombie),
                "done is the end" if wrong else "",
            )  # fmt: skip
        elif process == "write" or (process == "stale" and not self.protocol.fence):
            if self.bounds.window:
                yield "passes the fence", "fenced", w, ""
            else:
                yield self._commit(w, process)
        elif process == "stale":
            yield "is fenced off and leaves", "", w, ""
        elif process in ("fenced", "fenced stale"):
            yield self._commit(w, process)

    def _commit(self, w: World, process: str) -> tuple[str, str, World, str]:
        broken = "one writer" if "stale" in process else ""
        if not w.step:
            return "commits", "stale" if broken else "write", w._replace(step=1), broken
        if self.bounds.evaluates:
            return "writes the result", "next", w._replace(trained=True), broken
        return "writes the result", "exit", self._over(w), broken

    def _over(self, w: World) -> World:
        w = w._replace(trained=True, done=True)
        if w.declares:
            return w
        # What may go wrong afterwards is no news.
        return w._replace(crashes=0, lost=0, faults=0, zombies=0, cancels=0)

    def _said(self, w: World, i: int) -> World:
        """Unless a later start of its job is writing (``job._record_end``)."""
        later = w.zombie is not None and w.zombie[0] == i and w.zombie[2]
        return w if w.tries[i].end or later else changed(w, i, end="done")

    def _wrongly(self, w: World, i: int) -> str:
        """A process begins to train: may it, by what the records say now?"""
        t = w.tries[i]
        if w.done:
            return "done is the end"
        if w.cancelled:
            return "cancelled stays cancelled"
        if i + 1 < len(w.tries) or t.cancel or t.end:
            return "who must not run leaves"
        return ""

    def _opened(self, w: World, i: int, by_zombie: bool) -> World:
        """Every other writer's generation is no longer the newest."""
        old = {"write": "stale", "fenced": "fenced stale"}
        tries = tuple(t._replace(process=old.get(t.process, t.process)) for t in w.tries)
        zombie = w.zombie
        if zombie is not None:
            k, process, _ = zombie
            zombie = (k, old.get(process, process), k == i and not by_zombie)
        return w._replace(tries=tries, zombie=zombie)

    def _moved(self, w: World, i: int, process: str) -> World:
        if process:
            return changed(w, i, process=process)
        return changed(w, i, process="", job="FAILED")

    # a person

    def _person(self, w: World) -> Iterator[Edge]:
        if not w.person:
            if not w.cancels or w.done:
                return
            last = w.tries[-1] if w.tries else None
            word = visible(last.job) if last else ""
            since = OLD if last and last.old else YOUNG
            v = verdict(self._seen(w), w.step, w.stage, len(w.tries), word, since, self.rules)
            if not v.over:
                reach = len(w.tries) if word in ("PENDING", "RUNNING") else 0
                after = w._replace(
                    person=("mark", reach, len(w.tries), False), cancels=w.cancels - 1
                )
                yield Edge("cancel looks", after, fault=True)
        elif w.person[0] == "mark":
            _, reach, known, asked = w.person
            if not w.tries:
                yield Edge("cancel makes attempt 1", w._replace(tries=(Try(0),)))
            elif not w.tries[-1].cancel:
                yield Edge(
                    f"cancel marks {len(w.tries)}", changed(w, len(w.tries) - 1, cancel=True)
                )
            else:
                told = len(w.tries) > max(known, 1)
                after = w._replace(person=("scancel", reach, told), cancelled=not asked)
                yield Edge("cancel has marked all", after)
        else:
            _, reach, told = w.person
            after = w._replace(person=())
            reached = range(len(w.tries)) if self.protocol.cancel_looks_last else [reach - 1]
            for k in reached:
                if k >= 0 and w.tries[k].job in ("PENDING", "RUNNING"):
                    after = changed(after, k, job="CANCELLED", process="")
            missed = any(t.job == "RUNNING" and t.process in TRAINING for t in after.tries)
            yield Edge(
                f"cancel ends job {reach}" if reach else "cancel knows no job", after,
                "cancel reaches the job" if missed and not told and w.cancelled else "",
            )  # fmt: skip


def changed(w: World, i: int, **values: Any) -> World:
    return w._replace(tries=(*w.tries[:i], w.tries[i]._replace(**values), *w.tries[i + 1 :]))


# exploration

INVARIANTS = {
    "one training job": "jobs of two attempts train, and Slurm knows that both run",
    "one writer": "a process commits although a newer generation was opened",
    "one job": "an attempt is submitted twice",
    "done is the end": "there is a result, and a login submits or a job trains",
    "cancelled stays cancelled": "a cancelled run is started that nobody asked for",
    "cancel reaches the job": "a cancel returns without a word, and the run trains on",
    "who must not run leaves": "a job trains whose attempt is not the newest, or is over",
    "no second job beside a live one": "a login starts another attempt, although Slurm had a job",
    "a second pass does nothing": "a pass at once after a pass submits again",
    "no lost run": "with nothing more going wrong, the run still comes to no end",
}


@dataclass
class Explored:
    """The graph of all reachable states."""

    states: int
    transitions: int
    broken: dict[str, list[str]]
    """Per violated invariant the shortest way there."""
    done: int
    """States with a result."""


@cache
def explore(bounds: Bounds, protocol: Protocol = SOUND, stop: str = "") -> Explored:
    """All reachable states; with ``stop`` only as far as the first violation of that invariant."""
    gc.disable()  # it would walk over all states again and again, and there are no cycles
    try:
        return _explore(Model(bounds, protocol), stop)
    finally:
        gc.enable()


def _explore(model: Model, stop: str) -> Explored:
    worlds, numbers = [model.start()], {}
    numbers[worlds[0]] = 0
    parent, by = array("l", [-1]), ["start"]
    fair: list[tuple[int, int]] = []
    broken: dict[str, list[str]] = {}
    transitions = 0

    def trace(number: int, *last: str) -> list[str]:
        names = []
        while number > 0:
            names.append(by[number])
            number = parent[number]
        return [*reversed(names), *last]

    for number, world in enumerate(worlds):  # grows on the way
        if number and (what := _bad(world, model)) and what not in broken:
            broken[what] = trace(number)
        if stop in broken:
            break
        for name, after, bad, fault in model.edges(world):
            transitions += 1
            if bad and bad not in broken:
                broken[bad] = trace(number, name)
            # The login processes are alike.
            key = after._replace(logins=tuple(sorted(after.logins, key=hash)))
            there = numbers.get(key)
            if there is None:
                there = numbers[key] = len(worlds)
                worlds.append(after)
                parent.append(number)
                by.append(name)
            if not fault:
                fair.append((there, number))
    if stop in ("", "no lost run"):
        for number in _hopeless(worlds, fair, model):
            broken["no lost run"] = trace(number)
            break
    return Explored(len(worlds), transitions, broken, sum(w.done for w in worlds))


def _bad(w: World, model: Model) -> str:
    """Name of an invariant of states that this one violates."""
    if sum(t.job == "RUNNING" and t.process in TRAINING for t in w.tries) > 1:
        return "one training job"
    if w.tries:
        last = w.tries[-1]
        now = (OLD if last.old else YOUNG), visible(last.job)
        if not _calm(model._seen(w), w.step, w.stage, *now, model.rules):
            return "a second pass does nothing"
    return ""


@cache
def _calm(
    tries: tuple[Seen, ...], step: int, stage: int, since: float, word: str, rules: Rules
) -> bool:
    """A pass that follows a pass at once, on whatever answer of sbatch, does nothing."""
    v = verdict(tries, step, stage, len(tries), word, since, rules)
    if not v.start:
        return True
    if v.state in (State.FAILED, State.LOST) and not tries[-1].end:
        tries = (*tries[:-1], tries[-1]._replace(end=str(v.cause)))
    new = len(tries) + 1
    return not any(
        verdict((*tries, Seen(step, submit)), step, stage, new, job, YOUNG, rules).start
        for submit, job in ((True, "PENDING"), (False, "PENDING"), (False, ""))
    )


def _hopeless(worlds: list[World], fair: list[tuple[int, int]], model: Model) -> list[int]:
    """States from which, with nothing more going wrong, the run comes to no end.

    An end is a result, a cancel, a failure that ``derive`` calls final, or the wish for one more
    attempt than the bounds allow.
    """
    before: dict[int, list[int]] = {}
    for to, number in fair:
        before.setdefault(to, []).append(number)
    todo = [number for number, world in enumerate(worlds) if _ended(world, model)]
    hopeful = set(todo)
    while todo:
        for number in before.get(todo.pop(), ()):
            if number not in hopeful:
                hopeful.add(number)
                todo.append(number)
    return [number for number in range(len(worlds)) if number not in hopeful]


def _ended(w: World, model: Model) -> bool:
    if not w.tries:
        return False
    last = w.tries[-1]
    v = verdict(model._seen(w), w.step, w.stage, len(w.tries), visible(last.job), OLD, model.rules)
    return v.over or (v.start and len(w.tries) == model.bounds.attempts)


def told(found: Explored) -> str:
    """All violations, each with the steps that lead to it."""
    return "\n".join(
        "\n    ".join([f"{name}: {INVARIANTS[name]}", *steps])
        for name, steps in found.broken.items()
    )


# the protocol holds

WORLDS = {
    "an answer is lost": (Bounds(lost=1), 60_000),
    "a login dies": (Bounds(crashes=1), 50_000),
    "the controller is silent": (
        Bounds(logins=1, crashes=1, lost=1, faults=1, silent=True), 30_000,
    ),
    "jobs die": (Bounds(logins=1, attempts=3, faults=2, window=True), 15_000),
    "processes outlive their jobs": (Bounds(logins=1, faults=2, zombies=1), 80_000),
    "a person cancels": (Bounds(logins=1, crashes=1, faults=1, cancels=1), 80_000),
    "a person cancels and asks again": (Bounds(logins=1, cancels=1, asks=1), 10_000),
    "evaluated: jobs die": (Bounds(logins=1, attempts=3, faults=2, evaluates=True), 20_000),
    "evaluated: an answer is lost": (Bounds(logins=1, attempts=3, lost=1, evaluates=True), 2_500),
    "evaluated: processes outlive their jobs": (
        Bounds(logins=1, faults=1, zombies=1, evaluates=True), 20_000,
    ),
    "evaluated: a person cancels and asks again": (
        Bounds(logins=1, cancels=1, asks=1, evaluates=True), 30_000,
    ),
    "evaluated: declared later, by two logins": (Bounds(evaluates=True, declares=1), 80_000),
    "evaluated: declared later, jobs die": (
        Bounds(logins=1, attempts=3, faults=1, evaluates=True, declares=1), 7_000,
    ),
}  # fmt: skip
"""What may go wrong, and how many states there are at least: an exploration that finds no way out
of the first few proves nothing."""


@pytest.mark.parametrize("world", WORLDS)
def test_the_protocol_holds(world):
    bounds, states = WORLDS[world]
    found = explore(bounds, CODE)
    print(f"{found.states} states, {found.done} with a result, {found.transitions} transitions")
    if found.broken:
        pytest.fail(told(found), pytrace=False)
    assert found.states > states
    assert found.done > states // 20


# and each of its parts is needed

ONE = Bounds(logins=1)
LOST = Bounds(logins=1, lost=1)
MUTATIONS = [
    ({"claim": False}, LOST, "one training job"),
    ({"second_look": False}, LOST, "who must not run leaves"),
    ({"second_look": False}, LOST, "one training job"),
    ({"predecessors": False}, LOST, "one training job"),
    ({"predecessors": False, "result_ends_training": False}, LOST, "done is the end"),
    ({"asks_about_ended": False}, LOST, "one training job"),
    ({"asks_about_ended": False}, Bounds(logins=1, faults=2), "one training job"),
    ({"asks_about_ended": False}, Bounds(logins=1, faults=1, zombies=1), "one training job"),
    # The claim keeps such jobs from writing; they would queue and wait for nothing.
    ({"quarantine_s": 0}, LOST, "a second pass does nothing"),
    ({"quarantine_s": float("inf")}, LOST, "no lost run"),
    ({"fence": False}, Bounds(logins=1, faults=1, zombies=1), "one writer"),
    ({"silence_is_no_verdict": False}, Bounds(logins=1, silent=True),
     "no second job beside a live one"),
    ({"judges_what_it_asked_for": False}, Bounds(), "no second job beside a live one"),
    ({"records_again": False}, ONE, "done is the end"),
    ({"exclusive_intent": False}, Bounds(), "one job"),
    ({"cancel_is_inherited": False}, Bounds(logins=1, cancels=1), "cancelled stays cancelled"),
    ({"result_ends_training": False}, Bounds(logins=1, faults=1, evaluates=True),
     "done is the end"),
    ({"predecessors": False}, Bounds(logins=1, lost=1, evaluates=True), "one training job"),
    ({"cancel_looks_last": False}, Bounds(logins=1, cancels=1), "cancel reaches the job"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "bounds", "invariant"), MUTATIONS, ids=[f"{'+'.join(m[0])}-{m[2]}" for m in MUTATIONS]
)
def test_without_a_part_it_breaks(parts, bounds, invariant):
    whole = explore(bounds, SOUND)
    assert not whole.broken, told(whole)
    found = explore(bounds, replace(SOUND, **parts), invariant)
    assert invariant in found.broken
    print(told(found))


def test_the_fence_is_a_second_line_of_defence():
    """Where Slurm knows of every process, claims alone keep writers apart."""
    found = explore(Bounds(logins=1, attempts=3, faults=2), replace(SOUND, fence=False))
    assert not found.broken, told(found)


def test_the_fence_and_the_commit_are_two_steps():
    """A process that nobody knows of can stop between them for any time. No file system has a
    rename that depends on another name, so such a commit cannot be prevented, only made rare."""
    found = explore(Bounds(logins=1, faults=1, zombies=1, window=True))
    assert set(found.broken) == {"one writer"}
    assert found.broken["one writer"][-1].endswith("commits")
