"""Sweeps: a TOML file, or a ``Grid`` in a notebook, becomes the runs of one figure.

A sweep file reads like a line under a figure: what is fixed (``[base]``), what is crossed
(``[grid]``), what goes together (``[[zip.rows]]``), and the seeds. The runs are
rows x grid x seeds, each on top of the base; points that come out equal are one run.

    name = "scale_factors"
    figure = "Fig. 2"
    source = "Shin et al. 2023"
    corpus = "corpora/paper.toml"
    seeds = [0]
    [base]
    steps = 100_000
    [grid]
    model = ["clue-4m", "clue-160m"]
    [[zip.rows]]
    batch_size = 256
    items_per_user = 128

Numbers of the corpus come in as a ``CorpusCard``: planning opens no data.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, PrivateAttr

from scaling.config import (
    PAPER_VOCABULARY,
    SINGLE_LOGS,
    ConfigError,
    CorpusCard,
    Frozen,
    ModelConfig,
    Name,
    OptimConfig,
    PoolConfig,
    RunConfig,
    TransferSettings,
    read_toml,
    short_digest,
)
from scaling.files import write_bytes, write_json
from scaling.flops import (
    count_parameters,
    expected_flops,
    mean_items,
    mean_tokens,
    paper_flops,
    to_pf_days,
)

PLAN_SCHEMA_VERSION = 1
SIZES_FILE = "models.toml"

PLAN_COLUMNS = {
    "run_key": "name of the run; null on a nominal corpus, whose runs cannot be submitted",
    "sweep": "name of the sweep",
    "model": "named size at the paper's vocabulary, else shape (layers x width); then -f and "
    "feature_dim, where there is one",
    "layers": "layers of each stack",
    "d_model": "width d",
    "heads": "attention heads",
    "feature_dim": "width of a user's features in one service, reduced by a layer trained with the "
    "encoder; null: d_model",
    "n_total": "trainable parameters",
    "n_non_embedding": "parameters without token and position tables",
    "n_item": "parameters of the Item Transformer, without tables",
    "n_service": "parameters of the Service Transformer, without tables",
    "batch_size": "users per step [users]",
    "negatives": "users contrasted with each other [users]",
    "items_per_user": "cap S on a user's items, per service [items]",
    "items_per_user_mean": "realised mean of min(n, S), per service [items]",
    "sequence_length": "S of the paper's formula: items; of a single Transformer, tokens",
    "tokens_per_item_mean": "mean tokens of a behaviour's item [tokens]",
    "data_fraction": "share of pretraining users",
    "services": "services of pretraining that are contrasted; null: all of the corpus",
    "shuffle": "whether every epoch has a new batch composition",
    "n_users": "users of that share [users]",
    "users_seen": "distinct users a run meets: min(n_users, steps x batch_size); without shuffle "
    "n_users counts in whole batches [users]",
    "epochs": "passes over the users: steps x batch_size / n_users",
    "repeats": "passes beyond the first",
    "steps": "optimiser steps",
    "seed": "seed of initialisation, dropout and data order",
    "lr": "highest learning rate of the schedule",
    "eps": "eps of AdamW",
    "clip_norm": "largest norm of the gradient",
    "precision": "arithmetic of the encoder: fp32, bf16, fp16",
    "gather": "which gradients cross ranks: exact, detached, local, none",
    "gather_ranks": "ranks of a run whose gather is not exact; else null",
    "distinct_items": "whether a rank's batch encodes every distinct item once",
    "flops": "paper's formula: 6 x n_total x batch_size x steps x sequence_length [FLOPs]",
    "flops_exact": "expected from the lengths of the logs, stack by stack [FLOPs]",
    "pf_days": "flops / 8.64e19 [PF-days]",
    "pf_days_exact": "flops_exact / 8.64e19 [PF-days]",
}
"""Columns of a plan, in order, with meaning and unit: the one vocabulary of all tables."""

MODEL_KEYS = ("dropout", "feature_dim")
RUN_KEYS = (
    "batch_size", "negatives", "steps", "evaluations", "precision", "gather", "gather_ranks",
    "distinct_items",
)  # fmt: skip
DATA_KEYS = ("items_per_user", "data_fraction", "services", "shuffle")
POINT_KEYS = (
    "model",
    *MODEL_KEYS,
    *RUN_KEYS,
    *DATA_KEYS,
    *(f"optim.{k}" for k in OptimConfig.model_fields),
)
"""Keys that ``[base]``, ``[grid]`` and ``[[zip.rows]]`` may set."""

SHAPE = re.compile(r"(?P<single>single-)?(?P<layers>\d{1,6})x(?P<d_model>\d{1,6})")
NOMINAL_DIGEST = "0" * 16  # stands in for a nominal corpus while its points are validated

Point = dict[str, Any]


class SweepError(ConfigError):
    """A sweep asks for something that cannot be run."""


class Zip(Frozen):
    """Settings that vary together."""

    rows: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep before it exists."""

    settings: RunConfig
    """What it would be; on a nominal corpus with a digest that stands for none."""
    row: dict[str, Any]
    """The run's row of the plan; keys are ``PLAN_COLUMNS``."""

    @property
    def config(self) -> RunConfig | None:
        """The run's configuration; None on a nominal corpus."""
        return None if self.row["run_key"] is None else self.settings


