"""Logs in tables of real databases: a DuckDB file, a PostgreSQL server, Spark's catalog."""

import datetime as dt
import importlib.util
import os
import shutil
import subprocess
from decimal import Decimal
from pathlib import Path

import duckdb
import ibis
import pytest

from scaling.config import ConfigError
from scaling.data.corpus import CorpusError, read_manifest
from scaling.data.engine import DuckDB
from scaling.data.prepare import prepare
from scaling.data.sources import source_config, source_files
from tests.conftest import missing
from tests.data.test_sources import read

COLUMNS = {"user": "u", "text": "t", "time": "w", "rating": "r", "position": "p"}
SECRET = "hunter2-of-nobody"


def table(name, connection=None, **keys):
    url = {} if connection is None else {"connection": connection}
    tables = [{"table": name, "columns": COLUMNS, "service": "shop", **url, **keys}]
    return source_config({"kind": "tables", "tables": tables}, "corpus.toml")


def sound(frame):
    """user, text, time, rating and position of sound rows, by user."""
    rows = frame[frame.problem.isnull()].sort_values("user")
    return [tuple(row) for row in rows[["user", "text", "time", "rating", "position"]].to_numpy()]


@pytest.fixture
def duckdb_file(tmp_path):
    with duckdb.connect(tmp_path / "logs of #1.duckdb") as con:
        con.sql("create schema web")
        con.sql(
            "create table web.logs (u uuid, t text, w timestamp_ns, r decimal(3, 1), p hugeint, "
            "other integer[])"
        )
        con.sql(
            "insert into web.logs select '00000000-0000-0000-0000-' || lpad(i::text, 12, '0'), "
            "'tea ' || i, '2017-07-14 02:39:59.999999999'::timestamp_ns, 4.5, i, [i] "
            "from range(200000) t(i)"
        )
        con.sql("alter table web.logs alter p type bigint")
        con.sql("update web.logs set u = null where p = 7")
    return tmp_path / "logs of #1.duckdb"


def test_a_duckdb_file(duckdb_file, tmp_path, engine, monkeypatch):
    monkeypatch.setenv("LOGS", str(tmp_path))
    for connection in (
        f"duckdb://{duckdb_file}",
        "duckdb://logs of #1.duckdb",
        "duckdb://$LOGS/" + duckdb_file.name,
    ):
        assert source_files(table("web.logs", connection), tmp_path) == [duckdb_file]
    frame = read(table("web.logs", f"duckdb://{duckdb_file}"), tmp_path, engine)
    rows = sound(frame)
    assert len(rows) == 199_999
    assert rows[6] == ("00000000-0000-0000-0000-000000000006", "tea 6", 1_499_999_999, 4.5, 6)
    assert frame.problem.dropna().tolist() == [
        f"duckdb://{duckdb_file}: web.logs: no user ('u' is empty)"
    ]


def test_wrong_tables_are_refused(duckdb_file, tmp_path):
    url = f"duckdb://{duckdb_file}"
    for source, message in (
        (table("web.lost", url), "web.lost: no such table"),
        (table("lost.logs", url), "lost.logs: no such table"),
        (table("web.logs", "duckdb:///nowhere/x.duckdb"), "/nowhere/x.duckdb: no such file"),
        (
            table("web.logs", url, columns={**COLUMNS, "item": "i"}),
            r"no column 'i'; its columns: other, p, r",
        ),
        (table("web.logs", url, columns={**COLUMNS, "item": "other"}), "'other' is of type list"),
        (table("web.logs"), "web.logs: no connection; only engine spark has a catalog"),
        (
            table("web.logs", "nosuch://host/db"),
            "nosuch://host/db: web.logs: no connection: ValueError",
        ),
        (table("web.logs", "mysql://me@host/db"), r"pip install 'ibis-framework\[mysql\]'"),
    ):
        with pytest.raises(CorpusError, match=message):
            read(source, tmp_path)
    with pytest.raises(ConfigError, match="either files or the name of a table"):
        table("web.logs", url, files=["l.csv"])
    with pytest.raises(ConfigError, match="connection goes with table"):
        source_config(
            {"kind": "tables", "tables": [{"files": ["x"], "connection": url, "columns": COLUMNS}]},
            "corpus.toml",
        )


def test_a_table_without_order_is_refused(duckdb_file):
    columns = {"user": "u", "text": "t"}
    with pytest.raises(ConfigError, match=r"web\.logs: .*map time or position"):
        table("web.logs", f"duckdb://{duckdb_file}", columns=columns)
    for order in ({"time": "w"}, {"position": "p"}):
        assert table("web.logs", columns={**columns, **order})


@pytest.mark.parametrize(
    "url",
    [
        f"postgres://me:{SECRET}@host/db",
        f"postgres://host/db?password={SECRET}",
        f"postgres://host/db?sslkey={SECRET}",
        f"mysql://:{SECRET}@host",
        f"{SECRET}@host",
        f"postgres://me:{SECRET}@[host/db",
        [f"postgres://me:{SECRET}@host/db"],
    ],
)
def test_a_password_is_neither_taken_nor_shown(url):
    with pytest.raises(ConfigError, match=r"connection (holds a password|is no URL)") as e:
        table("logs", url)
    assert SECRET not in str(e.value)


