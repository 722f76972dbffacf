"""The folder of one run: paths, records, and the fence that keeps one writer alive.

    <root>/runs/<k2>/<run_key>/
        spec.json                          the RunConfig, immutable
        attempts/NNNN/intent.json          somebody means to submit (created exclusively)
                      submit.json          what the scheduler answered: a hint only
                      claim.json           the job that started first owns the attempt
                      cancel.json          a person ended it
                      end.json             how it ended, in its own words
        metrics/<generation>.jsonl         one writer per file; first line says where it resumed
        ckpt/step-000012000/               committed checkpoints
        export/step-000012000/             encoders for everything downstream
        result.json                        the run is over: done or diverged
        transfer/wanted/<key>.json         a downstream evaluation that a sweep declares
                 <key>.json, .parquet      what it left
        reductions/step-000012000-f100/    a layer that an evaluation reduced the features by
        mirrors/                           copies of the metrics in other programs' formats

A *generation* is a start of the run that may write. It exists once its metrics file does, and a
writer may commit only while no newer one exists. Every record is created or replaced whole
(``scaling.files``); torn or foreign files are reported, never trusted.
"""

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from scaling.config import Evaluation, RunConfig
from scaling.files import RecordError, create_bytes, create_json, read_json, write_json

RUN_KEY = re.compile(r"[a-z2-7]{16}")
TAIL_BYTES = 1 << 16
"""The last row of metrics lies within so much of a file's end. [bytes]"""
RECORDS = ("intent", "submit", "claim", "cancel", "end")
NEEDED = {
    "intent": (),
    "submit": ("job_id",),
    "claim": ("job_id",),
    "cancel": ("by",),
    "end": ("class",),
}
"""Keys without which a record is somebody else's."""


class Superseded(RecordError):
    """A newer generation of the run has started; this process must not write any more."""


@dataclass(frozen=True)
class Attempt:
    """One try at a run: the records written so far, None where there is none."""

    number: int
    intent: dict[str, Any]
    submit: dict[str, Any] | None
    claim: dict[str, Any] | None
    cancel: dict[str, Any] | None
    end: dict[str, Any] | None


