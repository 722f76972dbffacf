"""Cluster profiles: where runs execute, as ``slurm/*.toml`` say.

Every value that reaches ``sbatch``, a shell or a path is whitelisted here, once: what passes can be
quoted or not and means the same. The exception is ``setup``, which *is* shell code.
"""

import contextlib
import grp
import os
import pwd
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from scaling.config import ConfigError, Count, Frozen, Name, RunConfig, TrainSettings, read_toml

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
"""A Slurm name: partition, account, quality of service."""
NodeList = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,\[\]-]{0,999}$")]
"""Slurm's host list, ``gpu[01-04],gpu09``."""
Features = Annotated[str, Field(pattern=r"^[A-Za-z0-9(\[][A-Za-z0-9_.:&|*()\[\]-]{0,255}$")]
"""Slurm's feature expression, ``v100&nvlink``."""
ShellLine = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,2000}$")]
SAFE_PATH = re.compile(r"/[A-Za-z0-9_./+@=,-]*")
"""Absolute paths that mean the same to a shell, to Slurm (``%j``) and to submitit."""


class Shape(Frozen):
    """What one job of one run asks for. One array holds runs of one shape."""

    nodes: Annotated[int, Field(ge=1, le=512)] = 1
    tasks_per_node: Annotated[int, Field(ge=1, le=256)] = 1
    """Ranks on each node; on GPUs as many as ``gpus_per_node``."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 0
    cpus_per_task: Annotated[int, Field(ge=1, le=512)] = 1
    mem_gb: Annotated[float, Field(gt=0, le=100_000)] | None = None
    """Memory of each node; None: the cluster's default. [GB]"""
    time_min: Annotated[int, Field(ge=1, le=60 * 24 * 60)] = 24 * 60
    """Wall time of one slice; a run continues in the next one. [minutes]"""

    @property
    def srun_words(self) -> list[str]:
        """Options of ``srun`` in a job of this shape.

        A rank that ends badly ends its step: no other waits for it in a collective. One that ends
        well does not, whatever the site's WaitTime: others may have more to do. srun does not
        inherit --cpus-per-task since Slurm 22.05.
        """
        return ["--kill-on-bad-exit=1", "--wait=0", f"--cpus-per-task={self.cpus_per_task}"]

    @property
    def world_size(self) -> int:
        """Ranks of a run."""
        return self.nodes * self.tasks_per_node


class ShapeRule(Frozen):
    """Another shape for larger runs: holds from these sizes on."""

    batch_size_from: Annotated[int, Field(ge=0)] = 0
    """The rule holds for runs of at least this batch size. [users]"""
    d_model_from: Annotated[int, Field(ge=0)] = 0
    """The rule holds for runs of at least this width."""
    nodes: Annotated[int, Field(ge=1, le=512)] | None = None
    tasks_per_node: Annotated[int, Field(ge=1, le=256)] | None = None
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] | None = None
    cpus_per_task: Annotated[int, Field(ge=1, le=512)] | None = None
    mem_gb: Annotated[float, Field(gt=0, le=100_000)] | None = None
    time_min: Annotated[int, Field(ge=1, le=60 * 24 * 60)] | None = None


