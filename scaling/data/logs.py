"""From the logs of a source to clean, numbered logs: the relational program, in Ibis.

Users and items become whole numbers first, so that every later step moves few bytes. Each step is a
key of the corpus file, none applies unless it is named there, and what it left is counted for the
manifest. Of what is not relational only distinct texts leave the engine.
"""

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
from ibis import _

from scaling.data.corpus import CorpusError
from scaling.data.engine import Engine
from scaling.data.recipe import CorpusFile
from scaling.data.sources import read_logs

MONTH = 365.25 / 12 * 86_400
"""[s]"""
SHARED_TEXT_ITEMS = 10
"""So many items may have one text whatever their share."""

FIRST = 3
"""Malformed rows that a message shows."""
MOST_SERVICES = 20
"""More values of a column are not shown."""


@dataclass
class CleanLogs:
    """Tables of the engine after cleaning, and the counts of every step."""

    engine: Engine
    logs: Any
    """uid int64, service int64 (index), item int64, time int64, position int64."""
    items: Any
    """item int64, service int64, text string: 0, 1, ... by service, then by identity."""
    users: Any
    """uid int64, key string, draw string, n0 int64, n1, ...: users with logs; their hashes, in hex;
    logs in each service of pretraining. Users are numbered in the order of their keys."""
    steps: list[dict[str, Any]]
    times: dict[str, dict[str, int | None]]
    """Per service its first and last time [Unix s], null without any, and its logs without one."""


def clean_logs(
    engine: Engine, file: CorpusFile, base: Path, where: str, malformed: Path
) -> CleanLogs:
    """Read, clean, filter and number the logs of a corpus file.

    Args:
        base: folder of the corpus file.
        where: the corpus file, for messages.
        malformed: file that gets the malformed rows, a line each: file, line and reason.

    Raises:
        CorpusError: too many malformed rows, a service without logs, ratings or times asked for and
            not there, untitled logs or one text on most items where they are refused, or two users
            with one hash.
    """
    raw = read_logs(engine, file.source, base)
    read, of_service = _read(engine, raw, file, where, malformed)
    sound = raw.filter(raw.problem.isnull(), raw.user.notnull())
    sound = sound.filter(sound.service.isin(file.all_services)).select(
        "user",
        "service",
        "text",
        "time",
        "position",
        "rating",
        # An item that has no identity of its own is known by its text.
        by_text=_.item.isnull(),
        identity=_.item.coalesce(_.text),
    )
    users = _numbered_users(engine, sound, file)
    items, names = _named_items(engine, sound, file, where)
    logs = (
        sound.join(users.select("user", "uid"), "user")
        .join(names, ["service", "by_text", "identity"])
        .select("uid", "item", "time", "rating", service="index", position=_.position.fill_null(0))
    )
    rules = file.logs
    if rules.min_rating is None:
        logs = logs.drop("rating")
    services = sum(of_service)
    chosen = {"step": "services", "logs": services, "users": engine.value(users.count())}
    steps = _Steps(engine, file, where, [read, chosen], of_service)
    logs = steps.keep("titled", logs, "no text")
    if not rules.drop_untitled and (lost := services - steps.done[-1]["logs"]):
        raise CorpusError(
            f"{where}: {lost:,} of {services:,} logs have no text; "
            "logs.drop_untitled = true drops them"
        )
    if rules.min_rating is not None:
        _refuse_unrated(engine, logs, file, where)
        rated = logs.filter(logs.rating >= rules.min_rating).drop("rating")
        logs = steps.keep("rated", rated, f"logs.min_rating = {rules.min_rating}")
    if rules.deduplicate == "latest":
        logs = steps.keep("deduplicated", _latest(logs), "logs.deduplicate")
    if rules.min_per_month is not None:
        busy = logs.group_by("uid").aggregate(n=logs.count())
        busy = busy.filter(busy.n >= _least_logs(engine, logs, rules.min_per_month, where))
        why = f"logs.min_per_month = {rules.min_per_month}"
        logs = steps.keep("active", logs.semi_join(busy, "uid"), why)
    if rules.k_core is not None:
        logs = _k_core(logs, rules.k_core, steps)
    logs, items = _renumbered(engine, logs, items)
    counts = {f"n{i}": (logs.service == i).sum() for i in range(len(file.services))}
    users = logs.group_by("uid").aggregate(**counts).join(users.drop("user"), "uid")
    users = engine.store("counted_users", users)
    return CleanLogs(engine, logs, items, users, steps.done, _times(engine, logs, file))


