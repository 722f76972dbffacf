"""Verbs on corpora."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from scaling import ClueError
from scaling.cli.app import WORK, Json, Root, Verbs, app
from scaling.cli.terminal import cell, print_json, print_table, progress

CorpusFile = Annotated[Path, typer.Argument(help="Corpus file (TOML).")]
CorpusName = Annotated[
    str, typer.Argument(help="Name, digest or folder of a prepared corpus, or its corpus file.")
]
LEAST_MEMORY = 500_000_000
"""Of DuckDB. [bytes]"""
LENGTHS = ("mean", "min", "p10", "p25", "p50", "p75", "p90", "p99", "max")
SPREAD = (
    "service", "users", "behaviours", "tokens", "vocabulary", "items", "top_1pct", "top_10pct",
    "gini",
)  # fmt: skip
PADDED = ("service", "tokens", "to_longest", "avoided_to_longest", "to_caps", "avoided_to_caps")
OVERLAP = ("service", "other", "users", "texts", "shared_texts", "logs_on_shared")

corpus_app = typer.Typer(
    cls=Verbs, help="Look into prepared corpora.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(corpus_app, name="corpus")


class EngineChoice(StrEnum):
    """Where the relational part of a preparation runs."""

    duckdb = "duckdb"
    spark = "spark"


@app.command()
def prepare(
    corpus_file: CorpusFile,
    root: Root = WORK,
    engine: Annotated[
        EngineChoice,
        typer.Option(
            help="duckdb: one machine, larger than memory; spark: the configured session."
        ),
    ] = EngineChoice.duckdb,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory of DuckDB, such as 64GB; default: 1 GiB a core, at most half."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a corpus from behaviour logs.

    The corpus is the same on both engines. Again with nothing changed it is a quick no-op. Prints
    the folder of the corpus.

    \b
    Example:
        clue-scaling prepare sweeps/corpora/demo.toml
    """
    from scaling.data.corpus import read_manifest
    from scaling.data.prepare import prepare as publish

    limit = None if memory is None else _bytes(memory)
    with progress("prepare") as update, _ended_like_ctrl_c():
        path = publish(corpus_file, root, engine=engine.value, memory=limit, progress=update)
    manifest = read_manifest(path)
    if as_json:
        print_json({"path": str(path), **{k: manifest[k] for k in ("digest", "steps", "tasks")}})
        return
    first, *others = manifest["steps"]
    listed = f": {path.parent / manifest['name']}.malformed.txt" if first["malformed"] else ""
    typer.echo(
        f"{first['logs']:,} logs, {first['malformed']:,} of them malformed{listed}", err=True
    )
    before = first["logs"] - first["malformed"]
    for step in others:
        lost = f"{before - step['logs']:,} fewer" if step["logs"] < before else "all kept"
        typer.echo(
            f"  {step['step']:<14}{step['logs']:>15,} of {step['users']:,} users, {lost}", err=True
        )
        before = step["logs"]
    users = ", ".join(f"{n:,} {split}" for split, n in manifest["splits"].items())
    typer.echo(f"users: {users}", err=True)
    typer.echo(path)


@contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """SIGTERM and SIGHUP interrupt, so that what lies in the scratch folder is removed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bytes(text: str) -> int:
    """Bytes that ``64GB`` or ``500 MiB`` says."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])(I?)B", text.strip().upper())
    if found is None:
        raise typer.BadParameter(
            f"--memory {text!r} is no size; valid: a number and MB, GB, TB, MiB, GiB or TiB"
        )
    number, unit, binary = found.groups()
    size = int(float(number) * (1024 if binary else 1000) ** ("MGT".index(unit) + 2))
    if size < LEAST_MEMORY:
        raise typer.BadParameter(f"--memory {text!r} is too little; at least 500MB")
    return size


@corpus_app.command()
def info(
    name: CorpusName,
    root: Root = WORK,
    full: Annotated[
        bool, typer.Option("--full", help="Read the logs too: popularity, padding, overlap.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Users of the batches whose padding --full counts.")
    ] = 256,
    items_per_user: Annotated[
        int, typer.Option(min=1, help="Cap on a user's items, per service, in these batches.")
    ] = 128,
    as_json: Json = False,
) -> None:
    """Say what a prepared corpus holds.

    At once from its manifest; with --full, what only reading the logs tells.

    \b
    Example:
        clue-scaling corpus info demo
        clue-scaling corpus info demo --full
    """
    from scaling.data.corpus import Corpus
    from scaling.data.statistics import summary, survey

    records = []
    for corpus in map(Corpus.open, corpora_of(root, name)):
        records.append(summary(corpus))
        if full:
            with progress("read") as update, _damage_told(corpus.path):
                records[-1]["logs"] = survey(corpus, batch_size, items_per_user, update)
    if as_json:
        print_json(records)
        return
    for i, record in enumerate(records):
        typer.echo("\n" * bool(i), nl=False)
        _print_summary(record)
        if full:
            _print_survey(record)


