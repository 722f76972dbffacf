"""Sweeps of 2,000 runs: submit, status and collect, beside submitit's own way.

Every measurement is a process of its own, and the sides take turns; medians are given. ``status``
and ``collect`` are timed twice: the call alone, without its imports, and the whole command.

    submit               Grid.runs, write_sweep, RunDir.create of every run, sync.submit
    status, finished     of runs that are over: state, job, steps, losses, GPU-hours, age
    status, queued       of the same runs before they start, with one squeue
    collect              the tables of the finished runs, written and read again
    submitit, submit     SlurmExecutor.map_array, an array for every 1,001 jobs
    submitit, results    SlurmJob, done() and result() of every finished job, by files of results
    submitit, sacct      SlurmJob and done() of every finished job without such a file, by sacct
    submitit, queued     SlurmJob and done() of every pending job, by sacct

They do not do the same. Ours flushes three records of every run to the disk before it has
submitted; submitit pickles one argument for every job and flushes nothing. It knows no steps,
losses or causes of failure: done() is one bit, and result() what the job returned (here the content
of ``result.json``). ``collect`` has no peer.

Finished runs are written in the formats of docs/formats.md: 1,000 rows of training and 20
evaluations, as 100,000 steps leave. Checkpoints, exports and logs are empty files, since nobody
reads them here. Slurm is a script that answers from a file of arrays (the tests' fake keeps every
job's script in one file, and its sacct does not take submitit's options). What a real Slurm takes
to answer comes on top, for both. All files lie in the page cache of a local disk.

    python benchmarks/orchestrate.py --quick
"""

import argparse
import contextlib
import io
import json
import math
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

POINTS = 20  # of the grid, each with many seeds
STEPS, EVALUATIONS = 100_000, 20
MAX_ARRAY_SIZE = 1001
SLURM_COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "scancel", "srun")

CORPUS = """
name = "bench"
services = ["books", "clothing"]
[source]
kind = "synthetic"
users = 400
facets = 2
interests = 8
noise = 0.2
items_per_user = 16.0
items_per_interest = 32
synonyms = 1
distractors = 1
distractor_words = 50
[users]
max_logs = 64
downstream = 0.1
validation = 64
pool = 64
[tokenizer]
vocab_size = 512
"""

SWEEP = """
name = "bench"
figure = "none"
source = "benchmarks/orchestrate.py"
corpus = "corpus.toml"
seeds = [{seeds}]
[base]
steps = {steps}
evaluations = {evaluations}
[grid]
model = ["1x8", "1x16", "1x32", "1x64"]
batch_size = [8, 16, 32, 64, 128]
"""

PROFILE = """
name = "bench"
[shape]
time_min = 1440
"""

SLURM = '''
"""Slurm as a file of arrays: their elements are all in one state, and nothing runs."""
import json, os, pathlib, re, sys

home = pathlib.Path(os.environ["BENCH_SLURM"])
name, argv = sys.argv[1], sys.argv[2:]
path = home / "arrays.json"
arrays = json.loads(path.read_text()) if path.exists() else []
given = dict(a[2:].split("=", 1) for a in argv if a.startswith("--") and "=" in a)
if name == "sbatch":
    script = pathlib.Path(argv[-1]).read_text()
    first, last = map(int, re.search(r"--array='?(\\d+)-(\\d+)", script).groups())
    if last >= MAX_ARRAY_SIZE:
        sys.exit("sbatch: error: Batch job submission failed: Invalid job array specification")
    job = re.search(r"--job-name=(\\S+)", script).group(1)
    array = {"main": 101 + len(arrays), "first": first, "last": last, "name": job}
    path.write_text(json.dumps([*arrays, array | {"state": "PENDING"}]))
    print(f"Submitted batch job {array['main']}")
elif name == "scontrol":
    print(f"MaxArraySize            = MAX_ARRAY_SIZE")
elif name in ("squeue", "sacct"):
    names = given["name"].split(",") if "name" in given else None
    ids = {argv[i + 1] for i, a in enumerate(argv) if a == "-j"}
    columns = given.get("format") or argv[argv.index("-o") + 1]
    lines = [] if "--noheader" in argv else [columns.replace(",", "|")]
    for a in arrays:
        if (names and a["name"] not in names) or (ids and str(a["main"]) not in ids):
            continue
        waits, elements = a["state"] == "PENDING", range(a["first"], a["last"] + 1)
        if name == "squeue":
            if waits:
                lines += [f"{a['main']}|{i}|PENDING|N/A|Priority||{a['name']}" for i in elements]
            continue
        if waits:
            found = [f"{a['main']}_[{a['first']}-{a['last']}%64]"]
        else:  # each has its steps, unless only allocations are asked for
            steps = [""] if "--allocations" in argv else ["", ".batch", ".extern", ".0"]
            found = [f"{a['main']}_{i}{step}" for i in elements for step in steps]
        about = {"State": a["state"], "End": "2026-01-01T00:00:00", "JobName": a["name"],
                 "NodeList": "None assigned" if waits else "node1"}
        rest = "|".join(about[c] for c in columns.split(",")[1:])
        lines += [f"{job}|{rest}" for job in found]
    print("\\n".join(lines))
'''.replace("MAX_ARRAY_SIZE", str(MAX_ARRAY_SIZE))