class Grid(Frozen):
    """Definition of one sweep; the keys of a sweep file."""

    name: Name
    figure: str
    """Figure or table that the sweep makes."""
    source: str
    """Paper, section and whatever else says where the settings come from."""
    corpus: Path
    """Corpus file; in a sweep file relative to that file."""
    base: dict[str, Any] = Field(default_factory=dict)
    """Settings of every run."""
    grid: dict[str, Any] = Field(default_factory=dict)
    """Settings to cross: a list of values each."""
    zip: Zip = Zip()
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    transfer: TransferSettings | None = None
    """Downstream evaluations of every run; no part of what a run is."""
    sizes: dict[str, ModelConfig] = Field(default_factory=dict)
    """Named sizes at the paper's vocabulary; ``read`` adds those of ``models.toml``."""
    _file: str = PrivateAttr("")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a sweep file, with the named sizes of ``models.toml`` beside it.

        Raises:
            ConfigError: a file is missing, malformed, or has keys or values that are not valid.
        """
        grid = cls.parse(read_toml(path), str(path))
        beside = path.parent / SIZES_FILE
        sizes = load_sizes(beside) if beside.exists() else {}
        grid = grid.model_copy(
            update={"corpus": path.parent / grid.corpus, "sizes": {**sizes, **grid.sizes}}
        )
        grid._file = str(path)
        grid._points()
        return grid

    def runs(self, card: CorpusCard) -> list[PlannedRun]:
        """All runs on a corpus, in the order of rows, grid and seeds, each once.

        Raises:
            ConfigError: a key or value is not valid, a named size is used at another vocabulary
                than the paper's, or a batch is larger than the users of its fraction.
        """
        runs: dict[str, PlannedRun] = {}
        for where, point in self._points():
            for seed in self.seeds:
                config = self._config(point, seed, card, where)
                if config.run_key not in runs:
                    row = plan_row(self.name, config, card, self.sizes)
                    runs[config.run_key] = PlannedRun(config, row)
        return list(runs.values())

    def to_toml(self) -> str:
        """The sweep as TOML, complete in itself: with its sizes, without comments."""
        used = {str(p.get("model")) for _, p in self._points()}
        grid = self.model_copy(
            update={
                "corpus": self.corpus.absolute(),
                "sizes": {k: v for k, v in self.sizes.items() if k in used},
            }
        )
        settings = grid.model_dump(mode="json", exclude_defaults=True)
        return "".join(f"{key} = {to_toml_value(value)}\n" for key, value in settings.items())

    def _points(self) -> list[tuple[str, Point]]:
        """Settings of all points, seeds apart, each with its place for messages.

        Every key is checked before any is used.
        """
        where = self._file or self.name
        base = _flat(self.base, f"{where}: base")
        grid = _flat(self.grid, f"{where}: grid")
        rows = [_flat(r, f"{where}: zip.rows[{i}]") for i, r in enumerate(self.zip.rows)] or [{}]
        for key, values in grid.items():
            if not isinstance(values, list | tuple) or not values:
                raise SweepError(f"{where}: grid: {key} = {values!r} is not a list of values")
            for i, row in enumerate(rows):
                if key in row:
                    raise SweepError(f"{where}: {key!r} is in grid and in zip.rows[{i}]")
        points = []
        for i, row in enumerate(rows):
            for values in itertools.product(*grid.values()):
                crossed = dict(zip(grid, values, strict=True))
                place = [f"zip.rows[{i}]"] if self.zip.rows else []
                place += [f"grid with {_describe(crossed)}"] if crossed else []
                points.append(
                    (f"{where}: {', '.join(place) or 'base'}", {**base, **row, **crossed})
                )
        return points

    def _config(self, point: Point, seed: int, card: CorpusCard, where: str) -> RunConfig:
        for key in ("model", "batch_size"):
            if key not in point:
                raise SweepError(f"{where}: no {key!r} in base, grid or zip.rows")
        model = self._model(point["model"], card, where)
        changes = {k: point[k] for k in MODEL_KEYS if k in point}
        model = ModelConfig.parse({**model.model_dump(), **changes}, where)
        services = _services(point.get("services"), card, where)
        config = _parse_run(
            {
                "model": model,
                "data": {
                    "corpus_digest": card.digest or NOMINAL_DIGEST,
                    "vocab_size": card.vocab_size,
                    **{k: point[k] for k in DATA_KEYS if k in point},
                    "n_services": len(services or card.services),
                    "services": services,
                },
                "negatives": point["batch_size"],
                **{k: point[k] for k in RUN_KEYS if k in point},
                "optim": {
                    k.removeprefix("optim."): v for k, v in point.items() if k.startswith("optim.")
                },
                "pool": card.pool_of(services) or PoolConfig(size=1, digest=NOMINAL_DIGEST),
                "seed": seed,
            },
            where,
            point,
        )
        n_users = card.fraction_users(config.data.data_fraction)
        if config.batch_size > n_users:
            raise SweepError(
                f"{where}: batch_size = {config.batch_size} exceeds the {n_users} users of "
                f"data_fraction = {config.data.data_fraction:g} of corpus {card.name}"
            )
        if config.data.n_services == 1:
            only = (services or card.services)[0]
            if card.items_per_user[only][1]:
                raise SweepError(f"{where}: corpus {card.name}: {SINGLE_LOGS.format(only)}")
        return config

    def _model(self, value: Any, card: CorpusCard, where: str) -> ModelConfig:
        if isinstance(value, Mapping):
            return ModelConfig.parse(value, f"{where}: model")
        if isinstance(value, str) and value in self.sizes:
            model = self.sizes[value]
            if card.vocab_size != PAPER_VOCABULARY:
                keys = model.model_dump(exclude_defaults=True)
                table = ", ".join(f"{k} = {to_toml_value(v)}" for k, v in keys.items())
                raise SweepError(
                    f"{where}: {value} is a size at a vocabulary of {PAPER_VOCABULARY}, and corpus "
                    f"{card.name} has {card.vocab_size}; give its shape instead: "
                    f"model = {{{table}}}"
                )
            return model
        shape = SHAPE.fullmatch(value) if isinstance(value, str) else None
        if shape is None:
            named = ", ".join(self.sizes) or f"none, for there is no {SIZES_FILE} beside the sweep"
            raise SweepError(
                f"{where}: model = {value!r} is neither a shape such as '8x64', nor a table of "
                f"layers, d_model and heads, nor a named size ({named})"
            )
        layers, d_model = int(shape["layers"]), int(shape["d_model"])
        widest = max(1, d_model // 64)  # heads of 64 where they divide the width, else wider ones
        heads = next(h for h in range(widest, 0, -1) if d_model % h == 0)
        return ModelConfig.parse(
            {
                "system": "single" if shape["single"] else "clue",
                "layers": layers,
                "d_model": d_model,
                "heads": heads,
            },
            f"{where}: model = {value!r}",
        )


def load_sizes(path: Path) -> dict[str, ModelConfig]:
    """Named model sizes, one table each; they hold at the paper's vocabulary of 50,257.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    return {name: ModelConfig.parse(v, f"{path}: {name}") for name, v in read_toml(path).items()}