@corpus_app.command()
def compare(
    names: Annotated[
        list[str], typer.Argument(help="Prepared corpora; the first one's tokenizer is used.")
    ],
    root: Root = WORK,
    as_json: Json = False,
) -> None:
    """Say how alike corpora, their services and their tasks are.

    Kendall's tau-b of their token distributions (Shin et al. 2023, Figure 5), over the tokens of
    either (union), of both (intersection) and the 1,000 most frequent of a (top_1000).

    \b
    Example:
        clue-scaling corpus compare demo
        clue-scaling corpus compare demo <OTHER>
    """
    from scaling.data.corpus import Corpus
    from scaling.data.domains import VARIANTS
    from scaling.data.domains import compare as measure

    paths = dict.fromkeys(path for name in names for path in corpora_of(root, name))
    with progress("read") as update, _damage_told(*paths):
        found = measure([Corpus.open(path) for path in paths], update)
    if as_json:
        print_json(found)
        return
    typer.echo(f"tokens of {found['tokenizer']}")
    print_table(found["domains"], ["domain", "behaviours", "tokens", "vocabulary"])
    typer.echo("\nKendall's tau-b")
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for row in found["pairs"]:
        pair = pairs.setdefault((row["a"], row["b"]), {"a": row["a"], "b": row["b"]})
        pair[row["variant"]] = row["tau_b"]
    print_table([*pairs.values()], ["a", "b", *VARIANTS])


@corpus_app.command()
def verify(name: CorpusName, root: Root = WORK) -> None:
    """Read a corpus through and check digests, structure and tasks.

    Exit status 2 says that it is not whole; every fault found is a line.

    \b
    Example:
        clue-scaling corpus verify demo
    """
    from scaling.data.corpus import Corpus

    for path in corpora_of(root, name):
        with progress("verify") as update:
            Corpus.open(path).verify(update)
        typer.echo(f"{path}: whole")


