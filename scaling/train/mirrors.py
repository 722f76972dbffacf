"""Optional mirrors of a run's metrics, below ``<run>/mirrors``: TensorBoard and W&B.

The metrics files are the truth; a mirror is a copy to look at, and is given the metrics and the
configuration, nothing else. Each works in a thread of its own, so that no step waits for it, and
whatever goes wrong with it switches it off with one warning.
"""

import contextlib
import importlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from scaling.config import RunConfig
from scaling.rundir import RunDir

log = logging.getLogger(__name__)
Row = Mapping[str, Any]
PATIENCE = 20.0
"""Longest that closing all mirrors takes. [s]"""
INIT_TIMEOUT = 60.0
"""Longest that W&B tries to reach its server. [s]"""


class Mirrors:
    """The mirrors of one start of a run; on rank 0 only."""

    def __init__(self, mirrors: Sequence["_Mirror"]) -> None:
        self._mirrors = mirrors

    @classmethod
    def open(cls, names: Sequence[str], run: RunDir, config: RunConfig, resumed_from: int) -> Self:
        """Mirrors by name: ``tensorboard``, ``wandb``.

        Args:
            resumed_from: step the run goes on from; what was shown of later ones is shown once.
        """
        return cls([_Mirror(name, run, config, resumed_from) for name in dict.fromkeys(names)])

    def write(self, row: Row) -> None:
        """Show one row of the metrics file, soon; the caller must not change it any more."""
        for mirror in self._mirrors:
            if mirror.is_alive():
                mirror.rows.put(row)

    def close(self) -> None:
        """Show what is still waiting, for at most ``PATIENCE`` seconds."""
        end = time.monotonic() + PATIENCE
        for mirror in self._mirrors:
            mirror.rows.put(None)
        for mirror in self._mirrors:
            if mirror.is_alive():
                mirror.join(max(0.0, end - time.monotonic()))
            if mirror.is_alive():
                mirror.give_up(f"did not end within {PATIENCE:g} s")


class _Mirror(threading.Thread):
    def __init__(self, name: str, run: RunDir, config: RunConfig, resumed_from: int) -> None:
        super().__init__(name=name, daemon=True)
        self.rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._whose, self._off = (run, config, resumed_from), False
        self._module, self._show = {
            "tensorboard": ("torch.utils.tensorboard", _tensorboard),
            "wandb": ("wandb", _wandb),
        }[name]
        try:
            importlib.import_module(self._module)  # not in the thread, beside the run's imports
            self.start()
        except ImportError as e:
            self.give_up(f"{e} (pip install 'clue-scaling[{name}]')")
        except (Exception, SystemExit) as e:
            self.give_up(f"{type(e).__name__}: {e}")

    def run(self) -> None:
        try:
            self._show(sys.modules[self._module], iter(self.rows.get, None), *self._whose)
        except BaseException as e:  # W&B raises SystemExit, too
            self.give_up(f"{type(e).__name__}: {e}")

    def give_up(self, reason: str) -> None:
        if not self._off:
            self._off = True
            log.warning("mirror %s is off, the run goes on: %s", self.name, reason)
            if self.name == "wandb":  # its process, hung, would keep ours from exiting
                threading.Thread(target=_end_wandb, daemon=True).start()


def _tensorboard(
    module: Any, rows: Iterable[Row], run: RunDir, config: RunConfig, resumed_from: int
) -> None:
    folder = run.path / "mirrors" / "tensorboard"
    writer = module.SummaryWriter(str(folder), purge_step=resumed_from + 1)
    for row in rows:
        for key, value in scalars(row).items():
            if key != "step":
                writer.add_scalar(f"{row['kind']}/{key}", value, row["step"])
        writer.flush()
    writer.close()


def _wandb(
    module: Any, rows: Iterable[Row], run: RunDir, config: RunConfig, resumed_from: int
) -> None:
    folder = run.path / "mirrors"
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # W&B would write to /tmp instead
        raise PermissionError(f"{folder} is not writable")
    settings = module.Settings(
        reinit="create_new",
        init_timeout=INIT_TIMEOUT,
        finish_timeout=PATIENCE * 0.75,
        finish_timeout_raises=True,
        stop_fn=lambda: log.warning("W&B asks to stop; only `clue-scaling cancel` ends a run"),
        silent=True,
        console="off",
        save_code=False,
        disable_git=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    shown = module.init(
        id=run.run_key,
        name=run.run_key,
        project=os.environ.get("WANDB_PROJECT") or "clue-scaling",
        dir=str(folder),
        config=config.model_dump(mode="json"),
        resume="allow",
        settings=settings,
    )
    shown.define_metric("step")
    for kind in ("train", "pool"):
        shown.define_metric(f"{kind}/*", step_metric="step")
    # W&B takes nothing back: of a step that an earlier start has shown, it keeps that.
    before = {kind: shown.summary.get(f"{kind}/step") or 0 for kind in ("train", "pool")}
    for row in rows:
        if row["step"] > before[row["kind"]]:
            named = {f"{row['kind']}/{key}": value for key, value in scalars(row).items()}
            shown.log({"step": row["step"], **named})
    shown.finish()


def _end_wandb() -> None:
    with contextlib.suppress(BaseException):
        sys.modules["wandb"].teardown()


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row, those in objects as ``object/key``; null is left out."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{key}/{inner}": number for inner, number in scalars(value).items()}
        elif isinstance(value, int | float):
            found[key] = float(value)
    return found
