"""Run directories become the tables of a study (``scaling.results``).

A run that is missing, unfinished, diverged or unreadable keeps its row; what is not known is null.
``collect.json`` counts and names every such run, so that nothing leaves a study unseen.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from scaling import ClueError
from scaling.config import RunConfig
from scaling.files import RecordError, read_json, write_bytes, write_json
from scaling.flops import to_pf_days
from scaling.results import (
    COUNTED,
    CURVES_SCHEMA,
    GAINS_SCHEMA,
    PROTOCOL,
    RUNS_SCHEMA,
    TABLES_VERSION,
    TRANSFER_SCHEMA,
    ResultsError,
)
from scaling.rundir import RunDir
from scaling.sweeps import PLAN_COLUMNS
from scaling.transfer.gains import MATCHED, Evaluated, compare

TRAIN_POINTS = 200
"""Training rows kept per run, evenly spaced; the evaluations on the pool are all kept."""
CURVES_COLUMNS = tuple(CURVES_SCHEMA.names)
"""Held, for a schema makes its names anew for each of a million rows."""


@dataclass
class _Account:
    """What could not be taken in full, by reason."""

    incomplete: list[dict[str, Any]] = field(default_factory=list)
    diverged: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    stale: list[dict[str, Any]] = field(default_factory=list)
    without_transfer: list[str] = field(default_factory=list)
    train_rows_left_out: int = 0


def collect(
    root: Path, planned_rows: Sequence[Mapping[str, Any]], sweep_name: str, out: Path
) -> dict[str, Any]:
    """Read the run directories of a plan and write the tables of the sweep, which ``load`` reads.

    Writes ``out/{runs,curves,transfer,gains}.parquet`` and ``out/collect.json``, each atomically;
    the same run directories always give the same bytes.

    Args:
        root: root folder of all state.
        planned_rows: rows of the plan, keyed by ``PLAN_COLUMNS``.
        sweep_name: name of the sweep.
        out: folder of the tables, ``results/<sweep>``.

    Returns:
        The content of ``collect.json``.

    Raises:
        ResultsError: the plan is empty, names a run twice, or lacks columns.
    """
    _check_plan(planned_rows, sweep_name)
    account = _Account()
    runs: list[dict[str, Any]] = []
    curves = [CURVES_SCHEMA.empty_table()]
    transfer = [TRANSFER_SCHEMA.empty_table()]
    evaluated: list[Evaluated] = []
    for planned in planned_rows:
        runs.append(_collect_run(root, planned, curves, transfer, evaluated, account))
    tables = {
        "runs": pa.Table.from_pylist(runs, schema=RUNS_SCHEMA),
        "curves": pa.concat_tables(curves),
        "transfer": pa.concat_tables(transfer),
    }
    baselines, systems = _baseline_rows(root, tables["transfer"])
    tables["transfer"] = pa.concat_tables(
        [tables["transfer"], pa.Table.from_pylist(baselines, schema=TRANSFER_SCHEMA)]
    )
    gains = compare(root, evaluated, systems)
    tables["gains"] = pa.Table.from_pylist(gains.rows, schema=GAINS_SCHEMA)
    states = Counter(row["state"] or "UNFINISHED" for row in runs)
    report = {
        "schema_version": TABLES_VERSION,
        "sweep": sweep_name,
        "planned": len(runs),
        "states": dict(sorted(states.items())),
        "with_loss": sum(row["loss"] is not None for row in runs),
        "incomplete": account.incomplete,
        "diverged": account.diverged,
        "unreadable": account.unreadable,
        "stale": account.stale,
        "without_transfer": account.without_transfer if len(tables["transfer"]) else [],
        "unpaired": gains.unpaired,
        "without_tau": gains.without_tau,
        "rows": {name: len(table) for name, table in tables.items()},
        "train_rows_left_out": account.train_rows_left_out,
        "train_rows_rule": f"at most {TRAIN_POINTS} training rows a run, evenly spaced by row",
    }
    for name, table in tables.items():
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        write_bytes(out / f"{name}.parquet", buffer.getbuffer())
    write_json(out / "collect.json", report)
    return report


def _check_plan(planned_rows: Sequence[Mapping[str, Any]], sweep_name: str) -> None:
    if not planned_rows:
        raise ResultsError(f"sweep {sweep_name}: the plan has no runs")
    keys = Counter(row.get("run_key") for row in planned_rows if row.get("run_key"))
    twice = [str(key) for key, count in keys.items() if count > 1]
    if twice:
        raise ResultsError(f"sweep {sweep_name}: the plan names {', '.join(twice)} more than once")
    missing = sorted(set(PLAN_COLUMNS) - set(planned_rows[0]))
    if missing:
        raise ResultsError(f"sweep {sweep_name}: rows of the plan lack {', '.join(missing)}")


def _collect_run(
    root: Path,
    planned: Mapping[str, Any],
    curves: list[pa.Table],
    transfer: list[pa.Table],
    evaluated: list[Evaluated],
    account: _Account,
) -> dict[str, Any]:
    """Row of one run; its curve and transfer rows and its evaluations are appended."""
    row: dict[str, Any] = dict.fromkeys(RUNS_SCHEMA.names)
    row.update({name: planned[name] for name in PLAN_COLUMNS})
    key = planned["run_key"]
    if key is None:
        row["state"] = "PLANNED"
        account.incomplete.append({"run_key": None, "reason": "nominal corpus: cannot be run"})
        return row
    run = RunDir(root, key)
    if not run.path.is_dir():
        row["state"] = "PLANNED"
        account.incomplete.append({"run_key": key, "reason": "not submitted"})
        return row
    try:
        config, specification = run.specification()
        row["corpus"] = str(specification["corpus"])
        row["corpus_digest"] = config.data.corpus_digest
        row["pool_size"], row["pool_digest"] = config.pool.size, config.pool.digest
        row["attempts"] = len(run.attempt_numbers()) or None
        found, left_out = _curve_rows(run, config)
        row["step"] = max((r["step"] for r in found), default=None)
        result = run.result()
        if result is not None:
            _take_result(row, result, planned, run, config)
        downstream, compared, stale = _transfer_rows(run, config)
        pa.Table.from_pylist([row], schema=RUNS_SCHEMA)
        curve = pa.Table.from_pylist(found, schema=CURVES_SCHEMA)
        scores = pa.Table.from_pylist(downstream, schema=TRANSFER_SCHEMA)
    except (ClueError, KeyError, TypeError, ValueError, AttributeError) as e:
        # besides torn and foreign records: whole JSON of the wrong shape (a row without a step, a
        # loss that is a string); one such run must not keep the others from being collected
        error = str(e) if isinstance(e, ClueError) else f"{run.path}: malformed record ({e!r})"
        account.unreadable.append({"run_key": key, "error": error})
        return {**dict.fromkeys(RUNS_SCHEMA.names), **{n: planned[n] for n in PLAN_COLUMNS}}
    curves.append(curve)
    transfer.append(scores)
    evaluated += compared
    account.stale += stale
    account.train_rows_left_out += left_out
    if row["status"] == "diverged":
        account.diverged.append({"run_key": key, "step": row["step"]})
    elif result is None:
        started = row["attempts"] is not None or row["step"] is not None or run.generations()
        row["state"] = None if started else "PLANNED"
        reason = f"not over, last step {row['step']}" if started else "not submitted"
        account.incomplete.append({"run_key": key, "reason": reason})
    elif not downstream:
        account.without_transfer.append(key)
    return row


RESULT_COLUMNS = (
    "status", "step", "loss", "loss_refit", "best_loss", "best_step", "train_loss", "chance",
    "accuracy", "logit_scale", "tokens", "items", "users", "seconds", "world_size",
)  # fmt: skip
"""Columns that a run's ``result.json`` fills, under the same names."""
LATER_COLUMNS = ("loss_se", "clipped_steps", "overflows", "micro_batch_tokens")
"""Likewise, but the first runs' records do not have them."""


