"""Durable writes: a record is absent or whole, and one caller of many creates it."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scaling import files
from scaling.files import (
    TMP_PREFIX,
    RecordError,
    create_bytes,
    create_json,
    publish,
    read_json,
    remove_folder,
    sha256,
    staging,
    write_bytes,
    write_json,
)

OLD, NEW = {"value": "old" * 1000}, {"value": "new" * 1000}


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.name.startswith(files.TMP_PREFIX)]


def python(code: str, *args: object) -> subprocess.Popen[bytes]:
    source = textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", source, *map(str, args)], stdout=subprocess.PIPE)


# ---- one of many --------------------------------------------------------------------------------


def test_of_many_threads_one_creates_the_record(tmp_path: Path) -> None:
    path = tmp_path / "claim.json"
    with ThreadPoolExecutor(16) as pool:
        for round_ in range(20):
            won = list(
                pool.map(lambda i: create_json(path, {"by": i, "pad": "x" * 5000}), range(16))
            )
            assert won.count(True) == 1
            assert read_json(path)["by"] == won.index(True), round_
            path.unlink()
    assert leftovers(tmp_path) == []


def test_of_many_processes_one_creates_the_record(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from scaling.files import create_json
        folder, me = Path(sys.argv[1]), int(sys.argv[2])
        (folder / f"ready-{me}").touch()
        while not (folder / "go").exists():
            pass
        print(sum(create_json(folder / f"{i}.json", {"by": me}) for i in range(50)))
    """
    running = [python(code, tmp_path, i) for i in range(4)]
    while len(list(tmp_path.glob("ready-*"))) < 4:
        assert all(p.poll() is None for p in running)
    (tmp_path / "go").touch()
    won = [int(p.communicate()[0]) for p in running]
    records = [read_json(tmp_path / f"{i}.json")["by"] for i in range(50)]
    assert [records.count(i) for i in range(4)] == won
    assert leftovers(tmp_path) == []


def test_creating_again_leaves_the_first_untouched(tmp_path: Path) -> None:
    assert create_json(tmp_path / "a.json", OLD)
    assert not create_json(tmp_path / "a.json", NEW)
    assert not create_bytes(tmp_path / "a.json", b"")
    assert read_json(tmp_path / "a.json") == OLD
    assert leftovers(tmp_path) == []


# ---- crashes ------------------------------------------------------------------------------------

CRASH = """
    import os, sys
    from pathlib import Path
    from scaling import files
    path, operation, deadly = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    calls = 0
    def deadly_call(real):
        def call(*args, **kwargs):
            global calls
            calls += 1
            if calls == deadly:
                os._exit(9)
            return real(*args, **kwargs)
        return call
    for name in ("open", "fsync", "rename", "link", "unlink"):
        setattr(os, name, deadly_call(getattr(os, name)))
    getattr(files, operation)(path, {"value": "new" * 1000})
"""


@pytest.mark.parametrize("operation", ["write_json", "create_json"])
@pytest.mark.parametrize("deadly", [1, 2, 3, 4, 5])
def test_killed_at_any_call_leaves_a_whole_record_or_none(
    tmp_path: Path, operation: str, deadly: int
) -> None:
    path = tmp_path / "a.json"
    if operation == "write_json":
        write_json(path, OLD)
    with python(CRASH, path, operation, deadly) as writer:
        assert writer.wait() == 9
    before = OLD if operation == "write_json" else None
    after = read_json(path) if path.exists() else None
    assert after in (before, NEW)
    write_json(path, NEW)  # nothing left behind is in the way
    assert read_json(path) == NEW


