"""What runs on the nodes: the one function that submitit starts, once per rank.

Claim the attempt, set up the rank's environment, train, evaluate, and leave a record of the end.
What does so is named by strings and imported last, so that a superseded job ends before torch is
loaded.
"""

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from submitit import JobEnvironment
from submitit.helpers import TorchDistributedEnvironment

from scaling import ClueError
from scaling.config import Evaluation, TrainSettings
from scaling.files import RecordError, read_json
from scaling.rundir import Attempt, RunDir, Superseded, chunk_folder
from scaling.slurm.claims import STOPPED, await_claim, claim
from scaling.slurm.code import PACKAGE, running_from, verify
from scaling.slurm.environment import capture, drift
from scaling.slurm.evaluating import Tell, evaluate_missing
from scaling.slurm.failures import START_LINE, classify
from scaling.slurm.profile import check_owner
from scaling.slurm.scheduler import command, process_identity
from scaling.slurm.state import is_cancelled

TRAIN = "scaling.train.loop:train"
"""What a job runs, by name: nothing here imports torch."""
EVALUATE = "scaling.transfer.evaluate:evaluate"
CORPUS = "scaling.data.corpus:Corpus"
EXIT_SUPERSEDED = 93
"""Exit status of a job that must not run: another attempt owns the run, or it is over."""
LISTING_S = 60.0
"""A folder's listing may be as old on a node (NFS caches). [seconds]"""
EARLY_S = 60.0
"""So much earlier than asked Slurm may signal the end of the wall time. [seconds]"""
TELL_S = 60.0
"""Between two lines of progress in the log. [seconds]"""
ROOT_CAUSE_S = 5.0
"""A rank that failed because another did leaves that one this time to say why. [seconds]"""
BUDGET = "the budget's share of this attempt is spent"
FRUITLESS_STARTS = 3
"""Starts of one job in a row (preempted, requeued) from the same checkpoint, after which it gives
up: slices too short for a step would go on for ever."""
_PR_SET_PDEATHSIG = 1


class StopFlag:
    """Set by SIGUSR2 (wall time ends) and SIGTERM (preemption, cancel); polled by training.

    The handler does nothing else: a checkpoint begun inside one could interrupt itself. Where a
    budget holds, an alarm of it stops training likewise.
    """

    def __init__(self) -> None:
        self.by = ""
        self.since = 0.0
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.stop(signal.Signals(number).name)

    def stop(self, by: str) -> None:
        """Have training stop; the first reason counts."""
        if not self.by:
            self.by, self.since = by, time.monotonic()

    def stop_after(self, seconds: float) -> None:
        """Have training stop when the budget's share of this attempt is spent."""
        timer = threading.Timer(max(0.0, seconds), self.stop, [BUDGET])
        timer.daemon = True
        timer.start()

    def __call__(self) -> bool:
        return bool(self.by)


def run_job(root: str, sweep: str, token: str) -> NoReturn:
    """Run one rank of one attempt: which one, ``chunk.json`` and the index in the array say.

    It leaves by ``SystemExit``, which submitit passes on without pickling a result: 0 when the run
    is over or goes on in a later slice, 93 when superseded, 1 on an error.
    """
    began = time.time()
    stop = StopFlag()
    environment = JobEnvironment()
    rank = int(environment.global_rank)
    local = environment.name() == "local"
    if local:
        _die_with_controller(int(environment.job_id))
    index = int(environment.array_task_id or 0)
    for stream in (sys.stdout, sys.stderr):
        print(START_LINE, os.environ.get("SLURM_RESTART_COUNT", "0"), file=stream, flush=True)
    folder = chunk_folder(Path(root), sweep, token)
    run = RunDir(Path(root), read_json(folder / "chunk.json")["runs"][index])
    check_owner(Path(root).resolve(), folder, run.path)
    attempt = _attempt(run, token)
    number = attempt.number
    job = {
        "began": began,
        "executor": environment.name(),
        "job_id": str(environment.job_id),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "nodes": list(environment.hostnames),
    }
    if local:
        job |= process_identity(int(environment.job_id))
    if rank == 0 and (allowance := attempt.intent.get("allowance_gpu_hours")) is not None:
        left = 3600 * (float(allowance) - run.gpu_hours(number)) / environment.num_tasks
        stop.stop_after(left - (time.time() - began))
    reason = claim(run, number, job, stop) if rank == 0 else await_claim(run, number, job)
    if reason == STOPPED:
        _stopped(run, attempt, job, stop)
        _leave(EXIT_SUPERSEDED, local, environment.num_tasks)
    if reason:
        print(f"superseded: {reason}", file=sys.stderr)
        if rank == 0 and run.attempts()[-1].number != number:
            _record_end(run, number, job, "superseded", reason)
        _leave(EXIT_SUPERSEDED, local, environment.num_tasks)
    set_environment(environment, attempt.intent)
    job |= {
        "profile": attempt.intent["profile"],
        "cpus_per_task": attempt.intent["shape"]["cpus_per_task"],
    }
    try:
        _check(run, attempt, job, rank)
        result = _train(run, attempt, job, stop)
        over = result is not None
        if rank == 0 and result is not None and result["status"] == "done":
            over = _evaluate(run, attempt, job, stop, environment.num_tasks)
    except Superseded as e:
        print(f"superseded: {e}", file=sys.stderr)
        _leave(EXIT_SUPERSEDED, local, environment.num_tasks)
    except Exception as e:
        _tell(traceback.format_exc())
        cause = e.cause if isinstance(e, Unfit) else classify(e, run.root)
        if cause == "comm":
            time.sleep(ROOT_CAUSE_S)
        # A connection that broke while the job was being stopped is no failure.
        if not (cause == "comm" and stop()):
            _record_end(run, number, job, cause, f"rank {rank}: {type(e).__name__}: {e}"[:500])
        _leave(1, local, environment.num_tasks)
    if rank == 0:
        if over and result is not None:
            _record_end(run, number, job, str(result["status"]), "")
        else:
            _stopped(run, attempt, job, stop)
    raise SystemExit(0)