def model_name(model: ModelConfig, vocab_size: int, sizes: Mapping[str, ModelConfig]) -> str:
    """Named size of a model where one holds, else its shape; either tells its ``feature_dim``.

    Args:
        sizes: named sizes (``load_sizes``, ``Grid.sizes``); what ``MODEL_KEYS`` set is not part of
            a size.
    """
    if vocab_size == PAPER_VOCABULARY:
        apart = {key: getattr(model, key) for key in MODEL_KEYS}
        for name, size in sizes.items():
            if size.model_copy(update=apart) == model:
                return f"{name}{model.suffix}"
    return model.shape


def plan_row(
    sweep: str, config: RunConfig, card: CorpusCard, sizes: Mapping[str, ModelConfig]
) -> dict[str, Any]:
    """One row of a plan, by ``PLAN_COLUMNS``."""
    model, data = config.model, config.data
    parameters = count_parameters(model, data.vocab_size)
    n_users = card.fraction_users(data.data_fraction)
    views = config.steps * config.batch_size
    flops = paper_flops(parameters.n_total, config.batch_size, config.steps, config.sequence_length)
    drawn = n_users if data.shuffle else n_users // config.batch_size * config.batch_size
    exact = expected_flops(
        model, card, config.batch_size, config.steps, data.items_per_user, config.negatives,
        data.services,
    ).total  # fmt: skip
    return {
        "run_key": config.run_key if card.digest else None,
        "sweep": sweep,
        "model": model_name(model, data.vocab_size, sizes),
        "layers": model.layers,
        "d_model": model.d_model,
        "heads": model.heads,
        "feature_dim": model.feature_dim,
        "n_total": parameters.n_total,
        "n_non_embedding": parameters.n_non_embedding,
        "n_item": parameters.n_item,
        "n_service": parameters.n_service,
        "batch_size": config.batch_size,
        "negatives": config.negatives,
        "items_per_user": data.items_per_user,
        "items_per_user_mean": mean_items(card, data.items_per_user, data.services),
        "sequence_length": config.sequence_length,
        "tokens_per_item_mean": mean_tokens(card),
        "data_fraction": data.data_fraction,
        "services": None if data.services is None else "+".join(data.services),
        "shuffle": data.shuffle,
        "n_users": n_users,
        "users_seen": min(drawn, views),
        "epochs": views / n_users,
        "repeats": max(0.0, views / n_users - 1),
        "steps": config.steps,
        "seed": config.seed,
        "lr": config.optim.lr,
        "eps": config.optim.eps,
        "clip_norm": config.optim.clip_norm,
        "precision": config.precision,
        "gather": config.gather,
        "gather_ranks": config.gather_ranks,
        "distinct_items": config.distinct_items,
        "flops": flops,
        "flops_exact": exact,
        "pf_days": to_pf_days(flops),
        "pf_days_exact": to_pf_days(exact),
    }