def _times(engine: Engine, logs: Any, file: CorpusFile) -> dict[str, dict[str, int | None]]:
    found = logs.group_by("service").aggregate(
        first=_.time.min(), last=_.time.max(), untimed=_.time.isnull().sum()
    )
    of = {row.pop("service"): row for row in engine.rows(found)}
    return {name: of[index] for index, name in enumerate(file.all_services)}


class _Steps:
    """What each step kept, and its counts. Only the last step's logs stay in the engine."""

    def __init__(
        self,
        engine: Engine,
        file: CorpusFile,
        where: str,
        done: list[dict[str, Any]],
        of_service: list[int],
    ):
        self.engine, self.file, self.where, self.done = engine, file, where, done
        self._names = (f"logs_{i}" for i in count())
        self._last = ""
        self._had = of_service

    def keep(self, step: str, table: Any, why: str, **said: Any) -> Any:
        """Store the logs of a step.

        Args:
            why: some service has none left, for the message.
            said: of the step, beside its counts.
        """
        name = next(self._names)
        made = self.engine.store(name, table)
        left = self.engine.rows(made.group_by("service").aggregate(n=made.count()))
        found = {row["service"]: row["n"] for row in left}
        has = [found.get(index, 0) for index in range(len(self.file.all_services))]
        for service, had, n in zip(self.file.all_services, self._had, has, strict=True):
            if not n:
                raise CorpusError(
                    f"{self.where}: service {service!r} has no logs left ({why}: {had:,} -> 0)"
                )
        users = self.engine.value(made.uid.nunique())
        self.done.append({"step": step, "logs": sum(has), "users": users, **said})
        if self._last:
            self.engine.drop(self._last)
        self._last, self._had = name, has
        return made


def _read(
    engine: Engine, raw: Any, file: CorpusFile, where: str, malformed: Path
) -> tuple[dict[str, Any], list[int]]:
    """The step of reading, and the logs of each service of the corpus."""
    malformed.unlink(missing_ok=True)
    bad = raw.problem.notnull() | raw.user.isnull() | raw.service.isnull()
    wanted = raw.service.isin(file.all_services)
    service = ibis.cases((bad, ibis.null("string")), (wanted, raw.service), else_="")
    found = engine.rows(raw.group_by(service=service).aggregate(n=raw.count()))
    there = {row["service"]: row["n"] for row in found}
    total, n_bad = sum(there.values()), there.get(None, 0)
    if not total:
        raise CorpusError(f"{where}: its source has no logs")
    if n_bad:
        reason = raw.problem.coalesce(ibis.literal("a log without user or service"))
        first = _list_malformed(engine, raw.filter(bad).select(problem=reason), malformed)
        if n_bad > file.logs.max_malformed * total:
            raise CorpusError(
                f"{where}: {n_bad:,} of {total:,} rows are malformed, more than "
                f"logs.max_malformed = {file.logs.max_malformed}:"
                + "".join(f"\n  {line}" for line in first)
                + f"\nall of them: {malformed}"
            )
    for name in file.all_services:
        if name not in there:
            raise CorpusError(
                f"{where}: no log of service {name!r} in the source; services there: "
                + _services_there(engine, raw.filter(~bad))
            )
    return (
        {"step": "read", "logs": total, "malformed": n_bad},
        [there[name] for name in file.all_services],
    )