def _attempt(run: RunDir, token: str) -> Attempt:
    """The attempt that this job is of. A network file system may list it a while after it was
    written on another host."""
    end = time.monotonic() + LISTING_S
    while True:
        for attempt in run.attempts():
            if attempt.intent["token"] == token:
                return attempt
        if time.monotonic() > end:
            raise RecordError(f"{run.path}/attempts: none is of submission {token}")
        time.sleep(1.0)


class Unfit(ClueError):
    """The job must not train here; ``cause`` is the class of the attempt's end."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def _check(run: RunDir, attempt: Attempt, job: dict[str, Any], rank: int) -> None:
    """Check what must hold before training: the code, the packages, and that starts get on.

    Rank 0 alone looks at the run's past, and adds to ``job`` what it runs on.

    Raises:
        CodeError: the archive is missing or was changed.
        Unfit: it is not what runs; packages that matter are others than before; or the job has
            started several times without a newly committed step.
    """
    digest = attempt.intent["code"]
    verify(run.root, digest)
    if not running_from(run.root, digest):
        raise Unfit(
            "error",
            f"the job imports scaling from {PACKAGE} and not from the archive {digest}: does "
            "'setup' of the profile change PYTHONPATH?",
        )
    if rank:
        return
    result = run.result()
    newest, missing = max(run.committed_steps(), default=0), None
    if result is not None:  # it is only evaluated
        newest, missing = int(result["step"]), len(run.evaluations()[1])
    job |= capture(run.root)
    starts = run.starts()
    earlier = [(s.get("job") or {}).get("environment") for s in starts]
    trains = newest and result is None
    before = [e for e in earlier if e] if trains and not attempt.intent["allow_drift"] else []
    changed = drift(run.root, before[-1], job["environment"]) if before else []
    if changed:
        raise Unfit(
            "drift",
            f"{', '.join(changed[:6])}: not what the run was trained with so far; go on with "
            "submit --retry-failed --allow-drift",
        )
    mine = [
        (s["resumed_from"], s.get("missing")) for s in starts if s.get("attempt") == attempt.number
    ]
    if mine[-FRUITLESS_STARTS:] == [(newest, missing)] * FRUITLESS_STARTS:
        raise Unfit(
            "no_progress",
            f"{FRUITLESS_STARTS} starts in a row from step {newest}, and none committed another: "
            "longer slices (time_min), or checkpoints more often (checkpoint_every)"
            if missing is None
            else f"{FRUITLESS_STARTS} starts in a row, and none finished one of {missing} "
            "evaluations: longer slices (time_min)",
        )


# environment and training


def set_environment(environment: JobEnvironment, intent: dict[str, Any]) -> None:
    """Tell torch.distributed who this rank is, and the BLAS and OpenMP how many CPUs it has.

    submitit would show each rank only its own GPU, while DeepSpeed asks for the GPU of number
    LOCAL_RANK: so all GPUs of the job stay visible.
    """
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT"):  # fmt: skip
        os.environ.pop(name, None)  # of the shell that submitted
    if environment.num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        os.environ["MASTER_ADDR"] = _master_address(environment)
    threads = int(intent["train"]["threads"]) or int(intent["shape"]["cpus_per_task"])
    os.environ["OMP_NUM_THREADS"] = str(threads)


def _master_address(environment: JobEnvironment) -> str:
    """Where rank 0 listens: the first node's name, or the address srun was started at (the same
    node) where node names do not resolve."""
    if environment.num_nodes == 1:
        return "127.0.0.1"
    name = str(environment.hostnames[0])
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return os.environ.get("SLURM_LAUNCH_NODE_IPADDR", name)
    return name


def _named(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _train(
    run: RunDir, attempt: Attempt, job: dict[str, Any], stop: StopFlag
) -> dict[str, Any] | None:
    corpus = _named(CORPUS).find(run.root, run.spec().data.corpus_digest)
    settings = TrainSettings.parse(attempt.intent["train"], f"attempt {attempt.number}")
    if not settings.threads:
        settings = settings.model_copy(update={"threads": int(os.environ["OMP_NUM_THREADS"])})
    result: dict[str, Any] | None = _named(TRAIN)(
        run,
        corpus,
        settings,
        attempt=attempt.number,
        job=job,
        progress=_Progress(),
        should_stop=stop,
    )
    return result


def _evaluate(
    run: RunDir, attempt: Attempt, job: dict[str, Any], stop: StopFlag, ranks: int
) -> bool:
    """Evaluate what is missing, on rank 0 alone; whether that is done."""
    if any((s.get("job") or {}).get("began") == job["began"] for s in run.starts()):
        job = {**job, "began": time.time()}  # what came before counts as training

    def evaluate(wanted: Sequence[Evaluation], tell: Tell) -> None:
        corpus = _named(CORPUS).find(run.root, run.spec().data.corpus_digest)
        _named(EVALUATE)(run, corpus, wanted, progress=tell, should_stop=stop)

    start = {"attempt": attempt.number, "job": job, "world_size": ranks}
    return evaluate_missing(run, start, evaluate, stop)


class _Progress:
    """Tells the log how far a run is, once a minute."""

    def __init__(self) -> None:
        self.told, self.first = 0.0, (0.0, 0)

    def __call__(self, step: int, steps: int, loss: float | None) -> None:
        now = time.monotonic()
        if not self.told:
            self.first = (now, step)
        if self.told and now < self.told + TELL_S and step < steps:
            return
        self.told = now
        since, before = self.first
        pace = (step - before) / (now - since) if now > since else 0.0
        left = f", {pace:.3g} steps/s, {(steps - step) / pace / 60:.0f} min to go" if pace else ""
        print(f"step {step:,} of {steps:,}, loss {loss:.4g}{left}", flush=True)


# ending


def _record_end(run: RunDir, number: int, job: dict[str, Any], cause: str, evidence: str) -> None:
    """Say how the attempt ended, unless a later start of it (a requeue) is writing by now.

    Where that fails, on a disk that is full say, the log has it and the scheduler has the rest.
    """
    _tell(f"attempt {number} ends: {cause}{', ' if evidence else ''}{evidence}")
    try:
        generation = 0
        if starts := run.starts():
            newest = starts[-1]
            generation = int(newest["generation"])
            restart = (newest.get("job") or {}).get("restart", 0)
            if newest.get("attempt") == number and restart > job["restart"]:
                return
        progress = run.progress()
        run.record(
            number,
            "end",
            {
                "class": cause,
                "evidence": evidence,
                "step": int(progress["step"]) if progress else 0,
                "generation": generation,
                "host": socket.gethostname(),
                "time": time.time(),
            },
        )
    except (OSError, ValueError, RecordError) as e:
        _tell(f"attempt {number} ended ({cause}), which could not be recorded: {e}")


def _stopped(run: RunDir, attempt: Attempt, job: dict[str, Any], stop: StopFlag) -> None:
    """Training stopped on a signal, its checkpoint is committed: have it go on later.

    Slurm requeues a preempted job by itself, and one that a person cancels must not come back:
    only a job that Slurm still calls RUNNING asks for it.
    """
    number, took = attempt.number, time.monotonic() - stop.since
    lead = float(attempt.intent["signal_lead_s"])
    if stop.by == signal.SIGUSR2.name and took > (lead - EARLY_S) / 2:
        _tell(
            f"warning: stopping took {took:.0f} s of the {lead:.0f} s before the wall time's end "
            "(signal_lead_s, of which Slurm may take a minute); raise it"
        )
    if is_cancelled(run.attempts()):
        _record_end(run, number, job, "cancelled", stop.by)
        return
    if stop.by == BUDGET:
        _record_end(run, number, job, "budget", stop.by)
        return
    if job["executor"] == "local":
        _record_end(run, number, job, "stopped", stop.by)
        return
    ok, output = command("squeue", "--noheader", f"--jobs={job['job_id']}", "--format=%T")
    if ok and output.strip() == "RUNNING":
        ok, output = command("scontrol", "requeue", job["job_id"])
    if not ok:
        _record_end(run, number, job, "stopped", f"{stop.by}; not requeued: {output}")


def _tell(message: str) -> None:
    """Print to the log, which may lie on the full disk."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def _leave(status: int, local: bool, ranks: int) -> NoReturn:
    """End this rank and with it, where srun does not see to it, the others of a failed run."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    if local and ranks > 1:
        os.kill(os.getppid(), signal.SIGKILL)
    raise SystemExit(status)


def _die_with_controller(controller: int) -> None:
    """Have the kernel end this rank when submitit's controlling process dies.

    The controller is what identifies a local job; ranks that outlived it would write unseen.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != controller:
        raise SystemExit(EXIT_SUPERSEDED)