def sweep_id(name: str, runs: Iterable[PlannedRun]) -> str:
    """Name of a sweep's folder: its name and eight letters that stand for its runs.

    Raises:
        SweepError: the corpus is nominal, so that the runs have no keys.
    """
    keys = []
    for run in runs:
        if run.config is None:
            raise SweepError(
                f"{name}: its corpus is nominal (statistics without logs), so its runs can be "
                "planned but not run; prepare a corpus from logs and name it under 'corpus'"
            )
        keys.append(run.config.run_key)
    return f"{name}-{short_digest(','.join(sorted(keys)).encode())[:8]}"


def write_sweep(root: Path, grid: Grid, card: CorpusCard, runs: Sequence[PlannedRun]) -> Path:
    """Write ``sweep.toml`` and ``plan.json`` (docs/formats.md) and return their folder.

    Writing the same sweep again changes nothing but the wording of its definition.

    Raises:
        SweepError: the corpus is nominal.
    """
    identity = sweep_id(grid.name, runs)
    folder = Path(root) / "sweeps" / identity
    write_bytes(folder / "sweep.toml", grid.to_toml().encode())
    write_json(
        folder / "plan.json",
        {
            "schema_version": PLAN_SCHEMA_VERSION,
            "sweep": grid.name,
            "sweep_id": identity,
            "figure": grid.figure,
            "source": grid.source,
            "corpus": card.name,
            "corpus_digest": card.digest,
            "runs": [run.row for run in runs],
        },
    )
    return folder