def test_a_driver_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    monkeypatch.delitem(__import__("sys").modules, "ibis.backends.postgres", raising=False)
    monkeypatch.delitem(ibis.__dict__, "postgres", raising=False)
    with pytest.raises(CorpusError, match=r"pip install 'clue-scaling\[postgres\]'"):
        read(table("logs", "postgres://me@host/db"), tmp_path)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """Environment of a client of a PostgreSQL server in a folder, which asks for a password."""
    if importlib.util.find_spec("psycopg") is None:
        missing("psycopg is not installed")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [
        Path(shutil.which("initdb") or "/").parent
    ]
    if not (bin_ := found[-1] / "initdb").exists():
        missing("PostgreSQL (initdb) is not installed")
    folder = Path("/tmp") / tmp_path_factory.mktemp("pg").name  # a socket's path must be short
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "password").write_text(SECRET)
    run = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    if run:
        shutil.chown(folder, "postgres")
        shutil.chown(folder / "password", "postgres")
    data = ["-D", str(folder / "data")]

    def call(name, *args):
        subprocess.run([*run, str(bin_.with_name(name)), *data, *args], check=True, cwd=folder,
                       stdout=subprocess.DEVNULL)  # fmt: skip

    call(
        "initdb",
        "-U",
        "owner",
        "-A",
        "scram-sha-256",
        "--pwfile",
        str(folder / "password"),
        "-E",
        "UTF8",
        "--no-sync",
    )
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"
    call("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield {"PGHOST": str(folder), "PGPASSWORD": SECRET}
    finally:
        call("pg_ctl", "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture
def server(postgres, monkeypatch):
    import psycopg

    for name, value in postgres.items():
        monkeypatch.setenv(name, value)
    with psycopg.connect(user="owner", dbname="postgres", autocommit=True) as con:
        con.execute("drop schema if exists web cascade")
        con.execute("create schema web")
        con.execute(
            "create table web.logs (u numeric(20, 0), t text, w timestamptz, r numeric, p bigint)"
        )
        con.execute(
            "insert into web.logs select i % 50, 'tea ' || i % 90, "
            "timestamptz '2017-07-14 04:40:00.75+02' + i * interval '1 second', 4.25, i "
            "from generate_series(0, 149999) i"
        )
        con.execute("insert into web.logs values (null, 'words', now(), 'NaN', null)")
        yield con


@pytest.mark.slow
def test_a_postgresql_server(server, tmp_path, engine):
    source = table("web.logs", "postgres://owner@/postgres")
    assert source_files(source, tmp_path) is None
    frame = read(source, tmp_path, engine)
    rows = frame[frame.problem.isnull()].sort_values("position")
    assert rows.position.tolist() == list(range(150_000))
    assert rows.time.tolist() == [1_500_000_000 + i for i in range(150_000)]
    assert rows.user.tolist() == [str(i % 50) for i in range(150_000)]
    assert set(rows.rating) == {4.25}
    assert frame.problem.dropna().tolist() == [
        "postgres:///postgres: web.logs: no user ('u' is empty)"
    ]


@pytest.mark.slow
def test_what_a_server_says_does_not_tell_who_connects(server, tmp_path, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "wrong-" + SECRET)
    with pytest.raises(CorpusError, match="no connection: OperationalError") as e:
        read(table("web.logs", "postgres://owner@/postgres"), tmp_path)
    assert SECRET not in str(e.value)
    assert "owner" not in str(e.value)


@pytest.mark.slow
def test_a_corpus_of_a_server_is_prepared_anew_and_names_nobody(server, tmp_path):
    (tmp_path / "shop.toml").write_text(
        """
name = "shop"
services = ["shop"]
[source]
kind = "tables"
[[source.tables]]
table = "web.logs"
connection = "postgres://owner@/postgres"
service = "shop"
columns = { user = "u", text = "t", time = "w", position = "p" }
[logs]
max_malformed = 0.1
[users]
validation = 8
pool = 16
[tokenizer]
vocab_size = 300
"""
    )
    path = prepare(tmp_path / "shop.toml", tmp_path)
    text = (path / "manifest.json").read_text()
    assert SECRET not in text
    assert "owner" not in text
    assert "postgres:///postgres" in text
    [source] = read_manifest(path)["sources"]
    assert list(source) == ["read_ns"]
    assert prepare(tmp_path / "shop.toml", tmp_path) == path  # the same logs, the same corpus
    assert read_manifest(path)["sources"] != [source]
    server.execute("delete from web.logs where u = 3")
    assert prepare(tmp_path / "shop.toml", tmp_path) != path


@pytest.mark.slow
def test_a_table_of_sparks_catalog(spark, engine, tmp_path):
    rows = [
        (Decimal(5), "tea", dt.datetime(2017, 7, 14, 2, 40, 0, 900_000), 4.5, 1),
        (Decimal(10**19), "", dt.datetime(2017, 7, 14), float("nan"), None),
        (None, "x", dt.datetime(2017, 7, 14), 1.0, 3),
    ]
    frame = spark.createDataFrame(rows, "u decimal(20, 0), t string, w timestamp, r float, p long")
    spark.sql("create database if not exists web")
    frame.write.saveAsTable("web.logs", mode="overwrite")
    if isinstance(engine, DuckDB):
        with pytest.raises(CorpusError, match="only engine spark has a catalog"):
            read(table("web.logs"), tmp_path, engine)
        return
    for name in ("web.logs", "spark_catalog.web.logs"):
        assert source_files(table(name), tmp_path) is None
        found = read(table(name), tmp_path, engine)
        assert sound(found) == [
            (str(10**19), None, 1_499_990_400, None, None),
            ("5", "tea", 1_500_000_000, 4.5, 1),
        ]
        assert found.problem.dropna().tolist() == [f"{name}: no user ('u' is empty)"]
    with pytest.raises(CorpusError, match=r"web\.lost: no such table"):
        read(table("web.lost"), tmp_path, engine)
