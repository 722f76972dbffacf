"""The tables of a study, ``runs``, ``curves``, ``transfer`` and ``gains``, and how they are read.

The schemas below are the tables' definition: type, unit and meaning of every column travel inside
the Parquet files, and ``results/README.md`` is generated from them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from scaling import ClueError
from scaling.files import RecordError, read_json
from scaling.sweeps import PLAN_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

TABLES_VERSION = 4
"""Version of all four tables; it rises when a reader of an older one would misread them."""

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

PROTOCOL = ("history", "folds", "seeds", "task_digest")
"""Columns of the transfer table in which the rows of one comparison agree."""

SCHEMAS = {
    "runs": RUNS_SCHEMA,
    "curves": CURVES_SCHEMA,
    "transfer": TRANSFER_SCHEMA,
    "gains": GAINS_SCHEMA,
}


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
