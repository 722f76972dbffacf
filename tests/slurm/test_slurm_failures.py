"""Kinds of failures, from exceptions and from logs as the programs print them."""

import pytest

from scaling.slurm.failures import classify, explain

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