def _take_result(
    row: dict[str, Any],
    result: Mapping[str, Any],
    planned: Mapping[str, Any],
    run: RunDir,
    config: RunConfig,
) -> None:
    where = run.path / "result.json"
    lacking = [name for name in (*RESULT_COLUMNS, *COUNTED) if name not in result]
    if lacking:
        raise RecordError(f"{where}: lacks {', '.join(lacking)}")
    if result["status"] not in ("done", "diverged"):
        raise RecordError(f"{where}: status is {result['status']!r}; valid: done, diverged")
    if result["status"] == "done" and (result["loss"] is None or result["step"] != config.steps):
        raise RecordError(
            f"{where}: done at step {result['step']} of {config.steps} with loss {result['loss']}"
        )
    for name, expected in (
        ("run_key", run.run_key),
        ("pool_digest", config.pool.digest),
        ("n_total", planned["n_total"]),
    ):
        if result.get(name) != expected:
            raise RecordError(f"{where}: {name} is {result.get(name)!r}, expected {expected!r}")
    row.update({name: result[name] for name in (*RESULT_COLUMNS, *COUNTED)})
    row.update({name: result.get(name) for name in LATER_COLUMNS})
    row["state"] = {"done": "DONE", "diverged": "DIVERGED"}[result["status"]]


