"""Kinds of failures, from exceptions and from logs as the programs print them."""

import errno
from pathlib import Path

import pytest

from scaling.slurm.failures import classify, explain, refused_as

LOGS = {
    "node_fail": "torch.distributed.DistBackendError: NCCL error in: x.cpp:1\n"
    "[ 5.1] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.",
    "gpu_oom": "Traceback (most recent call last):\n  File ...\n"
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
    "host_oom": "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step "
    "tasks have been OOM Killed.",
    "disk_full": "OSError: [Errno 28] No space left on device: '/scratch/x'",
    "comm": "[rank1]:[E ProcessGroupNCCL.cpp:616] Watchdog caught collective operation timeout",
    "error": 'Traceback (most recent call last):\n  File "a.py", line 1\n'
    "ModuleNotFoundError: No module named 'deepspeed'\nsrun: error: node1: task 0: Exited",
}


@pytest.mark.parametrize(("cause", "text"), LOGS.items())
def test_logs(cause, text):
    found = explain(
        f"step 1 loss 3.2\nstep 2 loss 3.1\n{text}\nsrun: error: gpu1: task 0: Killed\n"
    )
    assert found is not None
    assert found[0] == cause
    assert found[1] in text


def test_a_mute_log_explains_nothing():
    assert explain("") is None
    assert explain("step 1 loss 3.2\nerror rate 0.1, no exception\nsrun: Killed\n") is None


def test_chatter_explains_nothing():
    said = "x:1 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB\nbackend gloo, world size 2\n"
    assert explain(said + "srun: error: node1: task 0: Segmentation fault\n") is None
    assert explain(said + "node1:9 [0] NCCL WARN Connect to 10.0.0.2 failed\n")[0] == "comm"


def test_a_disk_that_is_full_elsewhere_is_the_nodes(tmp_path):
    def full(path):
        return OSError(errno.ENOSPC, "No space left on device", str(path))

    assert classify(full(tmp_path / "root" / "runs" / "x"), tmp_path / "root") == "disk_full"
    assert classify(full("/dev/shm/torch"), tmp_path / "root") == "node_fail"
    assert classify(OSError(errno.EDQUOT, "Disk quota exceeded"), Path("/root")) == "disk_full"


SBATCH = {
    "Batch job submission failed: Socket timed out on send/recv operation": None,
    "Batch job submission failed: Zero Bytes were transmitted or received": None,
    "Batch job submission failed: Unexpected message received": None,
    "": None,
    "Could not make sense of sbatch output": None,
    "Batch job submission failed: Unable to contact slurm controller (connect failure)":
        "unreachable",
    "AssocMaxSubmitJobLimit\nBatch job submission failed: Job violates accounting/QOS policy":
        "limit",
    "Batch job submission failed: Resource temporarily unavailable": "limit",
    "QOSMaxWallDurationPerJobLimit\nBatch job submission failed: Job violates accounting/QOS "
    "policy (job submit limit, user's size and/or time limits)": "rejected",
    "Batch job submission failed: Invalid partition name specified": "rejected",
    "You must specify an account\nsbatch: error: Batch job submission failed: Unspecified error":
        "rejected",
    "Batch job submission failed: More processors requested than permitted": "rejected",
    "sbatch: fatal: Batch script contains DOS line breaks (\\r\\n)": "rejected",
}  # fmt: skip


@pytest.mark.parametrize(("message", "cause"), SBATCH.items())
def test_what_sbatch_says(message, cause):
    assert refused_as(f"sbatch: error: {message}" if message.startswith("B") else message) == cause


def test_exceptions_are_classed_by_their_words():
    cases = {
        "node_fail": RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        "host_oom": MemoryError(),
        "comm": RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"),
        "error": ValueError("NCCL is a word in this user's message, and gloo too"),
    }
    for cause, error in cases.items():
        assert classify(error) == cause
    looped = RuntimeError("a")
    looped.__context__ = ValueError("b")
    assert classify(looped) == "error"