class ClusterProfile(Frozen):
    """One way of executing runs."""

    name: Name
    """For people; recorded with every attempt."""
    executor: Literal["slurm", "local"] = "slurm"
    """``slurm``: job arrays; ``local``: processes on this host."""
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Features | None = None
    exclude: NodeList | None = None
    """Nodes not to be used."""
    shape: Shape = Shape()
    """What a run's job asks for."""
    larger: tuple[ShapeRule, ...] = ()
    """Other shapes for larger runs; the last rule that holds overrides ``shape``."""
    max_parallel: Count = 64
    """Runs of a sweep that execute at once."""
    array_size: Annotated[int, Field(ge=1)] | None = None
    """Most runs in one array; None: what the cluster's MaxArraySize allows."""
    signal_lead_s: Annotated[int, Field(ge=30, le=3600)] = 300
    """SIGUSR2 comes this long before the wall time ends, so that a checkpoint is written: at least
    a step plus twice a checkpoint plus the minute by which Slurm may be early. [seconds]"""
    quarantine_s: Annotated[int, Field(ge=0)] = 600
    """A submission of which nothing is seen is repeated after this. [seconds]"""
    settle_s: Annotated[int, Field(ge=0)] = 30
    """An ended job's records may reach this host so much later (NFS caches). [seconds]"""
    setup: tuple[ShellLine, ...] = ()
    """Shell lines run before the ranks start (``module load ...``). This is code: it runs as
    written. Not for ``local``: start the command in the environment that runs need."""
    train: TrainSettings = TrainSettings()
    """How a run is trained where that does not change its numbers."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a profile.

        Raises:
            ConfigError: the file is missing or wrong; the message names file, key and value.
        """
        return cls.parse(read_toml(path), str(path))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.executor == "local":
            words = ("partition", "account", "qos", "constraint", "exclude", "setup")
            given = [k for k in words if getattr(self, k)]
            if given:
                raise ValueError(f"executor = 'local' has no {', '.join(given)}")
            if self.shape.nodes > 1 or any((r.nodes or 1) > 1 for r in self.larger):
                raise ValueError("executor = 'local' runs on one node")
            gpus = max(self.shape.gpus_per_node, *(r.gpus_per_node or 0 for r in self.larger), 0)
            if gpus and self.max_parallel > 1:
                raise ValueError(
                    f"gpus_per_node = {gpus} with executor = 'local': runs at once would share the "
                    "same GPUs; set max_parallel = 1"
                )
        for s in self.shapes():
            if s.gpus_per_node not in (0, s.tasks_per_node):
                raise ValueError(
                    f"gpus_per_node = {s.gpus_per_node} with tasks_per_node = {s.tasks_per_node}: "
                    "one rank computes on one GPU"
                )
            if self.executor == "slurm" and s.time_min * 60 <= self.signal_lead_s:
                raise ValueError(
                    f"time_min = {s.time_min} leaves nothing before the signal at "
                    f"signal_lead_s = {self.signal_lead_s}"
                )
        return self

    def shapes(self) -> tuple[Shape, ...]:
        """Every shape that a run may get."""
        return self.shape, *(self._override(r) for r in self.larger)

    def _override(self, rule: ShapeRule) -> Shape:
        changes = rule.model_dump(exclude={"batch_size_from", "d_model_from"}, exclude_none=True)
        return self.shape.model_copy(update=changes)

    def resources(self, shape: Shape) -> dict[str, str | int]:
        """What a job of this shape asks ``sbatch`` for, by the long names of its options."""
        wanted = {
            "time": shape.time_min,
            "nodes": shape.nodes,
            "ntasks-per-node": shape.tasks_per_node,
            "cpus-per-task": shape.cpus_per_task,
            "gpus-per-node": shape.gpus_per_node or None,
            "mem": None if shape.mem_gb is None else f"{round(1024 * shape.mem_gb)}M",
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "exclude": self.exclude,
        }
        return {name: value for name, value in wanted.items() if value is not None}

    def setup_lines(self) -> list[str]:
        """``setup`` in a job script: a line that fails ends the job, and says which it was."""
        return [
            line
            for number, given in enumerate(self.setup, 1)
            for line in (
                given,
                f'[ $? -eq 0 ] || {{ echo "error: line {number} of setup failed" >&2; exit 1; }}',
            )
        ]

    def shape_of(self, config: RunConfig) -> Shape:
        """What the job of this run asks for.

        Raises:
            ConfigError: its ranks do not divide the run's batch.
        """
        shape = self.shape
        for rule in self.larger:
            if (
                config.batch_size >= rule.batch_size_from
                and config.model.d_model >= rule.d_model_from
            ):
                shape = self._override(rule)
        if config.batch_size % shape.world_size:
            raise ConfigError(
                f"run {config.run_key}: batch_size = {config.batch_size} is not divisible by the "
                f"{shape.world_size} ranks of profile {self.name!r} ({shape.nodes} nodes x "
                f"{shape.tasks_per_node} tasks)"
            )
        if config.gather_ranks not in (None, shape.world_size):
            raise ConfigError(
                f"run {config.run_key}: gather = {config.gather!r} with gather_ranks = "
                f"{config.gather_ranks}, and profile {self.name!r} starts {shape.world_size} ranks"
            )
        return shape


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Files made meanwhile, by processes started meanwhile too, are nobody else's to read."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def check_owner(*paths: Path) -> None:
    """Refuse folders that somebody else could have put there; those that do not exist pass.

    Raises:
        ConfigError: one belongs to another user (but root), is a symbolic link, or others may
            write to it.
    """
    for path in paths:
        try:
            about = os.lstat(path)
        except FileNotFoundError:
            continue
        if stat.S_ISLNK(about.st_mode):
            raise ConfigError(f"{path}: is a symbolic link; what jobs run lies in real folders")
        if about.st_uid not in (os.getuid(), 0):
            raise ConfigError(
                f"{path}: belongs to user {about.st_uid}, and you are {os.getuid()}: jobs run only "
                "what is your own; choose another --root"
            )
        if about.st_mode & stat.S_ISVTX:
            continue
        if about.st_mode & stat.S_IWOTH:
            raise ConfigError(f"{path}: anybody may write to it; chmod o-w {path}")
        if about.st_mode & stat.S_IWGRP and not _own_group(about.st_gid):
            raise ConfigError(
                f"{path}: all of group {about.st_gid} may write to it, and jobs run what lies "
                f"there; chmod g-w {path}"
            )


def _own_group(gid: int) -> bool:
    """Whether a group is the user's private one, of the same name."""
    try:
        return grp.getgrgid(gid).gr_name == pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return False


def safe_root(root: Path) -> Path:
    """The root folder as an absolute path that nothing on the way to a node reinterprets.

    Raises:
        ConfigError: the path holds other characters than letters, digits and ``_./+@=,-``, or is
            not the user's own.
    """
    path = Path(root).absolute()
    if ".." in path.parts:  # Python takes it out of the paths that it imports from
        path = path.resolve()
    if not SAFE_PATH.fullmatch(str(path)):
        raise ConfigError(
            f"{str(path)!r}: the root folder's path reaches job scripts, where only letters, "
            "digits and _ . / + @ = , - are safe; choose another --root"
        )
    check_owner(path.resolve(), path / "runs", path / "sweeps", path / "code")
    return path