def _list_malformed(engine: Engine, rows: Any, malformed: Path) -> list[str]:
    """Write the list of malformed rows; its first lines."""
    first: list[str] = []
    part = engine.folder / "malformed.txt"  # others may be writing theirs
    with open(part, "w", encoding="utf-8", errors="backslashreplace") as f:
        for (problems,) in engine.stream(rows, ("problem",), ("problem",)):
            f.writelines(f"{p}\n" for p in problems)
            first += problems[: FIRST - len(first)].tolist()
    part.replace(malformed)
    return first


def _services_there(engine: Engine, logs: Any) -> str:
    """Services that logs have. A column with many values holds something else, users maybe."""
    services = logs.select("service").distinct()
    if (n := engine.value(services.count())) > MOST_SERVICES:
        return f"{n:,}, too many for services; is it the right column?"
    return ", ".join(sorted(row["service"] for row in engine.rows(services))) or "none"


def _numbered_users(engine: Engine, logs: Any, file: CorpusFile) -> Any:
    """user, key, draw, uid: users in the order of one hash, and another that splits them.

    Two hashes, so that every prefix of a split is a fair sample of it.
    """

    distinct = logs.select("user").distinct()

    def hashed(purpose: str) -> Any:
        salted = ibis.literal(f"{file.users.salt}/{purpose}/").concat(distinct.user)
        return salted.hexdigest("sha256").left(16)

    users = distinct.mutate(key=hashed("order"), draw=hashed("split"))
    made = engine.store("users", users.mutate(uid=ibis.row_number().over(order_by=_.key)))
    if engine.value(made.key.nunique()) != engine.value(made.count()):
        raise CorpusError("two users have the same 64-bit hash; choose another users.salt")
    return made


def _named_items(engine: Engine, logs: Any, file: CorpusFile, where: str) -> tuple[Any, Any]:
    """Items with their commonest text, and which item the logs of an identity are of.

    A log without text has that of its item, where other logs have one.

    Returns:
        Tables (item, index, text), numbered by service and identity, and
        (service, by_text, identity, item, index).
    """
    of = ["service", "by_text", "identity"]
    variants = engine.store("variants", logs.group_by([*of, "text"]).aggregate(n=_.count()))
    texts = _cleaned_texts(engine, variants, file.logs.clean_text)
    index = _.service.cases(*((name, i) for i, name in enumerate(file.all_services)))
    named = variants.join(texts, variants.text == texts.raw_text).select(
        *of,
        "n",
        text="clean_text",
        index=index.cast("int64"),
        known=ibis.ifelse(_.by_text, _.clean_text, _.identity),
    )
    key = ["index", "by_text", "known"]
    seen = named.group_by([*key, "text"]).aggregate(n=_.n.sum())
    rank = ibis.row_number().over(group_by=key, order_by=[_.n.desc(), _.text])
    first = seen.mutate(rank=rank).filter(_.rank == 0)
    number = ibis.row_number().over(order_by=["index", "known", "by_text"])
    items = engine.store("all_items", first.select(*key, "text", item=number))
    _refuse_shared_text(engine, items, file, where)
    ways = named.select(*of, *key[:1], "known").distinct()
    names = ways.join(items.drop("text"), key).select(*of, "item", "index")
    return items.drop("by_text", "known"), engine.store("names", names)


def _refuse_shared_text(engine: Engine, items: Any, file: CorpusFile, where: str) -> None:
    shared = items.group_by(["index", "text"]).aggregate(n=_.count())
    most = shared.group_by("index").aggregate(most=_.n.max(), n=_.n.sum())
    for row in engine.rows(most):
        if row["most"] > max(SHARED_TEXT_ITEMS, file.logs.max_same_text * row["n"]):
            raise CorpusError(
                f"{where}: {row['most']:,} of the {row['n']:,} items of service "
                f"{file.all_services[row['index']]!r} have one and the same text, more than "
                f"logs.max_same_text = {file.logs.max_same_text}: is the right column its text?"
            )


