"""Which kind of failure ended a job: from the exception it died of, or from what it printed.

The kinds and what follows from each: ``FRUITLESS_LIMIT`` in ``scaling.slurm.state``.
"""

import errno
import re
from collections.abc import Iterator
from pathlib import Path

PATTERNS = tuple(
    (cause, re.compile(pattern, re.IGNORECASE))
    for cause, pattern in (
        (
            "node_fail",
            r"\bNVRM: Xid|\bXid \(|uncorrectable (NVLink|ECC)|\bECC error|fallen off the bus"
            r"|no CUDA-capable device|CUDA driver initialization failed"
            r"|CUDA error: hardware",
        ),
        (
            "gpu_oom",
            r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
            r"|torch(\.cuda)?\.OutOfMemoryError",
        ),
        (
            "host_oom",
            r"DefaultCPUAllocator: |could not create a primitive|oom[-_ ]kill|\bOOM Killed"
            r"|Out of memory: Killed|std::bad_alloc|Cannot allocate memory",
        ),
        ("disk_full", r"No space left on device|Disk quota exceeded"),
        (
            "comm",
            r"\bNCCL (WARN|error|communicator)|\bnccl(Unhandled|System|Remote|Internal)"
            r"|\bgloo\b.*(clos|time|refus|reset|fail)|Connection (closed|reset) by peer"
            r"|EADDRINUSE|watchdog.*timeout|DistBackendError|DistNetworkError|DistStoreError",
        ),
    )
)
"""Words of the kinds, the cause before its consequences: a rank whose GPU fell off makes all others
report NCCL. Of torch, oneDNN, gloo, NCCL, the NVIDIA driver, the kernel and Slurm's oom handler."""
START_LINE = "clue-scaling: start"
"""Begins a job's output, with Slurm's restart count: logs are appended to."""
UNCAUGHT = re.compile(
    r"^error: |^(?!Traceback)[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b(: .*)?$"
)
"""Last line of a traceback, or what the job script says."""
_COMM = {"DistBackendError", "DistNetworkError", "DistStoreError", "PeerError"}


def classify(error: BaseException, root: Path | None = None) -> str:
    """Kind of a failure, from the exception and what caused it.

    Args:
        root: the root folder. A disk that is full elsewhere is a node's own (``/tmp``): another
            node may do.
    """
    for one in _chain(error):
        names = {c.__name__ for c in type(one).__mro__}
        if "OutOfMemoryError" in names:
            return "gpu_oom"
        if isinstance(one, MemoryError):
            return "host_oom"
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            elsewhere = root and one.filename and not _below(str(one.filename), root)
            return "node_fail" if elsewhere else "disk_full"
        if names & _COMM:
            return "comm"
        # The words of Python's own errors are the user's; those of torch come as RuntimeErrors.
        if isinstance(one, RuntimeError) and (cause := _of_text(str(one))):
            return cause
    return "error"


def explain(text: str) -> tuple[str, str] | None:
    """Kind of a failure and the line that says so, from the end of a job's log; None if it is mute.

    Where several lines speak, the most fundamental kind counts, and its first line.
    """
    lines = text.splitlines()
    for cause, pattern in PATTERNS:
        for line in lines:
            if pattern.search(line):
                return cause, line.strip()[:500]
    for line in reversed(lines):
        if UNCAUGHT.match(line):
            return "error", line.strip()[:500]
    return None


UNCLEAR = re.compile(
    r"timed out|Zero Bytes|Unexpected message|Communication connection|Connection reset|transient",
    re.IGNORECASE,
)
"""What sbatch says where a job may have been accepted all the same."""
REFUSALS = tuple(
    (cause, re.compile(pattern, re.IGNORECASE))
    for cause, pattern in (
        ("rejected", r"Per(Job|Node)|MaxWall|MaxCpuPerJob|MaxTRESPerJob"),
        (
            "limit",
            r"AssocMax|AssocGrp|QOSMax|QOSGrp|MaxSubmit|submit limit|accounting/QOS"
            r"|temporarily un(able|available)|MaxJobCount",
        ),
        ("unreachable", r"Unable to contact slurm controller|Connection refused"),
        ("rejected", r"submission failed|sbatch: (error|fatal)|command not found"),
    )
)
"""Words with which sbatch certainly accepted nothing, the first that fits."""


def refused_as(message: str) -> str | None:
    """Why sbatch certainly accepted nothing: ``limit``, ``unreachable`` or ``rejected``; None where
    it may have: ``Socket timed out`` and the like, or an answer that says nothing."""
    if UNCLEAR.search(message):
        return None
    return next((cause for cause, pattern in REFUSALS if pattern.search(message)), None)


def _below(path: str, root: Path) -> bool:
    return Path(path).absolute().is_relative_to(root.absolute())


def _of_text(text: str) -> str | None:
    return next((cause for cause, pattern in PATTERNS if pattern.search(text)), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__ or one.__context__
