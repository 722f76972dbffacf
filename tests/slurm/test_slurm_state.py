"""``derive`` against tables: every word of Slurm, every record, and what nobody may conclude."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.rundir import Attempt
from scaling.slurm.scheduler import _parse_sacct, _parse_squeue
from scaling.slurm.state import (
    WORDS,
    Facts,
    Job,
    Rules,
    Snapshot,
    State,
    bad_nodes,
    derive,
    fruitless,
)

NOW = 10_000.0
RULES = Rules(quarantine_s=600, settle_s=30)
KEY = ("s-0011223344", 3)


def attempt(number=1, *, step=0, at=0.0, executor="slurm", submit=True, claim=True, **records):
    intent = {"token": KEY[0], "index": KEY[1], "executor": executor, "step": step, "time": at}
    return Attempt(
        number,
        intent,
        {"job_id": "7_3", "time": at} if submit else None,
        {"job_id": "7_3", "time": at} if claim else None,
        records.get("cancel"),
        {"class": records["end"]} if "end" in records else None,
    )


def verdict(*attempts, job=None, answered=True, status=None, committed=0, now=NOW):
    facts = Facts("k" * 16, status, committed, attempts)
    snapshot = Snapshot({KEY: job} if job else {}, answered, "" if answered else "no answer")
    return derive(facts, snapshot, now, RULES)


# (Slurm's word, run state, cause, held, may start)
SLURM = [
    ("PENDING", "QUEUED", None, False, False),
    ("REQUEUED", "QUEUED", None, False, False),
    ("REQUEUE_FED", "QUEUED", None, False, False),
    ("REQUEUE_HOLD", "QUEUED", None, True, False),
    ("SPECIAL_EXIT", "QUEUED", None, True, False),
    ("RESV_DEL_HOLD", "QUEUED", None, True, False),
    ("CONFIGURING", "RUNNING", None, False, False),
    ("RUNNING", "RUNNING", None, False, False),
    ("COMPLETING", "RUNNING", None, False, False),
    ("RESIZING", "RUNNING", None, False, False),
    ("SIGNALING", "RUNNING", None, False, False),
    ("STAGE_OUT", "RUNNING", None, False, False),
    ("STOPPED", "RUNNING", None, False, False),
    ("SUSPENDED", "RUNNING", None, False, False),
    ("COMPLETED", "FAILED", "no_result", False, True),
    ("FAILED", "FAILED", "crashed", False, True),
    ("TIMEOUT", "FAILED", "timeout", False, True),
    ("DEADLINE", "FAILED", "timeout", False, True),
    ("PREEMPTED", "FAILED", "preempted", False, True),
    ("NODE_FAIL", "FAILED", "node_fail", False, True),
    ("BOOT_FAIL", "FAILED", "node_fail", False, True),
    ("LAUNCH_FAILED", "FAILED", "node_fail", False, True),
    ("RECONFIG_FAIL", "FAILED", "node_fail", False, True),
    ("OUT_OF_MEMORY", "FAILED", "host_oom", False, True),
    ("REVOKED", "LOST", "lost", False, True),
    ("CANCELLED", "CANCELLED", "cancelled", False, False),
    ("CANCELLED by 1000", "CANCELLED", "cancelled", False, False),
    ("CANCELLED+", "CANCELLED", "cancelled", False, False),
]


@pytest.mark.parametrize(("word", "state", "cause", "held", "start"), SLURM)
def test_slurm_words(word, state, cause, held, start):
    v = verdict(attempt(), job=Job("7_3", word))
    assert (v.state, v.cause, v.held, v.start) == (State(state), cause, held, start)
    assert v.stale == ""
    assert v.job_state == word


def test_the_table_names_every_word():
    assert {w for w, *_ in SLURM if w.isalpha() or "_" in w} >= set(WORDS)


@pytest.mark.parametrize("word", ["", "NEW_IN_2030", "running", "\x00", "7"])
@pytest.mark.parametrize("claim", [True, False])
def test_an_unknown_word_changes_nothing(word, claim):
    v = verdict(attempt(claim=claim), job=Job("7_3", word))
    assert v.state is (State.RUNNING if claim else State.QUEUED)
    assert v.stale
    assert not v.start


@pytest.mark.parametrize("reason", ["launch_failed_requeued_held", "launch failed requeued held"])
def test_a_job_that_could_not_be_launched_is_not_waited_for(reason):
    v = verdict(attempt(claim=False), job=Job("7_3", "PENDING", reason))
    assert (v.state, v.cause, v.start) == (State.FAILED, "launch", True)
    assert reason in v.evidence


@pytest.mark.parametrize("reason", ["JobHeldUser", "JobHeldAdmin"])
def test_held_jobs_are_shown(reason):
    v = verdict(attempt(), job=Job("7_3", "PENDING", reason))
    assert (v.state, v.held, v.evidence) == (State.QUEUED, True, reason)


@pytest.mark.parametrize(
    ("case", "state", "start"),
    [
        ({"submit": False, "claim": False, "at": NOW - 599}, "QUEUED", False),
        ({"submit": False, "claim": False, "at": NOW - 601}, "LOST", True),
        ({"claim": False, "at": NOW - 29}, "QUEUED", False),
        ({"claim": False, "at": NOW - 31}, "LOST", True),
        ({"at": NOW - 29}, "RUNNING", False),
        ({"at": NOW - 31}, "LOST", True),
        ({"at": NOW + 3600}, "RUNNING", False),  # a clock ahead of ours
    ],
)
def test_a_job_that_nobody_knows(case, state, start):
    v = verdict(attempt(**case))
    assert (v.state, v.start) == (State(state), start)
    unanswered = verdict(attempt(**case), answered=False)
    assert unanswered.state in (State.QUEUED, State.RUNNING)
    assert unanswered.stale
    assert not unanswered.start


def test_records_of_an_ended_job_have_time_to_arrive():
    assert verdict(attempt(), job=Job("7_3", "COMPLETED", "", NOW - 5)).state is State.RUNNING
    assert verdict(attempt(), job=Job("7_3", "COMPLETED", "", NOW - 31)).state is State.FAILED


@pytest.mark.parametrize(
    ("cause", "state", "start"),
    [
        ("error", "FAILED", False),
        ("gpu_oom", "FAILED", False),
        ("disk_full", "FAILED", False),
        ("some_new_class", "FAILED", False),
        ("cancelled", "CANCELLED", False),
        ("no_progress", "FAILED", False),
        ("drift", "FAILED", False),
        ("budget", "PLANNED", True),
        ("withdrawn", "PLANNED", True),
        ("stopped", "FAILED", True),
        ("comm", "FAILED", True),
        ("limit", "PLANNED", True),
        ("rejected", "PLANNED", True),
        ("unreachable", "PLANNED", True),
    ],
)
def test_what_the_job_said_of_its_end_beats_slurm(cause, state, start):
    v = verdict(attempt(end=cause), job=Job("7_3", "COMPLETED"))
    assert (v.state, v.cause, v.start) == (State(state), cause, start)


def test_result_beats_everything():
    for status in ("done", "diverged"):
        v = verdict(attempt(cancel={}, end="error"), job=Job("7_3", "FAILED"), status=status)
        assert v.state is State(status.upper())
        assert not v.start


def test_cancelled_beats_the_queue():
    v = verdict(attempt(cancel={"by": "ann"}), job=Job("7_3", "RUNNING"))
    assert (v.state, v.start) == (State.CANCELLED, False)


def test_local_processes():
    assert verdict(attempt(executor="local"), answered=False).cause == "killed"
    young = attempt(executor="local", submit=False, claim=False, at=NOW - 59)
    assert verdict(young).state is State.QUEUED
    elsewhere = verdict(attempt(executor="local"), job=Job("1", "ON_HOST_other"))
    assert elsewhere.stale
    assert not elsewhere.start


def test_three_attempts_without_progress_are_the_end():
    def at(*steps):
        return [attempt(i + 1, step=s, end="timeout") for i, s in enumerate(steps)]

    assert verdict(*at(0, 0)).start
    stuck = verdict(*at(0, 0, 0))
    assert not stuck.start
    assert "3 attempts without a new committed step" in stuck.evidence
    assert verdict(*at(0, 0, 0), committed=500).start
    assert verdict(*at(*range(0, 10_000, 500)), committed=10_000).start
    assert not verdict(*at(0, 500, 500, 500), committed=500).start
    refused = [attempt(i + 1, end="limit") for i in range(9)]
    assert fruitless(Facts("k" * 16, attempts=tuple(refused))) == 0


RECORDS = st.builds(
    attempt,
    st.integers(1, 3),
    step=st.integers(0, 100),
    at=st.floats(0, 2 * NOW),
    executor=st.sampled_from(["slurm", "local"]),
    submit=st.booleans(),
    claim=st.booleans(),
)


@given(
    st.lists(RECORDS, max_size=3),
    st.text(max_size=12) | st.sampled_from(sorted(WORDS)),
    st.sampled_from([None, "done", "diverged"]),
)
def test_nothing_starts_on_silence_or_beside_a_live_job(attempts, word, status):
    v = verdict(*attempts, job=Job("7_3", word), status=status)
    if status:
        assert v.state is State(status.upper())
        assert v.over
    assert v.start <= (not v.stale)
    assert not (v.start and v.state in (State.RUNNING, State.QUEUED, State.DONE, State.CANCELLED))
    if attempts and attempts[-1].intent["executor"] == "slurm" and not status:
        assert not verdict(*attempts, answered=False).start


@given(st.text(max_size=80))
def test_no_output_of_slurm_breaks_the_parsers(text):
    for parse in (_parse_squeue, _parse_sacct):
        jobs = parse(text)
        assert jobs is None or all(isinstance(j, Job) for j in jobs.values())


def test_parsers():
    output = (
        "12|3|RUNNING|2027-01-01T00:00:00|None|gpu1|s-x\n"
        "13|N/A|PENDING|N/A|JobHeldUser|gpu[1-2]|a|b\n"
    )
    jobs = _parse_squeue(output)
    job = jobs["s-x", 3]
    assert (job.job_id, job.word, job.reason, job.node) == ("12_3", "RUNNING", "", "gpu1")
    assert (jobs["a|b", 0].job_id, jobs["a|b", 0].reason) == ("13", "JobHeldUser")
    assert _parse_squeue(output[:-1]) is None
    jobs = _parse_sacct(
        "12_[4-7%2]|PENDING|Unknown|None assigned|s\n12_3|CANCELLED by 5|Unknown|gpu1|s\n"
    )
    assert list(jobs) == [("s", 3)]


def failed(cause="node_fail", nodes=("gpu1",), claimed=("gpu1",), at=NOW):
    end = {"class": cause, "time": at} | ({"nodes": list(nodes)} if nodes else {})
    claim = {"nodes": list(claimed), "time": at - 1} if claimed else None
    return Attempt(1, {}, None, claim, None, end)


def begun(*nodes, at=NOW):
    return Attempt(1, {}, None, {"nodes": list(nodes), "time": at}, None, None)


OTHERS = begun(*(f"other{i}" for i in range(8)))


def test_a_node_is_bad_after_two_failures_that_only_a_node_explains():
    def bad(*attempts):
        return bad_nodes([*attempts, OTHERS], NOW)

    assert bad(failed()) == []
    assert bad(failed(), failed("launch")) == ["gpu1"]
    assert bad(*[failed("error")] * 9, failed("comm"), failed("gpu_oom")) == []
    assert bad(*[failed(nodes=())] * 2) == ["gpu1"]  # where its job had claimed
    assert bad(*[failed(nodes=(), claimed=())] * 9) == []
    # one of two nodes is to blame, nobody knows which: both count by half
    wide = failed(nodes=("gpu1", "gpu2"))
    assert bad(*[wide] * 3) == []
    assert bad(wide, wide, failed()) == ["gpu1"]
    assert bad(Attempt(1, {}, None, None, None, None)) == []
    for name in ("-x", "a,b", "a b", "$(x)", "gpu[1-2]", "", "a\nb"):
        assert bad(*[failed(nodes=(name,), claimed=())] * 5) == []


def test_a_node_is_forgiven():
    twice = [failed(at=NOW - 10)] * 2
    assert bad_nodes([*twice, OTHERS], NOW) == ["gpu1"]
    assert bad_nodes([*twice, OTHERS, begun("gpu1", at=NOW - 20)], NOW) == ["gpu1"]
    assert bad_nodes([*twice, OTHERS, begun("gpu1", at=NOW - 5)], NOW) == []
    assert bad_nodes([*twice, OTHERS], NOW + 86_400) == []


def test_where_most_nodes_fail_it_is_not_the_nodes():
    def wrong_setup(nodes):
        return [failed("launch", (f"gpu{i}",), ()) for i in range(nodes) for _ in range(2)]

    assert bad_nodes(wrong_setup(1), NOW) == ["gpu0"]
    assert bad_nodes(wrong_setup(8), NOW) == []
    assert bad_nodes([*wrong_setup(4), OTHERS], NOW) == ["gpu0", "gpu1", "gpu2", "gpu3"]
    assert bad_nodes([*wrong_setup(4), begun("x", "y", "z")], NOW) == []
