"""Run directories become tidy tables: ``runs``, ``curves``, ``transfer`` and ``gains``.

A run that is missing, unfinished, diverged or unreadable keeps its row; what is not known is null.
``collect.json`` counts and names every such run, so that nothing leaves a study unseen.

The schemas below are the tables' definition: type, unit and meaning of every column travel inside
the Parquet files, and ``results/README.md`` is generated from them.
"""

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from scaling import ClueError
from scaling.config import RunConfig
from scaling.files import RecordError, read_json, write_bytes, write_json
from scaling.flops import to_pf_days
from scaling.rundir import RunDir
from scaling.sweeps import PLAN_COLUMNS
from scaling.transfer.gains import MATCHED, Evaluated, compare

if TYPE_CHECKING:
    import pandas as pd

TABLES_VERSION = 4
"""Version of all four tables; it rises when a reader of an older one would misread them."""
TRAIN_POINTS = 200
"""Training rows kept per run, evenly spaced; the evaluations on the pool are all kept."""

STR, INT, FLOAT, BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()

_PLAN_TEXT = {"run_key", "sweep", "model", "services", "precision", "gather"}
_PLAN_FLAGS = {"shuffle", "distinct_items"}
_PLAN_REAL = {
    "items_per_user_mean", "tokens_per_item_mean", "data_fraction", "epochs", "repeats", "lr",
    "eps", "clip_norm",
    "flops", "flops_exact", "pf_days", "pf_days_exact",
}  # fmt: skip


class ResultsError(ClueError):
    """A result table is missing, of another version, or cannot be built."""


def _schema(name: str, columns: Iterable[tuple[str, pa.DataType, str, str]]) -> pa.Schema:
    fields = [
        pa.field(column, kind, metadata={"unit": unit, "meaning": meaning})
        for column, kind, unit, meaning in columns
    ]
    return pa.schema(fields, {"clue.table": name, "clue.version": str(TABLES_VERSION)})


def _plan_column(name: str, text: str) -> tuple[str, pa.DataType, str, str]:
    kind = STR if name in _PLAN_TEXT else FLOAT if name in _PLAN_REAL else INT
    kind = BOOL if name in _PLAN_FLAGS else kind
    meaning, _, unit = text.removesuffix("]").partition(" [")
    if name in COUNTED:
        meaning = COUNTED[name]
    return name, kind, unit, meaning


COUNTED = {
    "flops_exact": "counted from the lengths of the logs the run met, where it is over; else "
    "expected from the corpus",
    "pf_days_exact": "flops_exact / 8.64e19",
}
"""Columns of the plan that a finished run replaces by what it counted."""

RUNS_SCHEMA = _schema(
    "runs",
    [
        *(_plan_column(name, text) for name, text in PLAN_COLUMNS.items()),
        ("corpus", STR, "", "name of the corpus"),
        ("corpus_digest", STR, "", "digest of the prepared corpus"),
        ("pool_size", INT, "users", "users in the fixed pool; chance is ln of it"),
        ("pool_digest", STR, "", "digest of the pool; losses over different pools never compare"),
        ("state", STR, "", "PLANNED, DONE or DIVERGED by the run's own records; null: started, "
         "not over, and only the scheduler knows more (see `clue-scaling status`)"),
        ("status", STR, "", "result.json's word: done or diverged"),
        ("step", INT, "steps", "last step with a metrics row"),
        ("loss", FLOAT, "nats", "contrastive loss on the pool at the final step, dropout off"),
        ("loss_se", FLOAT, "nats", "standard error of loss, as over other pools of as many users"),
        ("loss_refit", FLOAT, "nats", "the same with the logit scale refitted on validation users"),
        ("best_loss", FLOAT, "nats", "lowest loss among the evaluations"),
        ("best_step", INT, "steps", "step of best_loss"),
        ("train_loss", FLOAT, "nats", "mean training loss over the last twentieth of the steps"),
        ("chance", FLOAT, "nats", "loss of a guess: ln pool_size"),
        ("accuracy", FLOAT, "", "share of pool users whose match ranks first, both directions"),
        ("logit_scale", FLOAT, "", "scale of the cosines (tau), as trained"),
        ("tokens", FLOAT, "tokens", "tokens encoded in training"),
        ("items", FLOAT, "items", "behaviours encoded in training"),
        ("users", FLOAT, "users", "users met in training, with repetition"),
        ("seconds", FLOAT, "s", "wall time of training, with its evaluations and checkpoints, over "
         "all generations"),
        ("clipped_steps", INT, "steps", "steps whose gradient was clipped"),
        ("overflows", INT, "", "gradients computed in vain, which overflowed in fp16"),
        ("world_size", INT, "ranks", "ranks at the end"),
        ("micro_batch_tokens", INT, "tokens", "most elements whose activations a rank held at "
         "once, at the end"),
        ("attempts", INT, "", "submissions of the run so far; null: none is recorded"),
    ],
)  # fmt: skip