class RunDir:
    """Paths and records of one run below the root folder of all state."""

    def __init__(self, root: Path, run_key: str) -> None:
        if not RUN_KEY.fullmatch(run_key):
            raise RecordError(f"{run_key!r} is not a run key (16 letters of a-z and 2-7)")
        self.root = Path(root)
        self.run_key = run_key
        self.path = self.root / "runs" / run_key[:2] / run_key
        self._opened: dict[int, str] = {}
        """Files of the generations that this process has opened, by their numbers on disk."""

    @classmethod
    def create(cls, root: Path, config: RunConfig, corpus: str) -> Self:
        """The run's folder with its ``spec.json``; creating it again is a no-op.

        Args:
            corpus: name of the corpus, for people; its digest is part of ``config``.
        """
        run = cls(root, config.run_key)
        create_json(
            run.path / "spec.json",
            {
                "schema_version": 1,
                "run_key": run.run_key,
                "corpus": corpus,
                "config": config.model_dump(mode="json"),
            },
        )
        return run

    @classmethod
    def find(cls, root: Path, prefix: str) -> Self:
        """The one run whose key starts with ``prefix``.

        Raises:
            RecordError: no run or several have such a key; the message names them.
        """
        folders = Path(root).glob(f"runs/{prefix[:2]}*/*")
        there = (p.name for p in folders if RUN_KEY.fullmatch(p.name))
        return cls(root, one_key(there, prefix, str(Path(root) / "runs")))

    # spec and result

    def spec(self) -> RunConfig:
        """The run's configuration; raises as ``specification``."""
        return self.specification()[0]

    def specification(self) -> tuple[RunConfig, dict[str, Any]]:
        """The run's configuration, and all of ``spec.json``, which also names the ``corpus``.

        Raises:
            RecordError: ``spec.json`` is missing, torn, or is another run's.
        """
        record = read_json(self.path / "spec.json")
        if not isinstance(record, dict) or "config" not in record:
            raise RecordError(f"{self.path / 'spec.json'}: not a run specification")
        config = RunConfig.parse(record["config"], str(self.path / "spec.json"))
        if config.run_key != self.run_key:
            raise RecordError(
                f"{self.path / 'spec.json'}: its configuration has the key {config.run_key}, "
                f"not {self.run_key}"
            )
        return config, record

    def result(self) -> dict[str, Any] | None:
        """The final record, or None while the run is not over."""
        path = self.path / "result.json"
        return _record(path) if path.exists() else None

    def write_result(self, generation: int, record: Mapping[str, Any]) -> None:
        """Declare the run over. Raises Superseded if a newer generation has started."""
        self.fence(generation)
        write_json(
            self.path / "result.json",
            {"schema_version": 1, "run_key": self.run_key, "generation": generation, **record},
        )

    # downstream evaluations

    def want(self, evaluations: Iterable[Evaluation]) -> None:
        """Declare downstream evaluations: the run is not over without them."""
        for evaluation in evaluations:
            path = self.path / "transfer" / "wanted" / f"{evaluation.key}.json"
            create_json(path, evaluation.record)

    def wanted(self) -> list[Evaluation]:
        """The evaluations declared, by name.

        Raises:
            ConfigError, RecordError: a record is torn, or none.
        """
        paths = sorted((self.path / "transfer" / "wanted").glob("*.json"))
        return [Evaluation.parse(read_json(path), str(path)) for path in paths]

    def evaluations(self, more: Iterable[str] = ()) -> tuple[int, list[str]]:
        """How many evaluations are declared, and which of them are missing, by listing alone.

        Args:
            more: keys of some that are about to be declared.
        """
        folder = self.path / "transfer"
        wanted = {p.name for p in (folder / "wanted").glob("*.json")} | {f"{k}.json" for k in more}
        if not wanted:
            return 0, []
        left = wanted - {p.name for p in folder.glob("*.json")}
        return len(wanted), sorted(name.removesuffix(".json") for name in left)

    def over(self) -> bool:
        """Whether nothing is left to do: it has diverged, or is trained and evaluated."""
        result = self.result()
        if result is None:
            return False
        return result.get("status") != "done" or not self.evaluations()[1]

    # attempts

    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first. Folders without a whole intent are no attempts."""
        found = []
        for folder in sorted(self.path.glob("attempts/[0-9][0-9][0-9][0-9]")):
            records: dict[str, Any] = {}
            for name in RECORDS:
                path = folder / f"{name}.json"
                records[name] = _record(path, *NEEDED[name]) if path.exists() else None
            if records["intent"] is not None:
                found.append(Attempt(int(folder.name), **records))
        return found

    def committed_steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending, without reading them. [steps]"""
        return sorted(int(p.parent.name[5:]) for p in self.path.glob("ckpt/step-[0-9]*/COMMITTED"))

    def attempt_path(self, number: int, name: str) -> Path:
        """File of one record of an attempt."""
        return self.path / "attempts" / f"{number:04d}" / f"{name}.json"

    def attempt_numbers(self) -> list[int]:
        """Numbers of all attempts, ascending, without reading them: of folders with an intent."""
        found = self.path.glob("attempts/[0-9][0-9][0-9][0-9]/intent.json")
        return sorted(int(p.parent.name) for p in found)

    def record(self, number: int, name: str, record: Mapping[str, Any]) -> bool:
        """Create one record of an attempt; False if it exists (it is untouched).

        Args:
            name: ``intent``, ``submit``, ``claim``, ``cancel`` or ``end``.
        """
        if name not in RECORDS:
            raise RecordError(f"no such attempt record: {name!r}; valid: {', '.join(RECORDS)}")
        return create_json(
            self.attempt_path(number, name),
            {"schema_version": 1, **record},
        )

    # generations and metrics

    def generations(self) -> list[int]:
        """Numbers of all generations, ascending."""
        return sorted(int(p.stem) for p in self.path.glob("metrics/*.jsonl") if p.stem.isdecimal())

    def start_generation(self, header: Mapping[str, Any]) -> int:
        """Open a new generation, which fences off all older ones.

        Args:
            header: first line of its metrics file; ``resumed_from`` (the committed step it starts
                from, 0 for a fresh start) is required.

        Returns:
            Its number, from 1.
        """
        if "resumed_from" not in header:
            raise ValueError("a generation must say the step it resumed from")
        while True:
            generation = max(self.generations(), default=0) + 1
            mine = secrets.token_hex(8)
            line = {"kind": "start", "schema_version": 1, "generation": generation, **header}
            if create_bytes(self.metrics_path(generation), _line({**line, "token": mine})):
                self._opened[generation] = mine
                return generation

    def starts(self) -> list[dict[str, Any]]:
        """First line of every generation's metrics, oldest first: what started, where and how."""
        found = []
        for generation in self.generations():
            if (first := next(_lines(self.metrics_path(generation)), None)) is not None:
                found.append(first)
        return found

    def gpu_hours(self, attempt: int | None = None, after: int = 0) -> float:
        """Hours of all ranks from the beginning of a job to its last row of metrics, summed over
        starts, those whose work was lost too. [GPU-hours; on CPUs rank-hours]

        Every time is a difference on one clock, that of rank 0's host.

        Args:
            attempt: of this attempt's starts only.
            after: of generations after this one only.
        """
        seconds = 0.0
        for generation in self.generations():
            if generation <= after:
                continue
            first, last = _ends(self.metrics_path(generation))
            if first is None or "seconds" not in first:
                continue  # written before starts had times
            if attempt in (None, first.get("attempt")):
                trained = last.get("seconds", first["seconds"]) - first["seconds"]
                seconds += (starting_seconds(first) + trained) * first["world_size"]
        return seconds / 3600

    def evaluation_seconds(self) -> float:
        """Longest time that a start took for a downstream evaluation, or spent on none; 0 if none
        evaluated. [seconds]"""
        longest = 0.0
        for generation in self.generations():
            first, last = _ends(self.metrics_path(generation))
            if first is not None and last.get("kind") == "evaluation":
                finished = max(1, first["missing"] - last["missing"])
                longest = max(longest, (last["seconds"] - first["seconds"]) / finished)
        return longest

    def pace(self) -> float | None:
        """Steps a second on the way so far, evaluations on pools and checkpoints included; None
        before there are two rows."""
        for generation in reversed(self.generations()):
            _, last = _ends(self.metrics_path(generation))
            if last.get("kind") in ("train", "pool") and last.get("seconds", 0) > 0:
                return float(last["step"]) / float(last["seconds"])
        return None

    def metrics_path(self, generation: int) -> Path:
        """Metrics file of a generation."""
        return self.path / "metrics" / f"{generation}.jsonl"

    def fence(self, generation: int) -> None:
        """Raise Superseded if a newer generation than ``generation`` has started, or if the one
        that this process opened is not there any more: somebody removed the run."""
        if (mine := self._opened.get(generation)) is not None:
            # A word in the file, not its inode: a file made after one was removed may get the
            # same number.
            path = self.metrics_path(generation)
            try:
                first = next(_lines(path), {})
            except FileNotFoundError:
                first = {}
            if first.get("token") != mine:
                raise Superseded(f"{path}: is not the one that this process opened; it stops")
        newest = max(self.generations(), default=0)
        if newest > generation:
            raise Superseded(
                f"{self.path}: generation {newest} has started; generation {generation} stops"
            )

    def curve(self, kind: str) -> list[dict[str, Any]]:
        """Metrics rows of one kind along the lineage that led to the newest generation, by step.

        A generation's rows count up to the step from which the next one resumed, so that steps
        computed twice after a crash appear once.

        Args:
            kind: ``train`` or ``pool``.
        """
        return self.curves(kind)[kind]

    def curves(self, *kinds: str) -> dict[str, list[dict[str, Any]]]:
        """``curve`` of several kinds, from one reading of the files."""
        curves: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for generation in self.generations():
            for row in _lines(self.metrics_path(generation)):
                if row["kind"] == "start":
                    for kind, rows in curves.items():
                        curves[kind] = [r for r in rows if r["step"] <= row["resumed_from"]]
                elif row["kind"] in kinds:
                    curves[row["kind"]].append(row)
        return curves

    def progress(self) -> dict[str, Any] | None:
        """The newest metrics row of any kind but ``start``; None before the first step."""
        for generation in reversed(self.generations()):
            *_, last = _lines(self.metrics_path(generation))
            if last["kind"] != "start":
                return last
        return None


