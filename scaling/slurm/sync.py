"""The only driver: look at records and scheduler, derive states, submit what may be submitted.

``sync`` is idempotent and may run anywhere, any number of times, at the same time: cron, a second
login node, a notebook. Nothing else submits, and no process has to stay alive for a sweep to be
safe. On this host (``executor = "local"``) it starts runs as others end, so there it is watched.
"""

import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scaling import ClueError
from scaling.config import RunConfig
from scaling.rundir import Attempt, RunDir
from scaling.slurm.budget import Prices, committed_hours, excess, grant, read_budget
from scaling.slurm.code import archive, digest_of_package
from scaling.slurm.cost import MARGIN, Estimate
from scaling.slurm.profile import ClusterProfile, private_files, safe_root
from scaling.slurm.state import PASSING, Rules, State, Verdict, bad_nodes, is_cancelled
from scaling.slurm.status import Row, Survey, status, status_row, survey
from scaling.slurm.submission import (
    Candidate,
    Submitted,
    Unreachable,
    array_size,
    close,
    scripts,
    start_attempts,
    within_known_limit,
)

log = logging.getLogger(__name__)
WATCH_S = {"slurm": 60.0, "local": 0.5}
"""Between two looks of a watching sync. [seconds]"""
PATIENT_S = 600.0
"""Longest time between two looks at a scheduler that does not answer. [seconds]"""


@dataclass(frozen=True)
class Orders:
    """What a person said beyond "go on"."""

    person: bool = False
    """A person submits: a submit limit that was met before is tried again."""
    retry_failed: bool = False
    """Give failed, cancelled and lost runs a new attempt, too."""
    new_code: bool | None = None
    """Whether runs with committed steps go on with the code that is here now, where it is not that
    of their last attempt; None: that is asked, where a person retries them."""
    allow_drift: bool = False
    """They may go on with other packages."""


def submit(
    root: Path,
    runs: Sequence[RunDir],
    profile: ClusterProfile,
    *,
    sweep: str,
    retry_failed: bool = False,
    new_code: bool | None = None,
    allow_drift: bool = False,
) -> list[Row]:
    """Submit what is missing of these runs; doing it twice submits nothing twice.

    Everything that can be checked is checked before the first job. Locally at most
    ``profile.max_parallel`` runs start; ``sync(watch=True)`` starts the rest.

    Args:
        sweep: name of the sweep's folder below ``<root>/sweeps``.
        retry_failed: also give failed, cancelled and lost runs a new attempt.
        new_code: whether runs that have committed steps go on with the code that is here now,
            where it has changed since, or with what they ran.
        allow_drift: go on with other versions of the packages that matter.

    Returns:
        Status rows, with ``action``, ``submit`` or None, and ``waiting``: why a run that could
        start does not, or None.

    Raises:
        ConfigError: a run does not fit the profile.
        CorpusError: a run's corpus is not prepared below ``root``.
        SubmissionError: the scheduler refused, or does not answer.
        ClueError: runs to be retried ran other code, and ``new_code`` does not say which.
    """
    check_runs(root, [run.spec() for run in runs], profile)
    orders = Orders(True, retry_failed, new_code, allow_drift)
    return _pass(root, runs, profile, sweep, orders)


def check_runs(root: Path, configs: Iterable[RunConfig], profile: ClusterProfile) -> None:
    """Check that runs fit a profile and that their corpora are there.

    Raises:
        ConfigError, CorpusError: they do not, or are not.
    """
    from scaling.data.corpus import Corpus

    digests = set()
    for config in configs:
        profile.shape_of(config)
        digests.add(config.data.corpus_digest)
    for digest in sorted(digests):
        Corpus.find(root, digest)


@dataclass(frozen=True)
class Preview:
    """What a submission would do."""

    rows: list[Row]
    """Status rows of all runs; ``action`` is ``submit`` for those that it would submit."""
    arrays: list[tuple[int, str]]
    """Size and job script of every array; none on this host."""
    costs: dict[str, Estimate]
    """What the rest of each of those runs will take, by run key."""