def test_killed_while_writing_over_and_over_is_never_torn(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    code = """
        import sys
        from pathlib import Path
        from scaling.files import write_json
        n = 0
        while True:
            write_json(Path(sys.argv[1]), {"n": n, "pad": [n] * 20_000})
            n += 1
    """
    for _ in range(5):
        with python(code, path) as writer:
            while not path.exists():
                pass
            for _ in range(40):
                record = read_json(path)
                assert set(record["pad"]) == {record["n"]}
            writer.send_signal(signal.SIGKILL)
        record = read_json(path)
        assert set(record["pad"]) == {record["n"]}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failing_write_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "a.json"
    write_json(path, OLD)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, NEW)
    assert read_json(path) == OLD
    assert leftovers(tmp_path) == []


def test_a_file_that_may_not_grow_leaves_the_old_record(tmp_path: Path) -> None:
    """A real refusal in the middle of a real write, as a full disk or a quota gives it."""
    write_json(tmp_path / "a.json", OLD)
    code = """
        import resource, signal, sys
        from pathlib import Path
        from scaling.files import write_json
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            write_json(Path(sys.argv[1]), {"value": "new" * 100_000})
        except OSError as e:
            print(e.errno)
    """
    out, _ = python(code, tmp_path / "a.json").communicate()
    assert int(out) == errno.EFBIG
    assert read_json(tmp_path / "a.json") == OLD
    assert leftovers(tmp_path) == []


def test_nan_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", OLD)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert read_json(tmp_path / "a.json") == OLD
    assert leftovers(tmp_path) == []


def test_everything_is_flushed_before_it_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "rename", "link"):
        real = getattr(os, name)

        def traced(*args: Any, _real: Any = real, _name: str = name) -> Any:
            calls.append(_name)
            return _real(*args)

        monkeypatch.setattr(os, name, traced)
    write_bytes(tmp_path / "a", b"x")
    assert calls == ["fsync", "rename", "fsync"]
    calls.clear()
    create_bytes(tmp_path / "b", b"x")
    assert calls == ["fsync", "link", "fsync"]
    calls.clear()
    with staging(tmp_path / "c") as tmp:
        (tmp / "one").write_bytes(b"1")
    assert calls[-2:] == ["rename", "fsync"]
    assert calls.count("fsync") == 3  # the file, the folder, the parent


# ---- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\x00" * 20, b"\xff\xfe", b"{'a': 1}"])
def test_torn_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "claim.json"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"claim\.json: not a whole JSON record"):
        read_json(path)


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"claim\.json: no such file"):
        read_json(tmp_path / "claim.json")


def test_json_has_sorted_keys_and_ends_in_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": None})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": None, "b": 1}
    assert text.endswith("}\n")
    assert text.index('"a"') < text.index('"b"')


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


# ---- folders ------------------------------------------------------------------------------------


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    final = tmp_path / "corpora" / "x"
    with staging(final) as tmp:
        (tmp / "sub").mkdir()
        (tmp / "sub" / "a").write_bytes(b"1")
        assert not final.exists()
    assert (final / "sub" / "a").read_bytes() == b"1"
    assert leftovers(tmp_path) == []


def test_a_folder_that_fails_does_not_appear(tmp_path: Path) -> None:
    final = tmp_path / "x"

    def fill() -> None:
        with staging(final) as tmp:
            (tmp / "a").write_bytes(b"1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_published_meanwhile_stays(tmp_path: Path) -> None:
    final = tmp_path / "x"
    with staging(final) as tmp:
        (tmp / "a").write_bytes(b"ours")
        final.mkdir()
        (final / "a").write_bytes(b"theirs")
    assert (final / "a").read_bytes() == b"theirs"
    assert leftovers(tmp_path) == []


def test_publishing_over_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    (tmp_path / "tmp").mkdir()
    with pytest.raises(OSError):
        publish(tmp_path / "tmp", tmp_path / "x")


def test_a_folder_whose_removal_is_cut_short_is_not_there_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scaling.files.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(folder)
    assert [p.name.startswith(TMP_PREFIX) for p in tmp_path.iterdir()] == [True]
    monkeypatch.undo()
    folder.mkdir()
    remove_folder(folder)
    assert not folder.exists()
