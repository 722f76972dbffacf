"""From planned runs to Slurm jobs and back: submission, state, and what a job does.

    profile.py      where runs execute: ``slurm/*.toml``
    scheduler.py    one look at the scheduler: squeue and sacct, or processes on this host
    state.py        facts and a look at the scheduler -> a run's state and what follows; pure
    status.py       facts from folders, rows for people
    sync.py         the only driver: what gets a new attempt, again and again
    submission.py   intent -> sbatch (or a local process) -> submit hint
    launcher.py     what submitit does of that: job scripts, arrays, processes
    array.py        an array of any command of ours
    cancel.py       marks, then the jobs
    job.py          what runs on the nodes: checks, rank environment, training, end record
    claims.py       which job may write; pure where it decides
    code.py         the archive that jobs import
    environment.py  what a job ran on
    failures.py     kinds of failures, from exceptions and words
    logs.py         where a run's output is
    cost.py         estimates
    budget.py       what a sweep may spend
    doctor.py       does this cluster do what the above relies on

The protocol and its reasons: ``docs/decisions/0003-submission-protocol.md``.
"""
