"""A command as a job array whose elements share its work: ``clue-scaling embed --cluster``.

Element i of N runs the command with ``--shards i/N`` behind it; where the profile's shape has
several tasks, each takes a part of its element's. Unlike a run's job (``submission.py``) an element
needs no fence and no record: whatever it does twice is the same. So one that Slurm requeues goes
on, and the same array may be submitted again at any time.
"""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scaling import ClueError
from scaling.config import ConfigError
from scaling.files import write_bytes
from scaling.slurm.code import archive_path, import_line
from scaling.slurm.profile import SAFE_PATH, ClusterProfile, check_owner, private_files
from scaling.slurm.scheduler import command

SUBMITTED = re.compile(r"Submitted batch job (\d+)")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class CommandArray:
    """What one ``sbatch`` submits.

    Raises:
        ConfigError: the profile is not of Slurm, or the folder's path or the name could mean
            something to a shell.
    """

    name: str
    words: Sequence[str]
    """The command, without ``clue-scaling``; any words, they are quoted."""
    size: int
    """Elements."""
    folder: Path
    """Of the script and of the elements' output; absolute."""
    root: Path
    """As ``safe_root`` gives it."""
    code: str
    """Digest of the archive that they import."""
    profile: ClusterProfile

    def __post_init__(self) -> None:
        if self.profile.executor != "slurm":
            raise ConfigError(
                f"profile {self.profile.name!r}: executor = {self.profile.executor!r} has no job "
                "arrays; start the command with --shards 0/2, 1/2, ... instead"
            )
        for value, safe in ((str(self.folder), SAFE_PATH), (self.name, NAME)):
            if not safe.fullmatch(value):
                raise ConfigError(
                    f"{value!r}: reaches a job script, where only letters, digits and "
                    "_ . / + @ = , - are safe"
                )
        check_owner(self.folder.parent, self.folder)

    def script(self) -> str:
        """The job script."""
        profile, shape = self.profile, self.profile.shape
        options = {
            "job-name": self.name,
            "array": f"0-{self.size - 1}%{min(profile.max_parallel, self.size)}",
            "output": f"{self.folder}/{self.name}-%a.log",
            "open-mode": "append",
            **profile.resources(shape),
        }
        if profile.constraint:
            options["constraint"] = shlex.quote(profile.constraint)
        archive = archive_path(self.root, self.code)
        python = shlex.quote(sys.executable)
        return "\n".join(
            [
                "#!/bin/bash",
                *(f"#SBATCH --{name}={value}" for name, value in options.items()),
                "#SBATCH --requeue",
                # What is imported must be the user's own.
                f"test -O {archive} || "
                f'{{ echo "error: {archive}: is missing, or not your own" >&2; exit 1; }}',
                *profile.setup_lines(),
                import_line(archive),
                f"{shlex.join(['srun', *shape.srun_words])} "
                f"{python} -m scaling.cli {shlex.join(self.words)} "
                f'--shards "${{SLURM_ARRAY_TASK_ID}}/{self.size}"',
                "",
            ]
        )

    def submit(self) -> str:
        """Submit it; returns the array's job id.

        Raises:
            ClueError: ``sbatch`` gave none; the array may have come all the same, which harms
                nothing.
        """
        path = self.folder / f"{self.name}.sh"
        with private_files():
            write_bytes(path, self.script().encode())
            ok, output = command("sbatch", str(path))
        found = SUBMITTED.search(output)
        if not ok or not found:
            raise ClueError(f"{path}: not submitted: {output.strip() or 'sbatch said nothing'}")
        return found.group(1)