def _curve_rows(run: RunDir, config: RunConfig) -> tuple[list[dict[str, Any]], int]:
    """Curve of one run, and the number of its training rows that were left out."""
    rows: list[dict[str, Any]] = []
    curves = run.curves("pool", "train")
    for point in curves["pool"]:
        rows.append(_curve_row(run, "pool", point) | {"pool_size": config.pool.size})
        for size, loss in sorted(point.get("pools", {}).items(), key=lambda kv: int(kv[0])):
            shared = {name: point.get(name) for name in ("step", "tokens", "items", "users")}
            shared |= {name: point.get(name) for name in ("flops_exact", "seconds")}
            rows.append(
                _curve_row(run, "pool", shared) | {"pool_size": int(size), "loss": float(loss)}
            )
    train = curves["train"]
    stride = -(-len(train) // TRAIN_POINTS) if train else 1
    kept = train[::-1][::stride][::-1]  # the last step is always among them
    rows.extend(_curve_row(run, "train", point) for point in kept)
    return rows, len(train) - len(kept)


def _curve_row(run: RunDir, kind: str, point: Mapping[str, Any]) -> dict[str, Any]:
    speed = point.get("speed") or {}
    row = {name: point.get(name, speed.get(name)) for name in CURVES_COLUMNS}
    flops = point.get("flops_exact")
    row["pf_days_exact"] = None if flops is None else to_pf_days(flops)
    return row | {"run_key": run.run_key, "kind": kind, "pool_size": None}


def _transfer_rows(
    run: RunDir, config: RunConfig
) -> tuple[list[dict[str, Any]], list[Evaluated], list[dict[str, Any]]]:
    """Rows of the run's last step, what they are of, and records of other steps, which say nothing
    of its loss."""
    rows, compared, stale = [], [], []
    for path in sorted(run.path.glob("transfer/*.json")):
        record = read_json(path)
        if not isinstance(record, dict) or record.get("run_key") != run.run_key:
            raise RecordError(f"{path}: not a transfer record of run {run.run_key}")
        evaluation = record.get("evaluation")
        if not isinstance(evaluation, dict):
            stale.append({"run_key": run.run_key, "record": path.name, "step": record.get("step")})
            continue  # of a version that kept folds apart
        shared = {name: evaluation.get(name) for name in PROTOCOL} | {"run_key": run.run_key}
        step = record.get("step")
        if step != config.steps:
            stale.append({"run_key": run.run_key, "record": path.name, "step": step})
            continue
        for entry in record.get("rows", []):
            row = {name: entry.get(name) for name in TRANSFER_SCHEMA.names} | shared
            rows.append(row | {"step": step})
            if row["segment"] == "all":
                columns = shared | {"task": row["task"], "system": row["system"]}
                corpora = str(config.data.corpus_digest), str(evaluation.get("corpus_digest"))
                services = config.data.services
                compared.append(Evaluated(path, columns, row, corpora, services))
    return rows, compared, stale


def _baseline_rows(root: Path, transfer: pa.Table) -> tuple[list[dict[str, Any]], list[Evaluated]]:
    """Rows of the systems without an encoder on the tasks that the runs were evaluated on, and
    what they are of.

    Raises:
        RecordError: a record is torn, or is none.
    """
    tasks = set(transfer["task_digest"].to_pylist())
    rows, systems = [], []
    for path in sorted((root / "baselines").glob("*/*/*.json")):
        record = read_json(path)
        if not isinstance(record, dict) or not {"task_digest", "rows"} <= record.keys():
            raise RecordError(f"{path}: not a record of a baseline")
        if record["task_digest"] not in tasks:
            continue
        shared = {name: record.get(name) for name in PROTOCOL}
        for entry in record["rows"]:
            row = {name: entry.get(name) for name in TRANSFER_SCHEMA.names} | shared
            rows.append(row)
            if row["segment"] == "all":
                columns = {name: shared[name] for name in MATCHED}
                columns |= {"baseline": row["system"]}
                columns |= {"baseline_validation_loss": record.get("validation_loss")}
                systems.append(Evaluated(path, columns, row))
    return rows, systems