def starting_seconds(start: Mapping[str, Any]) -> float:
    """From the beginning of a job to the generation that it opened, whose first line this is.
    [seconds]"""
    began = (start.get("job") or {}).get("began")
    return 0.0 if began is None else max(0.0, float(start["time"]) - float(began))


def chunk_folder(root: Path, sweep: str, token: str) -> Path:
    """Folder of one submission: ``chunk.json``, job script, logs and submitit's files."""
    return Path(root) / "sweeps" / sweep / "chunks" / token


def one_key(keys: Iterable[str], prefix: str, where: str) -> str:
    """The one of these run keys that starts with ``prefix``; ``where`` begins every message.

    Raises:
        RecordError: none or several do; the message names them.
    """
    if not re.fullmatch("[a-z2-7]{1,16}", prefix):
        raise RecordError(f"{prefix!r} does not begin a run key (1 to 16 of a-z and 2-7)")
    found = sorted(key for key in keys if key.startswith(prefix))
    if not found:
        raise RecordError(f"{where}: no run has a key starting with {prefix!r}")
    if len(found) > 1:
        some = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
        raise RecordError(
            f"{where}: {len(found)} runs have a key starting with {prefix!r} ({some}); "
            "give more letters"
        )
    return found[0]


def append_line(file: Any, row: Mapping[str, Any]) -> None:
    """Append one metrics row to an open binary file and hand it to the operating system."""
    file.write(_line(row))
    file.flush()


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, sort_keys=True, allow_nan=False).encode() + b"\n"


def _record(path: Path, *needed: str) -> dict[str, Any]:
    record = read_json(path)
    if not isinstance(record, dict) or not set(needed) <= record.keys():
        what = f" with {', '.join(needed)}" if needed else ""
        raise RecordError(f"{path}: not a record{what}, but {str(record)[:40]!r}")
    return record


def _ends(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """First row of a metrics file and the last whole one, without reading what is between."""
    with open(path, "rb") as f:
        first = f.readline()
        f.seek(max(0, f.seek(0, 2) - TAIL_BYTES))
        tail = f.read().split(b"\n")[:-1]
    try:
        opening = json.loads(first) if first.endswith(b"\n") else None
        return opening, json.loads(tail[-1]) if tail else {}
    except json.JSONDecodeError as e:
        raise RecordError(f"{path}: not a metrics row ({e})") from None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole rows of a metrics file; a torn last line (a crash in mid-write) is left out."""
    with open(path, "rb") as f:
        for raw in f:
            if not raw.endswith(b"\n"):
                return
            try:
                row = json.loads(raw)
            except json.JSONDecodeError as e:
                raise RecordError(f"{path}: not a metrics row ({e}): {raw[:80]!r}") from None
            yield row