# --- the world: a corpus, Slurm's commands, and runs in the states that are asked for -------------


def make_world(world: Path, runs: int) -> None:
    """The files of a sweep, a prepared corpus, and Slurm's commands."""
    from scaling.data.prepare import prepare

    seeds = ", ".join(map(str, range(-(-runs // POINTS))))
    sweep = SWEEP.format(seeds=seeds, steps=STEPS, evaluations=EVALUATIONS)
    for name, text in (("corpus", CORPUS), ("sweep", sweep), ("profile", PROFILE)):
        (world / f"{name}.toml").write_text(text)
    prepare(world / "corpus.toml", world / "prepared")
    (world / "slurm.py").write_text(SLURM)
    (world / "bin").mkdir()
    for name in SLURM_COMMANDS:
        script = world / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -SE {world}/slurm.py {name} "$@"\n')
        script.chmod(0o755)


def new_root(world: Path, name: str) -> None:
    """A root with the corpus and nothing else, and an empty queue for it."""
    (world / name / "slurm").mkdir(parents=True)
    shutil.copytree(world / "prepared", world / name / "root")


def planned_rows(root: Path) -> list[dict[str, Any]]:
    """Rows of the plan that was submitted."""
    (path,) = root.glob("sweeps/*/plan.json")
    rows: list[dict[str, Any]] = json.loads(path.read_text())["runs"]
    return rows


def run_dirs(root: Path) -> list[Any]:
    from scaling.rundir import RunDir

    return [RunDir(root, row["run_key"]) for row in planned_rows(root)]


def finish(place: Path, rows: int) -> None:
    """Give every submitted run what it leaves when it is over, and Slurm their end.

    Runs of one point share their curve. Nothing is flushed: only what comes later is timed.
    """
    from scaling.files import write_bytes
    from scaling.rundir import chunk_folder
    from scaling.train.accounting import result_record

    os.fsync = lambda fd: None
    curves: dict[str, tuple[bytes, dict[str, float]]] = {}
    results: dict[str, dict[str, Any]] = {}
    for run in run_dirs(place / "root"):
        (attempt,) = run.attempts()
        job_id, now = attempt.submit["job_id"], time.time()
        config = run.spec()
        job: dict[str, Any] = {"executor": "slurm", "job_id": job_id, "restart": 0}
        job["nodes"] = ["node1"]
        run.record(1, "claim", {**job, "host": "node1", "time": now})
        job |= {"profile": "bench", "cpus_per_task": 1, "began": now - 60}
        job |= {"environment": "a" * 16, "gpus": [], "variables": {"SLURM_JOB_ID": job_id}}
        execution = {"world_size": 1, "micro_batch_tokens": 65_536}
        start = {"resumed_from": 0, "attempt": 1, "job": job, "host": "node1", "pid": 4242}
        settings = attempt.intent["train"]
        about = {"time": now, "seconds": 0.0, **execution, "settings": settings}
        run.start_generation({**start, **about})
        point = config.model_copy(update={"seed": 0}).run_key
        if point not in curves:
            curves[point] = curve_of(config, rows)
        curve, totals = curves[point]
        with open(run.metrics_path(1), "ab") as f:
            f.write(curve)
        if point not in results:
            placed = {**execution, "profile": "bench", "cpus_per_task": 1}
            results[point] = result_record(run, config, totals, "done", STEPS, placed)
        run.write_result(1, results[point])
        end = {"class": "done", "evidence": "", "step": STEPS, "generation": 1, "host": "node1"}
        run.record(1, "end", {**end, "time": now})
        state = ["params.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors"]
        state += ["manifest.json", "COMMITTED"]
        for step in (STEPS - STEPS // 20, STEPS):
            for name in state:
                empty(run.path / "ckpt" / f"step-{step:09d}" / name)
        for name in ("model.safetensors", "config.json"):
            empty(run.path / "export" / f"step-{STEPS:09d}" / name)
        chunk = chunk_folder(run.root, attempt.intent["sweep"], attempt.intent["token"])
        for name in ("0_log.out", "0_log.err", "submitted.pkl"):
            empty(chunk / f"{job_id}_{name}")
    arrays = json.loads((place / "slurm/arrays.json").read_text())
    arrays = [array | {"state": "COMPLETED"} for array in arrays]
    write_bytes(place / "slurm/arrays.json", json.dumps(arrays).encode())


def empty(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def curve_of(config: Any, rows: int) -> tuple[bytes, dict[str, float]]:
    """Metrics of a finished run after their first line, and its totals."""
    from scaling.rundir import append_line
    from scaling.train.accounting import flops_of

    file, totals = io.BytesIO(), {}
    logged = {STEPS * (i + 1) // rows for i in range(rows)}
    evaluated = set(config.evaluation_steps)
    for step in sorted(logged | evaluated):
        loss = 0.7 + 3.5 * (1 + step) ** -0.1 + 0.05 * math.sin(step)
        users = step * config.batch_size
        counts = {"tokens": 301 * users, "tokens_sq": 3_011 * users, "items": 32 * users}
        counts |= {"items_sq": 640 * users, "users": users}
        more = {"clipped_steps": step, "overflows": 0, "seconds": round(0.0317 * step, 3)}
        totals = {**counts, "flops_exact": flops_of(config, counts).total, **more}
        row = {"step": step, **totals, "loss": loss, "logit_scale": 14.27 + loss}
        if step in logged:
            times = ("seconds_data", "seconds_forward", "seconds_backward", "seconds_step")
            speed = {name: loss / (100 + i) for i, name in enumerate(times)}
            speed |= {"flops_per_second": loss * 1e9, "mfu": None, "peak_memory_bytes": 476_184_576}
            train = {"lr": 5e-4 * loss, "grad_norm": loss / 3, "loss_scale": None, "speed": speed}
            append_line(file, {"kind": "train", **row, **train})
        if step in evaluated:
            pool = {"loss_refit": loss * 0.999, "loss_se": loss / 50, "accuracy": 1 / loss}
            pool |= {"refit_scale": 13.1, "pools": {"16": loss / 1.7}}
            pool |= {"damping": loss / 5, "damping_p10": loss / 20}
            append_line(file, {"kind": "pool", **row, **pool})
    return file.getvalue(), totals


def inodes(place: Path) -> float:
    """Files and folders below the root for each run, the corpus and the code apart."""
    count, root = 0, place / "root"
    for part in ("runs", "sweeps"):
        for _, folders, files in os.walk(root / part):
            count += len(folders) + len(files)
    return count / len(planned_rows(root))


# --- the sides: each returns the function to be timed, which returns what it found ----------------

Measured = Callable[[], dict[str, Any]]


def submit(place: Path) -> Measured:
    import scaling.data.prepare  # noqa: F401  (planning imports it: that takes a second)
    from scaling.cli.app import planned_runs
    from scaling.rundir import RunDir
    from scaling.slurm import sync
    from scaling.slurm.profile import ClusterProfile
    from scaling.sweeps import sweep_id, write_sweep

    root, profile = place / "root", ClusterProfile.read(place.parent / "profile.toml")

    def measured() -> dict[str, Any]:
        watch = Watch()
        grid, card, planned = planned_runs(place.parent / "sweep.toml", root)
        watch("plan")
        write_sweep(root, grid, card, planned)
        watch("write_sweep")
        runs = [RunDir.create(root, p.config, card.name) for p in planned if p.config]
        watch("folders")
        rows = sync.submit(root, runs, profile, sweep=sweep_id(grid.name, planned))
        watch("submit")
        return {"answers": Counter(row["action"] for row in rows), "phases": watch.phases}

    return measured


def status(place: Path) -> Measured:
    from scaling.slurm.status import status as look

    runs = run_dirs(place / "root")
    return lambda: {"answers": Counter(row["state"] for row in look(runs))}


def collect(place: Path) -> Measured:
    from scaling.collect import collect as tabulate

    rows = planned_rows(place / "root")

    def measured() -> dict[str, Any]:
        report = tabulate(place / "root", rows, "bench", place / "results")
        return {"answers": report["states"], "rows": report["rows"]}

    return measured


def command(verb: str, *words: str) -> Callable[[Path], Measured]:
    """A verb of the command line, in a process of its own."""

    def side(place: Path) -> Measured:
        call = [sys.executable, "-m", "scaling.cli", verb]
        call += [str(place.parent / "sweep.toml"), "--root", str(place / "root")]
        call += [word.format(place=place) for word in words]

        def measured() -> dict[str, Any]:
            done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
            if verb == "status":
                return {"answers": Counter(row["state"] for row in json.loads(done.stdout))}
            report = json.loads((place / "tables/bench/collect.json").read_text())
            return {"answers": report["states"]}

        return measured

    return side


def submitit_submit(place: Path) -> Measured:
    import submitit

    from scaling.cli.app import planned_runs

    _, _, planned = planned_runs(place.parent / "sweep.toml", place / "root")
    jobs = [p.settings.model_dump(mode="json") for p in planned]

    def measured() -> dict[str, Any]:
        executor = submitit.SlurmExecutor(folder=place / "submitit")
        executor.update_parameters(time=1440, array_parallelism=64)
        done: list[Any] = []
        for a in range(0, len(jobs), MAX_ARRAY_SIZE):
            done += executor.map_array(dict, jobs[a : a + MAX_ARRAY_SIZE])
        return {"answers": {"submit": len(done)}}

    return measured


def submitit_jobs(results: bool) -> Callable[[Path], Measured]:
    def side(place: Path) -> Measured:
        import submitit

        ids = [
            f"{array['main']}_{i}"
            for array in json.loads((place / "slurm/arrays.json").read_text())
            for i in range(array["first"], array["last"] + 1)
        ]
        folder = place / "submitit"
        if results and not folder.exists():
            folder.mkdir()
            for job_id, run in zip(ids, run_dirs(place / "root"), strict=True):
                path = submitit.core.utils.JobPaths(folder, job_id, 0).result_pickle
                submitit.core.utils.cloudpickle_dump(("success", run.result()), path)

        def measured() -> dict[str, Any]:
            where = folder if results else place / "nothing"
            jobs = [submitit.SlurmJob(folder=where, job_id=job_id) for job_id in ids]
            over = Counter(job.done() for job in jobs)
            if results:
                return {"answers": Counter(job.result()["status"] for job in jobs)}
            return {"answers": {"DONE" if known else "QUEUED": n for known, n in over.items()}}

        return measured

    return side


SUBMITTING: dict[str, Callable[[Path], Measured]] = {
    "submit": submit,
    "submitit, submit": submitit_submit,
}
SIDES: dict[str, tuple[str, str, Callable[[Path], Measured]]] = {
    "status, finished": ("finished", "DONE", status),
    "status, queued": ("queued", "QUEUED", status),
    "status, command": ("finished", "DONE", command("status", "--json")),
    "collect": ("finished", "DONE", collect),
    "collect, command": ("finished", "DONE", command("collect", "--results", "{place}/tables")),
    "submitit, sacct": ("finished", "DONE", submitit_jobs(results=False)),
    "submitit, results": ("finished", "done", submitit_jobs(results=True)),
    "submitit, queued": ("queued", "QUEUED", submitit_jobs(results=False)),
}
"""Sides that change nothing: the runs they are asked for, and what they must say of each."""
PAIRS = {
    "submit": ("submit", "submitit, submit"),
    "results": ("status, finished", "submitit, results"),
    "sacct": ("status, finished", "submitit, sacct"),
    "queued": ("status, queued", "submitit, queued"),
}


# --- one measurement, in a process of its own -----------------------------------------------------


class Watch:
    """Seconds between its calls, by name."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.begun = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.phases[name], self.begun = now - self.begun, now


class Waited(subprocess.Popen):  # type: ignore[type-arg]
    """A command whose caller's waiting is counted."""

    calls: ClassVar[Counter[str]] = Counter()
    seconds = 0.0

    def __init__(self, args: Any, **how: Any) -> None:
        self.begun = time.perf_counter()
        Waited.calls[Path(args[0]).name] += 1
        super().__init__(args, **how)

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        Waited.seconds += time.perf_counter() - self.begun


def measure(name: str, place: Path, count: bool) -> dict[str, Any]:
    """Time one side, or count what it opens, which costs time itself."""
    measured = SUBMITTING[name](place) if name in SUBMITTING else SIDES[name][2](place)
    opened: list[tuple[str, str]] = []
    if count:
        sys.addaudithook(
            lambda event, args: (
                opened.append((event, str(args[0])))
                if event in ("open", "os.scandir", "os.listdir")
                else None
            )
        )
    subprocess.Popen = Waited  # type: ignore[assignment,misc]
    start = time.perf_counter()
    found = measured()
    found["seconds"] = time.perf_counter() - start
    found |= {"calls": Waited.calls, "calls_s": Waited.seconds, "rss_mb": rss_mb(name)}
    if count:
        below = tuple(f"{place / name}{os.sep}" for name in ("root", "submitit"))
        own = [(event, path) for event, path in list(opened) if path.startswith(below)]
        files = sum(event == "open" and not os.path.isdir(path) for event, path in own)
        found |= {"opens": files, "scans": len(own) - files}
    return found


def rss_mb(name: str) -> float:
    """Peak memory of this process, or of the command that it started."""
    if name.endswith("command"):
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    # ru_maxrss would begin at what the process that started this one had.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak.group(1)) / 1024


def inside(place: Path, task: str, *words: Any) -> Any:
    """Do something in a new process, with the Slurm of a place: this one stays small."""
    env = os.environ | {
        "PATH": f"{place.parent / 'bin'}:{os.environ['PATH']}",
        "BENCH_SLURM": str(place / "slurm"),
    }
    call = [sys.executable, __file__, "--inside", json.dumps([task, str(place), *words])]
    done = subprocess.run(call, env=env, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def do(task: str, place: str, *words: Any) -> Any:
    """What ``inside`` asks for."""
    if task == "make":
        return make_world(Path(place), *words)
    if task == "finish":
        return finish(Path(place), *words)
    return measure(task, Path(place), *words)


# --- the comparison -------------------------------------------------------------------------------


def compare(world: Path, runs: int, rows: int, turns: int, slow_turns: int) -> dict[str, Any]:
    """Measure all sides in turn; ``submit`` and ``collect`` in ``slow_turns`` of them."""
    say(f"making a sweep of {runs:,} runs")
    inside(world, "make", runs)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*SUBMITTING, *SIDES)}
    places = {"submit": world / "queued", "submitit, submit": world / "theirs"}
    for _ in range(slow_turns):
        for name, place in places.items():
            shutil.rmtree(place, ignore_errors=True)
            new_root(world, place.name)
            take(found, name, place, {"submit": runs})
    shutil.rmtree(places["submitit, submit"])
    say("finishing the runs")
    shutil.copytree(world / "queued", world / "finished")
    inside(world / "finished", "finish", rows)
    for turn in range(turns):
        for name, (state, word, _) in SIDES.items():
            if turn < slow_turns or not name.startswith("collect"):
                take(found, name, world / state, {word: runs})
    sides = {name: summary(each) for name, each in found.items()}
    for name, (state, _, _) in SIDES.items():
        if not name.endswith("command"):
            counted = inside(world / state, name, True)
            sides[name] |= {f"{what}_per_run": counted[what] / runs for what in ("opens", "scans")}
    scale = 2_000 / runs
    ours = ("status, finished", "collect")
    return {
        "submit_2000_s": scale * sides["submit"]["s"],
        "status_2000_s": scale * sides["status, finished"]["s"],
        "collect_2000_s": scale * sides["collect"]["s"],
        "opens_per_run": max(sides[name]["opens_per_run"] for name in ours),
        "rss_mb": sides["status, finished"]["rss_mb"],
        "collect_rss_mb": sides["collect"]["rss_mb"],
        "submit_phases_s": {
            phase: statistics.median(one["phases"][phase] for one in found["submit"])
            for phase in found["submit"][0]["phases"]
        },
        "over_submitit": {
            name: statistics.median(
                b["seconds"] / a["seconds"] for a, b in zip(found[a], found[b], strict=True)
            )
            for name, (a, b) in PAIRS.items()
        },
        "inodes_per_run": {state: inodes(world / state) for state in ("queued", "finished")},
        "table_rows": found["collect"][0]["rows"],
        "sides": sides,
        "runs": runs,
        "train_rows": rows,
        "turns": turns,
        "slow_turns": slow_turns,
        "cores": len(os.sched_getaffinity(0)),
    }


def take(found: Any, name: str, place: Path, expected: dict[str, int]) -> None:
    """Measure once; stop where a side does not say what is so."""
    one = inside(place, name, False)
    if one["answers"] != expected:
        raise SystemExit(f"{name}: {one['answers']}, expected {expected}")
    found[name].append(one)
    say(f"{name:<20}{one['seconds']:>8.2f} s{one['rss_mb']:>6.0f} MB")


def summary(each: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "s": statistics.median(one["seconds"] for one in each),
        "least_s": min(one["seconds"] for one in each),
        "slurm_calls": {n: k for n, k in each[0]["calls"].items() if n in SLURM_COMMANDS},
        "slurm_s": statistics.median(one["calls_s"] for one in each),
        "rss_mb": statistics.median(one["rss_mb"] for one in each),
    }


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{'':<20}{'s':>8}{'least':>8}{'opens/run':>11}{'scans/run':>11}{'MB':>6}  Slurm"]
    for name, of in found["sides"].items():
        opens = "".join(f"{of.get(k, math.nan):>11.2f}" for k in ("opens_per_run", "scans_per_run"))
        calls = ", ".join(f"{n} {k}" for k, n in of["slurm_calls"].items())
        lines.append(
            f"{name:<20}{of['s']:>8.2f}{of['least_s']:>8.2f}{opens.replace('nan', '   ')}"
            f"{of['rss_mb']:>6.0f}  {calls}" + (f": {of['slurm_s']:.2f} s" if calls else "")
        )
    rest = {k: v for k, v in found.items() if k != "sides"}
    return "\n".join([*lines, "", *(f"{k:<20}{short(v)}" for k, v in rest.items())])


def short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {short(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, help="rounded up to a multiple of 20; default: 2,000")
    parser.add_argument("--rows", type=int, help="of training in a run's metrics; default: 1,000")
    parser.add_argument("--turns", type=int, help="default: 7, quick 3")
    parser.add_argument("--slow-turns", type=int, help="of submit, collect; default: 3, quick 1")
    parser.add_argument("--quick", action="store_true", help="200 runs, within 50 s")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        with contextlib.redirect_stdout(sys.stderr):
            answer = do(*json.loads(args.inside))
        print(json.dumps(answer))
        return
    runs = -(-(args.runs or (200 if args.quick else 2_000)) // POINTS) * POINTS
    rows = args.rows or 1_000
    turns = args.turns or (3 if args.quick else 7)
    slow_turns = min(turns, args.slow_turns or (1 if args.quick else 3))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = compare(Path(folder).resolve(), runs, rows, turns, slow_turns)
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