CURVES_SCHEMA = _schema(
    "curves",
    [
        ("run_key", STR, "", "name of the run"),
        ("kind", STR, "", "pool: an evaluation on the fixed pool; train: a training step"),
        ("step", INT, "steps", "optimiser steps done"),
        ("pool_size", INT, "users", "users contrasted in the evaluation; null for train"),
        ("loss", FLOAT, "nats", "contrastive loss; at pool sizes below the run's own the mean over "
         "disjoint pools; for train that of the batch"),
        ("loss_se", FLOAT, "nats", "standard error of the loss, as over other pools"),
        ("loss_refit", FLOAT, "nats", "with the logit scale refitted on validation users"),
        ("accuracy", FLOAT, "", "share of pool users whose match ranks first"),
        ("logit_scale", FLOAT, "", "scale of the cosines (tau)"),
        ("lr", FLOAT, "", "learning rate of the step"),
        ("grad_norm", FLOAT, "", "norm of the gradient before clipping"),
        ("clipped_steps", INT, "steps", "steps so far whose gradient was clipped"),
        ("damping", FLOAT, "", "median of sqrt(v) / (sqrt(v) + eps) over the parameters: the share "
         "of AdamW's update that eps leaves"),
        ("damping_p10", FLOAT, "", "its 10 % quantile"),
        ("tokens", FLOAT, "tokens", "tokens encoded so far"),
        ("items", FLOAT, "items", "behaviours encoded so far"),
        ("users", FLOAT, "users", "users met so far, with repetition"),
        ("flops_exact", FLOAT, "FLOPs", "counted so far, stack by stack"),
        ("pf_days_exact", FLOAT, "PF-days", "flops_exact / 8.64e19"),
        ("seconds", FLOAT, "s", "wall time so far, evaluations and checkpoints included, over all "
         "generations"),
        ("flops_per_second", FLOAT, "FLOP/s", "exact FLOPs over the time of the steps alone, over "
         "all ranks, since the training row before"),
        ("mfu", FLOAT, "", "that as a share of the devices' peak, where one is known"),
    ],
)  # fmt: skip


def _with_interval(name: str, unit: str, meaning: str) -> list[tuple[str, pa.DataType, str, str]]:
    return [
        (name, FLOAT, unit, meaning),
        (f"{name}_low", FLOAT, unit, f"lower end of the 95 % interval of {name}, users resampled"),
        (f"{name}_high", FLOAT, unit, "upper end of it"),
    ]


MEASURES = (
    ("hr_1", "", "hit rate at 1 among the candidates"),
    ("hr_10", "", "hit rate at 10"),
    ("ndcg_10", "", "normalised discounted cumulative gain at 10"),
    ("mrr", "", "mean reciprocal rank"),
    ("loss", "nats", "downstream loss: binary cross-entropy on fixed pairs"),
    ("loss_softmax", "nats", "cross-entropy over the 101 candidates"),
)
"""What downstream evaluations measure: column, unit, meaning."""

TRANSFER_SCHEMA = _schema(
    "transfer",
    [
        ("run_key", STR, "", "run whose encoder was used; null: a system without one"),
        ("task", STR, "", "downstream task"),
        ("system", STR, "", "encoder and head (clue/u-mlp, clue/u-mlp-64, clue/linear, "
         "clue/hybrid), or a system without an encoder (popularity, tfidf, bst, lightgcn, ...)"),
        ("segment", STR, "", "all, or the segment of users: new, cold, regular, heavy"),
        ("history", STR, "", "target: the target service's own log; all: every service's"),
        ("folds", INT, "", "folds of the users: every user is tested in one"),
        ("seeds", INT, "", "seeds of what is trained on the features"),
        ("task_digest", STR, "", "digest of the task's content"),
        ("step", INT, "steps", "checkpoint that was evaluated: always the run's last step"),
        *(
            column
            for name, unit, meaning in MEASURES
            for column in _with_interval(name, unit, f"{meaning}; mean over targets and seeds")
        ),
        ("tie_gap", FLOAT, "", "largest change of a metric between best and worst order of ties"),
        ("candidates", INT, "items", "items that a target is ranked among, itself included"),
        ("n_users", INT, "users", "users tested"),
        ("n_targets", INT, "items", "targets tested"),
    ],
)  # fmt: skip


def _gain(name: str, unit: str, meaning: str) -> list[tuple[str, pa.DataType, str, str]]:
    gain, relative = f"{name}_gain", f"{name}_relative"
    return [
        *_with_interval(gain, unit, f"{meaning}: the run's less the baseline's, on the same "
                        "targets of the same users; mean over targets and seeds"),
        *_with_interval(relative, "", f"{gain} / {name}_baseline; null where that is 0"),
        (f"{name}_baseline", FLOAT, unit, f"the baseline's own {name}"),
    ]  # fmt: skip