@corpus_app.command()
def floor(
    corpus_file: CorpusFile,
    items_per_user: Annotated[int, typer.Option(min=1, help="Cap on a user's items, per service.")],
    pool_size: Annotated[
        int | None, typer.Option(min=2, help="Users of the pool; default: the corpus file's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say how low the pool loss of any encoder can be, for a synthetic corpus.

    \b
    Example:
        clue-scaling corpus floor sweeps/corpora/demo.toml --items-per-user 8 --pool-size 512
    """
    from dataclasses import asdict

    from scaling.data.recipe import read_corpus_file
    from scaling.data.sources.synthetic import Config, pool_floor

    corpus = read_corpus_file(corpus_file)
    if not isinstance(corpus.source, Config):
        kind = corpus.source.kind if corpus.source else "none"
        raise ClueError(
            f"{corpus_file}: source.kind = {kind!r}; the floor is known for 'synthetic' only"
        )
    size = pool_size or corpus.users.pool
    found = pool_floor(corpus.source, items_per_user=items_per_user, pool_size=size)
    if as_json:
        asked = {"corpus": corpus.name, "items_per_user": items_per_user, "pool_size": size}
        print_json(asked | asdict(found))
        return
    typer.echo(
        f"{found.loss:.4f} nats, standard error {found.standard_error:.4f} "
        f"(mean of {found.n_pools} pools of {size} users, {items_per_user} items a service)"
    )


@contextmanager
def _damage_told(*paths: Path) -> Iterator[None]:
    """What reading a damaged corpus raises, as an error that says what finds the damage."""
    try:
        yield
    except (IndexError, ValueError, MemoryError) as e:
        names = " ".join(path.name for path in paths)
        raise ClueError(
            f"damaged ({type(e).__name__} while reading); to see where: "
            f"clue-scaling corpus verify {names}"
        ) from e


def corpora_of(root: Path, name: str) -> list[Path]:
    """Folders of the prepared corpora that are meant."""
    from scaling.data.corpus import CorpusError, named
    from scaling.data.prepare import find_prepared

    if name.endswith(".toml"):
        if (made := find_prepared(root, Path(name))) is None:
            raise CorpusError(f"{name}: not prepared below {root}")
        return [made.path]
    if (Path(name) / "manifest.json").is_file():
        return [Path(name)]
    return named(root, name)


def _print_summary(corpus: dict[str, Any]) -> None:
    """A corpus in lines, and tables of its lengths and of what each step of cleaning left."""
    users, behaviours = corpus["users"], sum(corpus["behaviours"].values())
    per_item = corpus["tokens_per_item"]
    transfer = [s for s in corpus["services"] if s not in corpus["pretraining_services"]]
    for key, said in {
        "corpus": f"{corpus['name']}-{corpus['digest']}",
        "folder": f"{corpus['path']} ({_size(corpus['bytes'])})",
        "services": ", ".join(corpus["pretraining_services"])
        + (f"; for transfer only: {', '.join(transfer)}" if transfer else ""),
        "users": ", ".join(f"{cell(n)} {split}" for split, n in users.items()),
        "behaviours": f"{cell(behaviours)} of pretraining users, "
        f"{cell(behaviours / users['pretraining'])} a user",
        "tokens": f"{cell(corpus['tokens'])} in these, {cell(per_item['mean'])} a behaviour, "
        f"the service's token included",
        "times": "; ".join(f"{s} {_period(times)}" for s, times in corpus["times"].items()),
        "items": f"{cell(corpus['items'])} of all services",
        "vocabulary": f"{cell(corpus['vocab_size'])} tokens",
        "tasks": ", ".join(corpus["tasks"]) or "none",
    }.items():
        typer.echo(f"{key:<12}{said}")
    typer.echo()
    rows = [
        {"length": f"logs of a user, {service}", **lengths}
        for service, lengths in corpus["items_per_user"].items()
    ]
    print_table([*rows, {"length": "tokens of a behaviour", **per_item}], ["length", *LENGTHS])
    typer.echo("\nleft by each step of preparation")
    keys = (key for step in corpus["steps"] for key in step)
    print_table(corpus["steps"], list(dict.fromkeys(["step", *keys])))


def _period(times: dict[str, int | None]) -> str:
    """First and last day of a service's logs (UTC)."""
    if times["first"] is None or times["last"] is None:
        return "without times"
    first, last = (datetime.fromtimestamp(times[k] or 0, UTC).date() for k in ("first", "last"))
    return f"{first} to {last}" + (f", {times['untimed']:,} without" if times["untimed"] else "")


def _print_survey(corpus: dict[str, Any]) -> None:
    """What was read from the logs, as tables."""
    logs = corpus["logs"]
    services = {**logs["services"], "all": logs["all"]}
    typer.echo("\nlogs of pretraining users, and how they spread over the items that have any")
    print_table([{"service": s, **row} for s, row in services.items()], SPREAD)
    _print_histograms("logs of a user: share of users", corpus["items_per_user"])
    tokens = {s: row["tokens_per_item"] for s, row in services.items()}
    _print_histograms("tokens of a behaviour: share of behaviours", tokens)
    padding = logs["padding"]
    typer.echo(
        f"\nslots of padded batches of {cell(padding['batch_size'])} users, at most "
        f"{cell(padding['items_per_user'])} items a service, and the share that packing avoids"
    )
    print_table([{"service": s, **padding[s]} for s in services], PADDED)
    if logs["overlap"]:
        typer.echo("\ntexts of a service's items that are also another's, and its logs on them")
        print_table(logs["overlap"], OVERLAP)
    if logs["tasks"]:
        typer.echo("\ntasks")
        rows = [{"task": task, **row} for task, row in logs["tasks"].items()]
        print_table(rows, ["task", "service", "users", "pretrained_users", "targets"])


def _print_histograms(title: str, described: dict[str, dict[str, Any]]) -> None:
    """Histograms side by side: their bins begin at the same numbers."""
    rows: dict[int, dict[str, Any]] = {}
    for name, lengths in described.items():
        total = sum(count for *_, count in lengths["histogram"])
        for first, last, count in lengths["histogram"]:
            row = rows.setdefault(first, {"last": last})
            row["last"] = max(row["last"], last)
            row[name] = count / total
    typer.echo(f"\n{title}")
    shown = [
        {
            "length": str(first) if row["last"] == first else f"{first}-{row['last']}",
            **{name: row.get(name, 0.0) for name in described},
        }
        for first, row in sorted(rows.items())
    ]
    print_table(shown, ["length", *described])


def _size(n_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB"
