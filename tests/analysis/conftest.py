"""A small study with a known law, as run directories on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scaling.collect import collect
from scaling.config import CorpusCard, PoolConfig
from scaling.files import write_json
from scaling.results import Tables
from scaling.rundir import RunDir, append_line
from scaling.sweeps import Grid, PlannedRun

EXPONENT = 0.06
CHANCE = float(np.log(256))


@pytest.fixture(scope="session")
def planned() -> list[PlannedRun]:
    card = CorpusCard(
        name="toy",
        digest="abcdefghijklmnop",
        services=("search", "shop"),
        vocab_size=500,
        n_users=4_096,
        pool=PoolConfig(size=256, digest="ponmlkjihgfedcba"),
        items_per_user={s: (0.0, *([0.02] * 50)) for s in ("search", "shop")},
        tokens_per_item=(0.0, 0.0, 0.0, 0.0, 1.0),
    )
    grid = Grid(
        name="toy",
        figure="Fig. 0",
        source="a planted law",
        corpus=Path("toy.toml"),
        base={"steps": 200, "evaluations": 2},
        grid={
            "model": ["2x16", "2x32", "2x64"],
            "batch_size": [16, 64],
            "items_per_user": [4, 16],
            "data_fraction": [0.25, 1.0],
        },
    )
    return grid.runs(card)


@pytest.fixture(scope="session")
def simulate(planned: list[PlannedRun]) -> Callable[[Path], Path]:
    """Writes the study below a folder and collects it; every loss lies on or above the law
    ``loss = 3 * pf_days ** -EXPONENT`` at the paper's counting. Returns the folder of tables."""

    def write(folder: Path) -> Path:
        rng = np.random.default_rng(0)
        for i, plan in enumerate(planned):
            assert plan.config is not None
            run = RunDir.create(folder / "work", plan.config, "toy")
            run.record(1, "intent", {"at": 0.0})
            generation = run.start_generation({"resumed_from": 0})
            law = 3.0 * (plan.row["pf_days"] / 1e-9) ** -EXPONENT
            loss = float(law * np.exp(0.0 if i % 3 else abs(rng.normal(0, 0.02))))
            counted = {"tokens": 1e5, "items": 2e4, "users": 3200.0, "seconds": 12.0}
            counted["flops_exact"] = 1.3 * plan.row["flops_exact"]
            with open(run.metrics_path(generation), "ab") as f:
                for step in (100, 200):
                    row = {"step": step, **counted, "loss": loss * 1.1, "lr": 1e-3}
                    append_line(f, {"kind": "train", "grad_norm": 1.0, "clipped_steps": 1, **row})
                    row |= {"loss": loss + (200 - step) / 500, "loss_refit": loss - 0.01}
                    row |= {"accuracy": 0.2, "logit_scale": 14.0, "pools": {"64": loss - 1}}
                    append_line(f, {"kind": "pool", **row})
            run.write_result(
                generation,
                {
                    **{"status": "done", "step": 200, "loss": loss, "loss_refit": loss - 0.01},
                    **{"best_loss": loss, "best_step": 200, "train_loss": loss * 1.1},
                    **{"chance": CHANCE, "accuracy": 0.2, "logit_scale": 14.0, "world_size": 1},
                    **{"pool_size": 256, "pool_digest": plan.config.pool.digest, **counted},
                    **{"n_total": plan.row["n_total"], "flops": plan.row["flops"]},
                    **{"pf_days_exact": counted["flops_exact"] / 8.64e19},
                },
            )
            for task, shift in (("books", 0.0), ("food", 0.15)):
                rows = [
                    {
                        **{"task": task, "system": system, "segment": "all"},
                        **{"hr_1": 0.1, "hr_10": 0.4, "ndcg_10": 0.2, "mrr": 0.2},
                        **{"loss": value, "loss_low": value - 0.01, "loss_high": value + 0.01},
                        **{"loss_softmax": 4.0, "tie_gap": 0.0, "n_users": 200, "n_targets": 600},
                    }
                    for system, value in (
                        ("clue/u-mlp", 0.3 + shift + 0.05 * loss + rng.normal(0, 0.002)),
                        ("popularity", 0.62 + shift),
                    )
                ]
                write_json(
                    run.path / "transfer" / f"{task}.json",
                    {
                        **{"run_key": run.run_key, "step": 200, "rows": rows},
                        "evaluation": {
                            **{"task": task, "task_digest": task, "history": "target"},
                            **{"folds": 2, "seeds": 1},
                        },
                    },
                )
        collect(folder / "work", [p.row for p in planned], "toy", folder / "results" / "toy")
        return folder / "results" / "toy"

    return write


@pytest.fixture(scope="session")
def folder(simulate: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def tables(folder: Path) -> Tables:
    from scaling.results import load

    return load(folder)


@pytest.fixture(scope="session")
def fits(tables: Tables) -> dict[str, Any]:
    """The report on the study with the planted law, its laws searched from fewer starts."""
    from scaling.analysis import study
    from scaling.analysis.fitting import fit as fit_module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "STARTS_SCORED", 400)
        patch.setattr(fit_module, "STARTS_POLISHED", 6)
        return study(tables, n_boot=60)


@pytest.fixture(scope="session")
def world() -> Callable[..., pd.DataFrame]:
    """Makes the runs of a full design of three factors and two data fractions, with a planted
    additive law: ``world({"n_total": 0.3}, floor=1.0, noise=0.01)``, exponents about medians."""
    return _world


def _world(exponents: dict[str, float], *, floor: float = 0.0, noise: float = 0.0) -> pd.DataFrame:
    """A full design of three factors with a planted additive law, one run a cell."""
    rng = np.random.default_rng(0)
    grid = pd.DataFrame(
        [
            {"n_total": n, "batch_size": b, "items_per_user": s, "data": d}
            for n in (1e5, 4e5, 1.6e6, 6.4e6)
            for b in (32, 128, 512)
            for s in (4, 16, 64)
            for d in (0.25, 1.0)
        ]
    )
    steps = 200
    met = grid["batch_size"] * steps
    users = 20_000 * grid["data"]
    runs = grid.assign(
        run_key=[f"r{i}" for i in range(len(grid))], steps=steps, negatives=grid["batch_size"],
        items_per_user_mean=0.9 * grid["items_per_user"] ** 0.95,
        n_non_embedding=0.7 * grid["n_total"], n_item=0.3 * grid["n_total"],
        n_service=0.4 * grid["n_total"], n_users=users, users_seen=np.minimum(users, met),
        repeats=np.maximum(0, met / users - 1), epochs=met / users, model="m", lr=1e-3, eps=1e-6,
        clip_norm=0.01,
    )  # fmt: skip
    pf = 6 * runs["n_total"] * runs["batch_size"] * steps * runs["items_per_user"] / 8.64e19
    runs["pf_days"], runs["pf_days_exact"] = pf, 1.3 * pf
    runs["pf_days_non_embedding"] = 0.7 * pf
    loss = floor + sum(
        (runs[name] / runs[name].median()) ** -p for name, p in exponents.items()
    )  # fmt: skip
    runs["loss"] = loss * np.exp(rng.normal(0, noise, len(runs)))
    return runs.assign(loss_refit=runs["loss"], best_loss=runs["loss"], loss_se=0.01)
