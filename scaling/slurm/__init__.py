"""From planned runs to Slurm jobs and back: submission, state, and what a job does.

    profile.py      where runs execute: ``slurm/*.toml``
    submission.py   intent -> sbatch (or a local process) -> submit hint, over submitit
    job.py          what runs on the nodes: claim, rank environment, training, end record
    scheduler.py    one look at the scheduler: squeue and sacct, or processes on this host
    state.py        facts and a look at the scheduler -> a run's state; pure
    sync.py         the only driver: submit what is missing, again and again; status, cancel
    logs.py         where a run's output is
    doctor.py       does this cluster do what the above relies on

The protocol and its reasons: ``docs/decisions/0003-submission-protocol.md``.
"""
