"""What jobs die of and what follows from it (F14), and real training through all of it."""

import os
import shutil
import signal

import pytest
from safetensors.numpy import load_file
from scenario import Rank, how, log, states, step, whole, written

from scaling.config import RunConfig, TrainSettings
from scaling.data.corpus import Corpus
from scaling.rundir import RunDir
from scaling.slurm import sync
from scaling.slurm.failures import classify, explain
from scaling.slurm.job import EXIT_SUPERSEDED
from scaling.slurm.logs import log_files


@pytest.mark.parametrize(
    ("error", "cause", "evidence", "again"),
    [
        ("gpu", "gpu_oom", "OutOfMemoryError: CUDA out of memory: micro_batch_tokens = 512", False),
        ("host", "host_oom", "MemoryError: cannot allocate 8 GiB", True),
        ("xid", "node_fail", "RuntimeError: CUDA error: uncorrectable ECC error", True),
        ("value", "error", "ValueError: boom", False),
        ("oserror", "disk_full", "OSError: [Errno 28] No space left on device", False),
        ("quota", "disk_full", "OSError: [Errno 122] Disk quota exceeded", False),
    ],
)
def test_f14_what_training_dies_of(
    root, make_runs, fake_slurm, slurm_profile, error, cause, evidence, again
):
    (run,) = make_runs(1, fail_at=7, error=error)
    sync.submit(root, [run], slurm_profile, sweep="s")
    assert fake_slurm.run(0) == 1
    end = run.attempts()[0].end
    assert (end["class"], end["step"]) == (cause, 6)
    assert end["evidence"].startswith(f"rank 0: {evidence}")
    assert "Traceback" in log_files(run)[1].read_text()
    (row,) = sync.status([run])
    assert (row["state"], row["cause"]) == ("FAILED", cause)
    (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert (row["action"], row["attempts"]) == (("submit", 2) if again else (None, 1))
    if not again:
        assert row["over"] or cause == "disk_full"
        (row,) = sync.submit(root, [run], slurm_profile, sweep="s", retry_failed=True)
    if again and cause == "node_fail":
        assert fake_slurm.jobs()[1]["exclude"] == ""  # one failure blames no node
    assert fake_slurm.run(1) == 0
    assert run.starts()[1]["resumed_from"] == 5
    assert whole(run)


@pytest.mark.parametrize(
    ("word", "text", "cause", "again"),
    [
        ("OUT_OF_MEMORY", "", "host_oom", True),
        ("FAILED", "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0", "host_oom",
         True),
        ("FAILED", "srun: error: node1: task 0: Out Of Memory\nOOM Killed", "host_oom", True),
        ("FAILED", "NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus", "node_fail",
         True),
        ("FAILED", "[rank0]: torch.distributed.DistBackendError: NCCL error", "comm", True),
        ("FAILED", "NCCL WARN timeout\nNVRM: Xid (PCI:0000:3b:00): 48", "node_fail", True),
        ("FAILED", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "gpu_oom",
         False),
        ("FAILED", "OSError: [Errno 28] No space left on device", "disk_full", False),
        ("FAILED", "Traceback (most recent call last):\nKeyError: 'x'", "error", False),
        ("FAILED", "Fatal Python error: Segmentation fault", "crashed", True),
        ("COMPLETED", "", "no_result", True),
    ],
)  # fmt: skip
def test_f14_what_only_slurm_and_the_log_know(
    root, make_runs, fake_slurm, slurm_profile, ranks, word, text, cause, again
):
    (run,) = make_runs(1)
    sync.submit(root, [run], slurm_profile, sweep="s")
    Rank(root, fake_slurm.jobs()[0]).begin()
    log(root, fake_slurm.jobs()[0], f"epoch 1 begins\n{text}\nsrun: error: node1: task 0: Killed")
    fake_slurm.set(0, state=word, node="node1")
    (row,) = sync.status([run])
    assert (row["state"], row["cause"]) == ("FAILED", cause)
    assert row["evidence"] in (*text.splitlines(), f"Slurm says {word}; the job left no record")
    (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert row["action"] == ("submit" if again else None)


def test_f14_host_oom_is_tried_once_more(root, make_runs, fake_slurm, slurm_profile, ranks):
    (run,) = make_runs(1)
    for number in range(2):
        (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
        assert row["action"] == "submit"
        Rank(root, fake_slurm.jobs()[number]).begin()
        fake_slurm.set(number, state="OUT_OF_MEMORY")
    (row,) = sync.sync(root, [run], slurm_profile, sweep="s")
    assert (row["state"], row["cause"], row["action"], row["over"]) == (
        "FAILED", "host_oom", None, True,
    )  # fmt: skip


def test_f14_an_import_error_at_the_start_is_in_the_log_alone(
    root, make_runs, fake_slurm, slurm_profile, tmp_path
):
    """As of a broken environment: nothing of ours is loaded, so no record can be left."""
    (tmp_path / "cloudpickle.py").write_text("raise ImportError('libcuda.so.1: cannot open')\n")
    profile = slurm_profile.model_copy(update={"setup": (f"export PYTHONPATH={tmp_path}",)})
    (run,) = make_runs(1)
    sync.submit(root, [run], profile, sweep="s")
    assert fake_slurm.run(0) == 1
    assert run.attempts()[0].claim is None
    (row,) = sync.sync(root, [run], profile, sweep="s")
    assert (row["state"], row["cause"], row["action"]) == ("FAILED", "error", None)
    assert row["evidence"] == "ImportError: libcuda.so.1: cannot open"


def test_f14_a_loss_that_is_not_finite_is_a_result(root, make_runs, fake_slurm, slurm_profile):
    (run,) = make_runs(1, diverge_at=7)
    sync.submit(root, [run], slurm_profile, sweep="s")
    assert fake_slurm.run(0) == 0
    for drive in (sync.sync, sync.submit):
        (row,) = drive(root, [run], slurm_profile, sweep="s")
        assert (row["state"], row["action"], row["over"]) == ("DIVERGED", None, True)
    (row,) = sync.submit(root, [run], slurm_profile, sweep="s", retry_failed=True)
    assert row["action"] is None


def test_f14_a_full_disk_holds_the_whole_sweep(root, make_runs, fake_slurm, slurm_profile):
    full, *others = runs = make_runs(3, fail_at=7, error="quota")
    sync.submit(root, [full], slurm_profile, sweep="s")
    assert fake_slurm.run(0) == 1
    rows = sync.sync(root, runs, slurm_profile, sweep="s")
    assert states(rows) == ["FAILED", "PLANNED", "PLANNED"]
    assert {r["action"] for r in rows} == {None}
    assert "Disk quota exceeded" in rows[1]["waiting"]
    assert len(fake_slurm.jobs()) == 1
    how(root)
    rows = sync.submit(root, runs, slurm_profile, sweep="s", retry_failed=True)
    assert [r["action"] for r in rows] == ["submit"] * 3
    assert set(fake_slurm.finish()) == {0}
    assert [r.result()["status"] for r in runs] == ["done"] * 3
    assert full.starts()[1]["resumed_from"] == 5
    assert [r.generations() for r in others] == [[1], [1]]


def test_f14_classes_of_exceptions():
    class OutOfMemoryError(RuntimeError):
        pass

    class DistBackendError(RuntimeError):
        pass

    class PeerError(RuntimeError):
        pass

    cases = {
        "gpu_oom": OutOfMemoryError("CUDA out of memory"),
        "host_oom": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        "disk_full": OSError(28, "No space left on device"),
        "comm": RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"),
        "error": RuntimeError("shape mismatch"),
    }
    for cause, error in cases.items():
        assert classify(error) == cause
    assert classify(DistBackendError("x")) == "comm"
    assert classify(PeerError("rank 0 could not commit")) == "comm"
    assert classify(ValueError("NCCL_DEBUG is not a number")) == "error"  # the user's words
    outer = ValueError("wrapped")
    outer.__cause__ = OSError(122, "Disk quota exceeded")
    assert classify(outer) == "disk_full"
    assert explain("all is well\nepoch 3\n") is None
    assert explain("") is None


FULL = """
import sys

def full(event, arguments):  # as a disk that is full from step 150 on
    if event == "open" and "/ckpt/.tmp-step-" in str(arguments[0]) and str(arguments[1])[0] == "x":
        if int(str(arguments[0]).split(".tmp-step-")[1][:9]) >= 150:
            raise OSError(28, "No space left on device")

sys.addaudithook(full)
"""


@pytest.mark.slow
def test_f09_f12_f14_real_training_through_all_of_it_repeats_the_undisturbed_run_bit_for_bit(
    tiny_corpus, tmp_path, fake_slurm, slurm_profile, until, monkeypatch
):
    """Preempted; killed without grace; the disk is full at a save; a zombie at the end."""
    root, other = tiny_corpus(128, validation=8, pool=24), tmp_path / "undisturbed"
    shutil.copytree(root / "corpora", other / "corpora")
    (folder,) = root.glob("corpora/tiny-*")
    card = Corpus.open(folder).card
    settings = TrainSettings(threads=1, checkpoint_every=10)
    profile = slurm_profile.model_copy(update={"train": settings})
    config = RunConfig.model_validate(
        {
            "model": {"layers": 1, "d_model": 16, "heads": 2, "dropout": 0.1},
            "data": {
                "corpus_digest": card.digest,
                "vocab_size": card.vocab_size,
                "n_services": len(card.services),
                "items_per_user": 4,
            },
            "batch_size": 16,
            "negatives": 16,
            "steps": 240,
            "evaluations": 4,
            "optim": {"lr": 5e-3},
            "pool": card.pool,
        }
    )
    twin = RunDir.create(other, config, "tiny")
    sync.submit(other, [twin], profile, sweep="s")
    assert fake_slurm.run(0) == 0

    run = RunDir.create(root, config, "tiny")
    sync.submit(root, [run], profile, sweep="s")
    process = fake_slurm.start(1)
    until(lambda: step(run) >= 20, step=0.02)
    os.kill(fake_slurm.rank(1), signal.SIGTERM)
    assert fake_slurm.end(1, process) == 0
    assert fake_slurm.jobs()[1]["restart"] == 1
    stopped = run.committed_steps()[-1]
    assert stopped == written(run, 1) < 150

    process = fake_slurm.start(1)
    until(lambda: step(run) >= stopped + 20, step=0.02)
    os.kill(fake_slurm.rank(1), signal.SIGKILL)
    fake_slurm.requeue(1)
    fake_slurm.end(1, process)
    assert run.starts()[1]["resumed_from"] == stopped
    assert states(sync.sync(root, [run], profile, sweep="s")) == ["QUEUED"]

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "sitecustomize.py").write_text(FULL)
    before = run.committed_steps()[-1]
    assert before < 150
    assert fake_slurm.run(1, PYTHONPATH=str(tmp_path / "full")) == 1
    assert 0 <= written(run, 2) - run.starts()[2]["resumed_from"] <= 10
    assert run.committed_steps()[-1] == 140
    assert (run.attempts()[0].end["class"], run.attempts()[0].end["step"]) == ("disk_full", 150)
    (row,) = sync.sync(root, [run], profile, sweep="s")
    assert (row["cause"], row["action"]) == ("disk_full", None)
    sync.submit(root, [run], profile, sweep="s", retry_failed=True)

    process = fake_slurm.start(2)
    until(lambda: step(run) >= 160 and len(run.starts()) == 4, step=0.02)
    os.kill(zombie := fake_slurm.rank(2), signal.SIGSTOP)
    fake_slurm.requeue(2)
    assert fake_slurm.run(2) == 0
    result, exported = run.result(), sorted(run.path.glob("export/*/*"))
    os.kill(zombie, signal.SIGCONT)
    # Frozen in mid-save it finds its unfinished folder gone, which is an error.
    assert process.wait(timeout=60) in (1, EXIT_SUPERSEDED)
    assert run.starts()[3]["resumed_from"] == 140
    assert (run.result(), sorted(run.path.glob("export/*/*"))) == (result, exported)

    assert states(sync.sync(root, [run], profile, sweep="s")) == ["DONE"]
    clock = {"seconds", "speed", "gpu_hours", "generation", "micro_batch_tokens"}

    def without_clock(rows):
        return [{k: v for k, v in row.items() if k not in clock} for row in rows]

    for kind in ("train", "pool"):
        assert without_clock(run.curve(kind)) == without_clock(twin.curve(kind))
    assert without_clock([run.result()]) == without_clock([twin.result()])
    mine, theirs = (
        load_file(r.path / "ckpt/step-000000240/params.safetensors") for r in (run, twin)
    )
    assert mine.keys() == theirs.keys()
    assert all(mine[k].tobytes() == theirs[k].tobytes() for k in mine)
