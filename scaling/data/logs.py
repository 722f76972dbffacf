"""From the logs of a source to clean, numbered logs: Ibis on DuckDB, larger than memory.

Every step is a key of the corpus file, and what it left is counted for the manifest.
"""

import html
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from scaling.data.corpus import CorpusError
from scaling.data.recipe import CorpusFile
from scaling.data.scratch import Scratch
from scaling.data.sources import read_logs


@dataclass
class CleanLogs:
    """Tables in the scratch database after cleaning, and the counts of every step."""

    db: Scratch
    logs: Any
    """key uint64, service int64 (index), item int64, time int64, position int64."""
    items: Any
    """item int64, service int64, text string: numbered by service, then by identity."""
    users: Any
    """key uint64, draw uint64, n0, n1, ...: logs in each service of pretraining."""
    steps: list[dict[str, Any]] = field(default_factory=list)


def clean_logs(db: Scratch, file: CorpusFile, base: Path, where: str) -> CleanLogs:
    """Read, clean, filter and number the logs of a corpus file.

    Args:
        db: the scratch database.
        base: folder of the corpus file.
        where: the corpus file, for messages.

    Raises:
        CorpusError: too many malformed rows, a service without logs, ratings asked for and not
            there, untitled logs where they are refused, or two users with one hash.
    """
    steps: list[dict[str, Any]] = []
    rules = file.logs

    def step(name: str, expression: Any) -> Any:
        made = db.create(name, expression)
        left = db.value(made.aggregate(logs=made.count(), users=made.user.nunique())).iloc[0]
        steps.append({"step": name, "logs": int(left.logs), "users": int(left.users)})
        return made

    raw = db.create("raw", read_logs(db.con, file.source, base))
    malformed = raw.problem.notnull() | raw.user.isnull() | raw.service.isnull()
    total = int(db.value(raw.count()))
    bad = int(db.value(raw.filter(malformed).count()))
    steps.append({"step": "read", "logs": total, "malformed": bad})
    if not total:
        raise CorpusError(f"{where}: its source has no logs")
    if bad > rules.max_malformed * total:
        raise _malformed(db, raw.filter(malformed), bad, total, rules.max_malformed, where)

    _refuse_absent(db, raw.filter(~malformed), file, where)
    names = ibis.literal(list(file.all_services))
    logs = step(
        "services",
        raw.filter(~malformed, raw.service.isin(file.all_services)).mutate(
            service=names.index(raw.service),
            position=raw.position.fill_null(0),
        ),
    )
    db.drop("raw")

    texts = _cleaned_texts(db, logs, rules.clean_text)
    logs = logs.left_join(texts, logs.text == texts.raw_text).select(
        logs.user,
        logs.service,
        item=logs.item.coalesce(texts.clean_text),
        text=texts.clean_text,
        time=logs.time,
        position=logs.position,
        rating=logs.rating,
    )
    titled = step("titled", logs.filter(logs.text.notnull()))
    if not rules.drop_untitled and (lost := steps[-2]["logs"] - steps[-1]["logs"]):
        raise CorpusError(f"{where}: logs.drop_untitled = false, but {lost} logs have no text")
    _refuse_empty(db, logs, titled, "no text", file, where)
    logs = titled
    if rules.min_rating is not None:
        _refuse_unrated(db, logs, file, where)
        rated = step("rated", logs.filter(logs.rating >= rules.min_rating))
        _refuse_empty(db, logs, rated, f"logs.min_rating = {rules.min_rating}", file, where)
        logs = rated
    if rules.deduplicate == "latest":
        latest = ibis.struct({"time": logs.time, "position": logs.position, "text": logs.text})
        best = logs.group_by("user", "service", "item").aggregate(best=latest.max())
        logs = step("deduplicated", best.unpack("best"))

    users = _hashed_users(db, logs, file)
    items = _numbered_items(db, logs)
    numbered = db.create(
        "numbered",
        logs.join(users, logs.user == users.user)
        .join(items, (logs.service == items.service) & (logs.item == items.identity))
        .select(users.key, logs.service, items.item, logs.time, logs.position),
    )
    return CleanLogs(db, numbered, items.drop("identity"), users.drop("user"), steps)