GAINS_SCHEMA = _schema(
    "gains",
    [
        ("run_key", STR, "", "run whose encoder was used"),
        ("task", STR, "", "downstream task"),
        ("task_digest", STR, "", "digest of the task's content"),
        ("system", STR, "", "the run's encoder and head (clue/u-mlp, ...)"),
        ("history", STR, "", "of the run's evaluation; a baseline's is always target"),
        ("folds", INT, "", "folds of the users, of both"),
        ("seeds", INT, "", "seeds, of both"),
        ("baseline", STR, "", "the system without an encoder (popularity, bst, lightgcn, ...)"),
        ("baseline_validation_loss", FLOAT, "nats", "its binary cross-entropy on validation "
         "examples, the same pairs for all systems: mean over folds and seeds; null: it counts"),
        *(column for measure in MEASURES for column in _gain(*measure)),
        ("tau_b_union", FLOAT, "", "Kendall's tau-b of the token distributions of the pretraining "
         "of the run's corpus and the task, over tokens of either; null: a corpus is gone"),
        ("tau_b_intersection", FLOAT, "", "the same over tokens of both"),
        ("tau_b_top_1000", FLOAT, "", "the same over the 1,000 most frequent of pretraining"),
        ("n_users", INT, "users", "users tested"),
        ("n_targets", INT, "items", "targets tested"),
    ],
)  # fmt: skip

SCHEMAS = {
    "runs": RUNS_SCHEMA,
    "curves": CURVES_SCHEMA,
    "transfer": TRANSFER_SCHEMA,
    "gains": GAINS_SCHEMA,
}
CURVES_COLUMNS = tuple(CURVES_SCHEMA.names)
"""Held, for a schema makes its names anew for each of a million rows."""


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of one sweep; a missing value is NA or NaN.

    Attributes:
        runs: one row per planned run, in the order of the plan.
        curves: metrics along the runs.
        transfer: downstream evaluations.
        gains: each run's evaluations against systems without an encoder, on the same targets.
        collected: content of ``collect.json``.
    """

    runs: "pd.DataFrame"
    curves: "pd.DataFrame"
    transfer: "pd.DataFrame"
    gains: "pd.DataFrame"
    collected: Mapping[str, Any]


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


def load(folder: Path) -> Tables:
    """Read the tables of a sweep.

    Integers come as pandas' nullable ``Int64``, so that a missing one is NA and not a float.

    Raises:
        ResultsError: a table is missing, unreadable or of another version.
    """
    frames = {name: _read(Path(folder) / f"{name}.parquet", name) for name in SCHEMAS}
    try:
        collected = read_json(Path(folder) / "collect.json")
    except RecordError as e:
        raise ResultsError(f"{e}; `clue-scaling collect` writes it") from None
    return Tables(**frames, collected=collected)


def data_dictionary() -> str:
    """The columns of all tables as Markdown, from the schemas."""
    parts = []
    for name, schema in SCHEMAS.items():
        lines = [
            f"### {name}.parquet",
            "",
            "| column | type | unit | meaning |",
            "|---|---|---|---|",
        ]
        for column in schema:
            unit, meaning = (column.metadata[k].decode() for k in (b"unit", b"meaning"))
            lines.append(f"| `{column.name}` | {column.type} | {unit} | {meaning} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


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


PROTOCOL = ("history", "folds", "seeds", "task_digest")
"""Columns of the transfer table in which the rows of one comparison agree."""


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
                compared.append(Evaluated(path, columns, row, corpora))
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


def _read(path: Path, name: str) -> "pd.DataFrame":
    import pandas as pd  # collecting does without

    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such table; `clue-scaling collect` writes it") from None
    except (pa.ArrowInvalid, OSError) as e:
        raise ResultsError(f"{path}: not a readable Parquet file ({e})") from None
    metadata = table.schema.metadata or {}
    found = metadata.get(b"clue.table", b"").decode(), metadata.get(b"clue.version", b"").decode()
    if found != (name, str(TABLES_VERSION)):
        raise ResultsError(
            f"{path}: holds {found[0] or 'some other table'} of version {found[1] or 'none'}; "
            f"this program reads {name} of version {TABLES_VERSION}: collect it again"
        )
    if not table.schema.equals(SCHEMAS[name]):
        raise ResultsError(f"{path}: its columns are not those of {name} version {TABLES_VERSION}")
    frame: pd.DataFrame = table.to_pandas(types_mapper={INT: pd.Int64Dtype()}.get)
    return frame