def _cleaned_texts(engine: Engine, variants: Any, clean: bool) -> Any:
    """raw_text, clean_text: each distinct text that is not blank."""
    schema = pa.schema([("raw_text", pa.string()), ("clean_text", pa.string())])
    raw = variants.select("text").filter(_.text.notnull()).distinct()

    def batches() -> Iterator[pa.RecordBatch]:
        for (texts,) in engine.stream(raw, ("text",), ("text",)):
            pairs = [(t, clean_text(t) if clean else t) for t in texts]
            kept = list(zip(*(p for p in pairs if p[1].strip()), strict=True)) or [(), ()]
            yield pa.record_batch([pa.array(c, pa.string()) for c in kept], schema=schema)

    return engine.load("texts", batches(), schema)


def clean_text(text: str) -> str:
    """Text without HTML entities (resolved twice: some are escaped twice), white space joined.

    >>> clean_text(" Bob&#39;s &amp;quot;Red&amp;quot;\\n Mill ")
    'Bob\\'s "Red" Mill'
    """
    return " ".join(html.unescape(html.unescape(text)).split())


def _refuse_unrated(engine: Engine, logs: Any, file: CorpusFile, where: str) -> None:
    found = engine.rows(logs.group_by("service").aggregate(rated=_.rating.notnull().sum()))
    for row in found:
        if not row["rated"]:
            raise CorpusError(
                f"{where}: logs.min_rating = {file.logs.min_rating}, but no log of service "
                f"{file.all_services[row['service']]!r} has a rating; it needs ratings in every "
                "service"
            )


def _latest(logs: Any) -> Any:
    """Of the logs of one user and item the latest."""
    order = [ibis.desc("time", nulls_first=False), ibis.desc("position")]
    rank = ibis.row_number().over(group_by=["uid", "item"], order_by=order)
    return logs.mutate(rank=rank).filter(_.rank == 0).drop("rank")


def _least_logs(engine: Engine, logs: Any, per_month: float, where: str) -> int:
    """Logs of a user that make a mean rate over the whole time that the logs cover."""
    (found,) = engine.rows(
        logs.aggregate(first=_.time.min(), last=_.time.max(), untimed=_.time.isnull().sum())
    )
    if found["untimed"]:
        raise CorpusError(
            f"{where}: logs.min_per_month = {per_month}, but {found['untimed']:,} logs have no time"
        )
    span: int = found["last"] - found["first"]
    return math.ceil(per_month * span / MONTH)


def _k_core(logs: Any, k: int, steps: _Steps) -> Any:
    """Drop users and items with fewer than k logs until there are none; what stays is unique."""
    for rounds in count(1):
        before = steps.done[-1]["logs"]
        for what in ("uid", "item"):
            enough = logs.group_by(what).aggregate(n=_.count()).filter(_.n >= k)
            logs = logs.semi_join(enough, what)
        logs = steps.keep("k_core", logs, f"logs.k_core = {k}", rounds=rounds)
        if rounds > 1:
            del steps.done[-2]
        if steps.done[-1]["logs"] == before:
            return logs


def _renumbered(engine: Engine, logs: Any, items: Any) -> tuple[Any, Any]:
    """Logs and items, with the items that have logs numbered 0, 1, ... in the same order."""
    kept = items.semi_join(logs, "item")
    if engine.value(kept.count()) < engine.value(items.count()):
        numbered = kept.mutate(number=ibis.row_number().over(order_by=_.item))
        numbered = engine.store("kept_items", numbered)
        logs = logs.join(numbered.select("item", "number"), "item").drop("item")
        logs = engine.store("numbered_logs", logs.rename(item="number"))
        items = numbered.drop("item").rename(item="number")
    return logs, items.rename(service="index")