def preview(
    root: Path,
    configs: Sequence[RunConfig],
    profile: ClusterProfile,
    *,
    sweep: str,
    plan: Sequence[Mapping[str, Any]] = (),
    budget: float | None = None,
    retry_failed: bool = False,
    new_code: bool | None = None,
    wanted: Sequence[str] = (),
) -> Preview:
    """What ``submit`` would do with these runs now, which need no folders yet; touches nothing.

    Args:
        wanted: keys of the evaluations that would be declared.
        plan: plan rows of the runs, for their estimates.
        budget: that would hold; None: none. [GPU-hours]

    Raises:
        As ``submit``.
    """
    root = safe_root(root)
    runs = [RunDir(root, config.run_key) for config in configs]
    snapshot, derived = survey(runs, _rules(profile), wanted)
    if not snapshot.answered:
        raise Unreachable(f"nothing submitted: {snapshot.note}")
    if profile.executor == "slurm":
        array_size(profile)  # asks the cluster, as a submission would
    orders = Orders(True, retry_failed, new_code)
    prices = Prices.of_plan(root, plan, wanted)
    choice = _choose(derived, profile, orders, prices, budget, configs=configs)
    rows = _rows(derived, {c.run.run_key: None for c in choice.candidates}, choice)
    arrays = []
    if profile.executor == "slurm":
        exclude = bad_nodes(_attempts(derived), time.time())
        arrays = [
            (len(chunk.candidates), script)
            for chunk, script in scripts(root, choice.candidates, profile, sweep, exclude)
        ]
    costs = {c.run.run_key: c.estimate for c in choice.candidates if c.estimate is not None}
    return Preview(rows, arrays, costs)