def _malformed(
    db: Scratch, rows: Any, bad: int, total: int, share: float, where: str
) -> CorpusError:
    shown = db.value(
        rows.select(problem=rows.problem.coalesce(ibis.literal("a log without user or service")))
        .distinct()
        .order_by("problem")
        .limit(3)
    ).problem
    listed = "".join(f"\n  {p}" for p in shown)
    return CorpusError(
        f"{where}: {bad} of {total} rows are malformed, "
        f"more than logs.max_malformed = {share}:{listed}"
    )


def _refuse_absent(db: Scratch, logs: Any, file: CorpusFile, where: str) -> None:
    there = sorted(db.value(logs.select("service").distinct()).service)
    for name in file.all_services:
        if name not in there:
            listed = ", ".join(there[:10]) + (", ..." if len(there) > 10 else "")
            raise CorpusError(
                f"{where}: no log of service {name!r} in the source; "
                f"services there: {listed or 'none'}"
            )


def _refuse_empty(
    db: Scratch, before: Any, after: Any, why: str, file: CorpusFile, where: str
) -> None:
    there = set(db.value(after.select("service").distinct()).service)
    for index, name in enumerate(file.all_services):
        if index not in there:
            had = int(db.value((before.service == index).sum()))
            raise CorpusError(f"{where}: service {name!r} has no logs left ({why}: {had} -> 0)")


def _refuse_unrated(db: Scratch, logs: Any, file: CorpusFile, where: str) -> None:
    rated = set(db.value(logs.filter(logs.rating.notnull()).select("service").distinct()).service)
    for index, name in enumerate(file.all_services):
        if index not in rated:
            raise CorpusError(
                f"{where}: logs.min_rating = {file.logs.min_rating}, "
                f"but no log of service {name!r} has a rating; it needs ratings in every service"
            )


def _cleaned_texts(db: Scratch, logs: Any, clean: bool) -> Any:
    """Each distinct text beside its clean form; blank ones are left out."""
    raw = logs.select(raw_text=logs.text).filter(logs.text.notnull()).distinct()
    fix = clean_text if clean else str.strip
    schema = pa.schema([("raw_text", pa.string()), ("clean_text", pa.string())])

    path = db.folder / "texts.parquet"
    with pq.ParquetWriter(path, schema) as writer:
        for (texts,) in db.stream(raw, ("raw_text",), ("raw_text",)):
            cleaned = [fix(t) or None for t in texts]
            writer.write_batch(pa.record_batch([pa.array(texts), pa.array(cleaned)], schema=schema))
    made = db.con.read_parquet(path)
    return made.filter(made.clean_text.notnull())


def clean_text(text: str) -> str:
    """Text without HTML entities, runs of white space joined.

    >>> clean_text(" Bob&#39;s &amp;quot;Red&amp;quot;\\n Mill ")
    'Bob\\'s "Red" Mill'
    """
    return " ".join(html.unescape(html.unescape(text)).split())


def _hashed_users(db: Scratch, logs: Any, file: CorpusFile) -> Any:
    """Users with the hash that orders them, the one that splits them, and their counts of logs.

    Two hashes, so that every prefix of a split is a fair sample of it.
    """
    counts = {f"n{i}": (logs.service == i).sum() for i in range(len(file.services))}
    users = logs.group_by("user").aggregate(**counts)

    def hashed(purpose: str) -> Any:
        salted = ibis.literal(f"{file.users.salt}/{purpose}/").concat(users.user)
        return ibis.literal("0x").concat(salted.hexdigest("sha256").left(16)).cast("uint64")

    made = db.create("users", users.mutate(key=hashed("order"), draw=hashed("split")))
    if db.value(made.key.nunique() != made.count()):
        raise CorpusError("two users have the same 64-bit hash; choose another users.salt")
    return made


def _numbered_items(db: Scratch, logs: Any) -> Any:
    """Items in order of service and identity, each with its commonest text."""
    seen = logs.group_by("service", "item", "text").aggregate(n=logs.count())
    ranked = seen.mutate(
        rank=ibis.row_number().over(
            group_by=[seen.service, seen.item], order_by=[seen.n.desc(), seen.text]
        )
    )
    first = ranked.filter(ranked["rank"] == 0)
    return db.create(
        "items",
        first.select(
            "service",
            "text",
            identity=first.item,
            item=ibis.row_number().over(order_by=[first.service, first.item]),
        ),
    )


Progress = Callable[[str, int, int], None]
"""Told the stage that begins, how many are done, and how many there are."""