def _services(asked: Any, card: CorpusCard, where: str) -> tuple[str, ...] | None:
    """Services to contrast in the corpus's order; None: all, so that it is the run it was."""
    if asked is None:
        return None
    names = asked if isinstance(asked, list | tuple) else [asked]
    unknown = [n for n in names if n not in card.services]
    if unknown or not names or len(set(names)) < len(names):
        raise SweepError(
            f"{where}: services = {asked!r}; valid: one or more of the services of pretraining of "
            f"corpus {card.name}, each once: {', '.join(card.services)}"
        )
    ordered = tuple(s for s in card.services if s in names)
    return None if ordered == card.services else ordered


def _flat(settings: Mapping[str, Any], where: str) -> Point:
    """Settings with ``optim = {lr = 1}`` written ``optim.lr``; unknown keys are refused."""
    flat: Point = {}
    for key, value in settings.items():
        if key == "optim" and isinstance(value, Mapping):
            flat.update({f"optim.{k}": v for k, v in value.items()})
        else:
            flat[key] = value
    for key in flat:
        if key not in POINT_KEYS:
            hint = "; seeds are set by 'seeds' at the top" if key in ("seed", "seeds") else ""
            raise SweepError(
                f"{where}: unknown key {key!r}; valid keys: {', '.join(POINT_KEYS)}{hint}"
            )
    return flat


def _parse_run(data: Any, where: str, point: Point) -> RunConfig:
    """As ``RunConfig.parse``, but of the settings that the point has, under their names there."""
    try:
        return RunConfig.parse(data, where)
    except ConfigError as e:
        problems = [p.removeprefix(f"{where}: ") for p in str(e).splitlines()]
    if "negatives" not in point:  # it repeats what is wrong with batch_size
        problems = [p for p in problems if not p.startswith("negatives = ")]
    raise SweepError("\n".join(f"{where}: {p.removeprefix('data.')}" for p in problems))


def _describe(point: Point) -> str:
    return ", ".join(f"{k} = {v!r}" for k, v in point.items())


def to_toml_value(value: Any) -> str:
    """A JSON value as TOML on one line."""
    if isinstance(value, dict):
        return (
            f"{{{', '.join(f'{to_toml_value(k)} = {to_toml_value(v)}' for k, v in value.items())}}}"
        )
    if isinstance(value, list):
        return f"[{', '.join(map(to_toml_value, value))}]"
    return json.dumps(value, ensure_ascii=False)