def sync(
    root: Path,
    runs: Sequence[RunDir],
    profile: ClusterProfile,
    *,
    sweep: str,
    watch: bool = False,
    interval_s: float | None = None,
    report: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Bring runs towards their end: submit what is planned or may be tried again.

    Args:
        watch: go on until every run is over (done, diverged, cancelled, or failed for good).
        interval_s: between two looks; None: once a minute on Slurm. [seconds]
        report: called with the rows after every look.

    Returns:
        Status rows, with ``action``.

    Raises:
        SubmissionError: as ``submit``; while watching, a scheduler that does not answer is waited
            for.
    """
    pause = WATCH_S[profile.executor] if interval_s is None else interval_s
    silent = 0
    while True:
        try:
            rows = _pass(root, runs, profile, sweep, Orders())
        except Unreachable as e:
            if not watch:
                raise
            log.warning("%s", e)  # a controller that is down for an hour ends no watch
            rows = status(runs, _rules(profile))
            silent += 1
        else:
            unknown = any(row["stale"] and row["stale"] not in PASSING for row in rows)
            silent = silent + 1 if unknown else 0
        if report is not None:
            report(rows)
        if not watch or all(row["over"] for row in rows):
            return rows
        # Many who watch must not all ask at once, least of all a controller that is overloaded.
        wait = min(pause * 2 ** min(silent, 10), max(pause, PATIENT_S))
        time.sleep(wait * random.uniform(0.9, 1.1))


def _rules(profile: ClusterProfile) -> Rules:
    return Rules(profile.quarantine_s, profile.settle_s)


def _pass(
    root: Path, runs: Sequence[RunDir], profile: ClusterProfile, sweep: str, orders: Orders
) -> list[Row]:
    root = safe_root(root)
    snapshot, derived = survey(runs, _rules(profile))
    if not snapshot.answered:  # an unknown state changes nothing: it must not hide a job that runs
        return _rows(derived, {}, Choice())
    with private_files():
        derived = [(run, close(run, facts, verdict), verdict) for run, facts, verdict in derived]
        busy = sum(v.state in (State.QUEUED, State.RUNNING) for _, _, v in derived)
        room = max(0, profile.max_parallel - busy)
        prices, budget = Prices.read(root, sweep), read_budget(root, sweep)
        choice = _choose(derived, profile, orders, prices, budget, room=room)
        if choice.candidates:
            archive(root)
        started = start_attempts(
            root,
            choice.candidates,
            profile,
            sweep,
            exclude=bad_nodes(_attempts(derived), time.time()),
            others=[
                f.attempts[-1]
                for _, f, v in derived
                if f.attempts and v.state in (State.QUEUED, State.RUNNING)
            ],
            excess=None if budget is None else lambda: excess(runs, budget),
        )
    new = {s.run_key: s for s in started.submitted}
    if started.held and not choice.held:
        choice = replace(choice, held=started.held)
    return _rows(derived, new, choice)


@dataclass(frozen=True)
class Choice:
    """Runs that get a new attempt now, on what terms, and why no others do."""

    candidates: Sequence[Candidate] = ()
    held: str = ""
    for_a_person: bool = False
    """What holds them back does not pass by itself: a budget, a full disk."""


def _choose(
    derived: Survey,
    profile: ClusterProfile,
    orders: Orders,
    prices: Prices | None,
    budget: float | None,
    *,
    room: int | None = None,
    configs: Sequence[RunConfig] | None = None,
) -> Choice:
    """Choose the runs that get a new attempt.

    Args:
        room: runs that may start on this host, where others start as these end; None: all.
        configs: of the runs; None: their folders say it.

    Raises:
        ClueError: some ran other code, and nobody said which to go on with.
    """
    if not orders.retry_failed:
        for _, _, v in derived:
            if v.cause == "disk_full" and not v.start:
                why = f"{v.evidence}: nothing is started until submit --retry-failed"
                return Choice(held=why, for_a_person=True)
    candidates = _candidates(derived, orders, configs)
    held = ""
    if profile.executor == "local":
        candidates = candidates[:room]
    elif candidates and not orders.person:
        within, held = within_known_limit(candidates, _attempts(derived), profile)
        candidates = list(within)
    if not candidates:
        return Choice(held=held)
    if prices is not None:
        candidates = [replace(c, estimate=prices.of(c.run, c.config, profile)) for c in candidates]
    if budget is not None:
        try:
            taken = committed_hours(
                [run for run, _, _ in derived], {run.run_key: f for run, f, _ in derived}
            )
            granted = grant(candidates, budget - taken)
        except ClueError as e:  # what cannot be told may be too much
            return Choice(held=str(e), for_a_person=True)
        if len(granted) < len(candidates):
            taken += sum(c.allowance or 0.0 for c in granted)
            next_run = candidates[len(granted)].estimate
            wanted = MARGIN * next_run.gpu_hours if next_run else 0.0
            held = (
                f"of the budget of {budget:g} GPU-hours {taken:.3g} are spent or reserved, and the "
                f"next run reserves {wanted:.3g} ({MARGIN} times its estimate)"
            )
            return Choice(granted, held, for_a_person=True)
        candidates = granted
    return Choice(candidates, held)


def _rows(derived: Survey, started: Mapping[str, Submitted | None], choice: Choice) -> list[Row]:
    """Rows of all runs.

    Args:
        started: what was submitted, by run key; None for what would be.
    """
    held = choice.held
    rows = []
    for run, facts, verdict in derived:
        chosen, new = run.run_key in started, started.get(run.run_key)
        if new is not None:
            verdict = Verdict(State.QUEUED, new.attempt, new.job_id)
        row = status_row(run, facts, verdict)
        row["action"] = "submit" if chosen else None
        row["waiting"] = held if held and verdict.start and not chosen else None
        rows.append(row)
    running = any(row["state"] in (State.QUEUED, State.RUNNING) for row in rows)
    if choice.for_a_person and not running:
        for row in rows:
            row["over"] = row["over"] or row["waiting"] is not None
    return rows


def _wanted(verdict: Verdict, retry_failed: bool) -> bool:
    again = verdict.state in (State.FAILED, State.CANCELLED, State.LOST)
    return verdict.start or (retry_failed and again and verdict.cause != "damaged")


def _candidates(
    derived: Survey, orders: Orders, configs: Sequence[RunConfig] | None
) -> list[Candidate]:
    candidates, changed = [], []
    now = ""
    for i, (run, facts, verdict) in enumerate(derived):
        if not _wanted(verdict, orders.retry_failed):
            continue
        now = now or digest_of_package()
        newest = facts.attempts[-1] if facts.attempts else None
        # What is trained can be changed by no code any more.
        begun = facts.committed and facts.status is None
        ran = _code_of(facts.attempts) if begun else None
        code = now if ran is None or orders.new_code else ran
        if code != now and orders.retry_failed and orders.new_code is None:
            changed.append(run.run_key)
        # What a person said holds until a job has heard it.
        said = newest is not None and newest.claim is None and newest.intent.get("allow_drift")
        candidates.append(
            Candidate(
                run,
                configs[i] if configs else run.spec(),
                facts,
                verdict,
                code,
                again=orders.retry_failed and is_cancelled(facts.attempts),
                allow_drift=orders.allow_drift or bool(said),
            )
        )
    if changed:
        raise ClueError(
            f"{len(changed)} runs ({', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}) "
            "have checkpoints and the code has changed since: go on with what they ran "
            "(--keep-code), or with what is here now (--new-code)"
        )
    return candidates


def _code_of(attempts: Sequence[Attempt]) -> str | None:
    """The code that the newest attempt was to run."""
    codes = (a.intent.get("code") for a in reversed(attempts))
    return next((str(code) for code in codes if code), None)


def _attempts(derived: Survey) -> list[Attempt]:
    """All attempts of all runs; of finished runs only where there was more than one."""
    found: list[Attempt] = []
    for run, facts, _ in derived:
        found += facts.attempts or (run.attempts() if facts.newest > 1 else ())
    return found
