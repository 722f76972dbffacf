"""What a job ran on: interpreter and packages, GPUs and driver, node, Slurm's view of the job.

    <root>/environments/<digest>.json     interpreter, packages, driver: shared by all that had them

Names of environment variables are an allow-list, so that no secret can reach a record.
"""

import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from scaling.config import canonical_json, short_digest
from scaling.files import create_json, read_json
from scaling.slurm.scheduler import command

RECORDED = re.compile(
    r"SLURM_(CLUSTER_NAME|JOB_PARTITION|JOB_QOS|JOB_ACCOUNT|JOB_NODELIST|JOB_NUM_NODES|NTASKS"
    r"|CPUS_PER_TASK|CPUS_ON_NODE|GPUS_ON_NODE|MEM_PER_NODE|RESTART_COUNT|ARRAY_JOB_ID"
    r"|ARRAY_TASK_ID|JOB_ID)"
    r"|OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|NCCL_(DEBUG|IB_DISABLE|SOCKET_IFNAME|P2P_DISABLE|ALGO"
    r"|PROTO)|TORCH_NCCL_[A-Z_]+|CUBLAS_WORKSPACE_CONFIG|MKL_NUM_THREADS"
)
"""Variables that are recorded; no other ever is."""
NUMERIC = re.compile(r"torch|deepspeed|numpy|safetensors|triton|nvidia-.*")
"""Packages whose version may change what a run computes."""
_SMI = "name,uuid,driver_version,clocks.max.sm"


def capture(root: Path) -> dict[str, Any]:
    """What this process runs on. Packages and driver go to a record that all share.

    Returns:
        ``environment`` (the digest of that record), ``gpus`` and ``variables``.
    """
    gpus = _gpus()
    shared = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "driver": gpus[0]["driver_version"] if gpus else None,
        "packages": _packages(),
    }
    digest = short_digest(canonical_json(shared))
    create_json(_path(root, digest), {"schema_version": 1, **shared})
    variables = {k: v for k, v in sorted(os.environ.items()) if RECORDED.fullmatch(k)}
    return {"environment": digest, "gpus": gpus, "variables": variables}


def drift(root: Path, before: str, now: str) -> list[str]:
    """What of interpreter and numeric packages differs between two environments, ``a 1 -> 2``.

    Raises:
        RecordError: one of them has no record.
    """
    if before == now:
        return []
    old, new = (_numeric(read_json(_path(root, digest))) for digest in (before, now))
    names = sorted({*old, *new})
    return [
        f"{name} {old.get(name, 'none')} -> {new.get(name, 'none')}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _packages() -> dict[str, str]:
    """Versions by name; of a package found twice the one that comes first on the path."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        about = distribution.metadata
        if about["Name"]:
            found.setdefault(about["Name"].lower().replace("_", "-"), about["Version"])
    return dict(sorted(found.items()))


def _numeric(record: Mapping[str, Any]) -> dict[str, str]:
    minor = ".".join(str(record["python"]).split(".")[:2])
    return {"python": minor} | {
        name: version for name, version in record["packages"].items() if NUMERIC.fullmatch(name)
    }


def _path(root: Path, digest: str) -> Path:
    return Path(root) / "environments" / f"{digest}.json"


def _gpus() -> list[dict[str, str]]:
    """The GPUs that this job sees; none where there is no ``nvidia-smi``."""
    ok, output = command("nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader", timeout_s=10)
    if not ok:
        return []
    rows = (line.split(", ") for line in output.splitlines())
    return [dict(zip(_SMI.split(","), row, strict=False)) for row in rows if len(row) == 4]
