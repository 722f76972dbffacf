"""Sweep files: points, identity, plan rows, errors, and the studies shipped in ``sweeps/``."""

import itertools
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.config import (
    MAX_ITEMS,
    MAX_TOKENS,
    ConfigError,
    CorpusCard,
    ModelConfig,
    PoolConfig,
    RunConfig,
)
from scaling.data.batches import step_users
from scaling.data.prepare import read_card
from scaling.data.recipe import read_corpus_file
from scaling.sweeps import (
    PLAN_COLUMNS,
    POINT_KEYS,
    Grid,
    PlannedRun,
    SweepError,
    load_sizes,
    model_name,
    sweep_id,
    write_sweep,
)

SWEEPS = Path(__file__).parent.parent / "sweeps"
DIGEST = "abcdefghijklmnop"


def card(**changes: Any) -> CorpusCard:
    def histogram(shares: dict[int, float], longest: int) -> list[float]:
        return [shares.get(n, 0.0) for n in range(longest + 1)]

    return CorpusCard.parse(
        {
            "name": "test",
            "digest": DIGEST,
            "services": ["search", "shop"],
            "vocab_size": 1000,
            "n_users": 10_000,
            "pool": {"size": 64, "digest": DIGEST},
            "items_per_user": {
                "search": histogram({2: 0.5, 100: 0.5}, MAX_ITEMS),
                "shop": histogram({10: 1.0}, MAX_ITEMS),
            },
            "tokens_per_item": histogram({4: 0.5, 8: 0.5}, MAX_TOKENS),
            **changes,
        },
        "card",
    )


def grid(**changes: Any) -> Grid:
    return Grid.parse(
        {
            "name": "test",
            "figure": "none",
            "source": "a test",
            "corpus": "corpus.toml",
            "base": {"model": "1x16", "batch_size": 8, "steps": 100},
            **changes,
        },
        "test",
    )


def written(folder: Path, text: str) -> Path:
    path = folder / "sweep.toml"
    path.write_text(f'name = "s"\nfigure = "f"\nsource = "t"\ncorpus = "c.toml"\n{text}')
    return path


def settings(run: PlannedRun) -> dict[str, Any]:
    assert run.config is not None
    flat = run.config.model_dump()
    return {**flat, **flat["data"], **flat["model"]}


# ---- points -------------------------------------------------------------------------------------


def test_runs_are_rows_times_grid_times_seeds() -> None:
    runs = grid(
        grid={"model": ["1x16", "2x32"], "items_per_user": [4, 8, 16]},
        zip={"rows": [{"batch_size": 8}, {"batch_size": 16, "steps": 50}]},
        seeds=[0, 7],
    ).runs(card())
    found = [
        (s["batch_size"], s["steps"], s["layers"], s["d_model"], s["items_per_user"], s["seed"])
        for s in map(settings, runs)
    ]
    expected = [
        (*row, *model, items, seed)
        for row, model, items, seed in itertools.product(
            [(8, 100), (16, 50)], [(1, 16), (2, 32)], [4, 8, 16], [0, 7]
        )
    ]
    assert found == expected


def test_a_point_named_twice_is_one_run() -> None:
    table = {"layers": 1, "d_model": 16, "heads": 1}
    runs = grid(
        grid={"model": ["1x16", table]},
        zip={"rows": [{"items_per_user": 128}, {}, {"negatives": 8}, {"optim": {"lr": 5e-4}}]},
        seeds=[0, 0],
    ).runs(card())
    assert len(runs) == 1


def test_a_grid_without_anything_to_vary_is_one_run() -> None:
    assert len(grid().runs(card())) == 1


def test_negatives_are_the_batch_unless_set_apart() -> None:
    runs = grid(grid={"batch_size": [8, 16]}, zip={"rows": [{}, {"negatives": 4}]}).runs(card())
    assert [(r.row["batch_size"], r.row["negatives"]) for r in runs] == [
        (8, 8), (16, 16), (8, 4), (16, 4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        '[base]\nmodel = "1x16"\nbatch_size = 8\noptim.lr = 1e-3\noptim.eps = 1e-8\n',
        '[base]\nmodel = "1x16"\nbatch_size = 8\n[base.optim]\nlr = 1e-3\neps = 1e-8\n',
        '[base]\nmodel = "1x16"\nbatch_size = 8\n"optim.lr" = 1e-3\n"optim.eps" = 1e-8\n',
        '[base]\nmodel = "1x16"\nbatch_size = 8\n[grid]\noptim.lr = [1e-3]\noptim.eps = [1e-8]\n',
        '[base]\nmodel = "1x16"\n[[zip.rows]]\nbatch_size = 8\noptim = {lr = 1e-3, eps = 1e-8}\n',
    ],
)
def test_the_optimiser_is_set_dotted_or_as_a_table(tmp_path: Path, text: str) -> None:
    [run] = Grid.read(written(tmp_path, text)).runs(card())
    assert run.config is not None
    assert (run.config.optim.lr, run.config.optim.eps) == (1e-3, 1e-8)
    assert run.config.optim.weight_decay == 0.1


def test_every_key_reaches_the_configuration() -> None:
    values: dict[str, Any] = {
        "model": "2x128", "dropout": 0.2, "feature_dim": 9, "batch_size": 16, "negatives": 4,
        "steps": 77, "evaluations": 7, "precision": "bf16", "items_per_user": 9,
        "data_fraction": 0.5, "services": ["shop"], "shuffle": False, "optim.lr": 1e-3,
        "optim.betas": [0.8, 0.9], "optim.eps": 1e-7,
        "optim.weight_decay": 0.2, "optim.warmup": 0.2, "optim.final_lr": 0.2,
        "optim.clip_norm": 2.0, "gather": "local", "gather_ranks": 2, "distinct_items": True,
    }  # fmt: skip
    assert set(values) == set(POINT_KEYS)
    [run] = grid(base=values, seeds=[3]).runs(card())
    assert run.config == RunConfig.parse(
        {
            "model": {
                "layers": 2, "d_model": 128, "heads": 2, "dropout": 0.2, "feature_dim": 9,
            },
            "data": {
                "corpus_digest": DIGEST, "vocab_size": 1000, "n_services": 1, "items_per_user": 9,
                "data_fraction": 0.5, "services": ["shop"], "shuffle": False,
            },
            "batch_size": 16, "negatives": 4, "steps": 77, "evaluations": 7, "precision": "bf16",
            "gather": "local", "gather_ranks": 2, "distinct_items": True,
            "optim": {k.removeprefix("optim."): v for k, v in values.items() if "." in k},
            "pool": card().pool_of(("shop",)),
            "seed": 3,
        },
        "expected",
    )  # fmt: skip


def test_services_are_taken_in_the_corpus_s_order_and_all_of_them_are_none() -> None:
    three = card(
        services=["search", "shop", "news"],
        items_per_user={s: [0.0, 0.0, 1.0] for s in ("search", "shop", "news")},
    )

    def run(services: list[str] | None) -> Any:
        base = {"model": "1x16", "batch_size": 8} | ({"services": services} if services else {})
        [planned] = grid(base=base).runs(three)
        return planned

    whole = run(None)
    assert run(["news", "shop", "search"]).config == whole.config
    assert (whole.row["services"], whole.config.pool) == (None, three.pool)
    pair, only = run(["news", "search"]), run(["news"])
    assert pair.config == run(["search", "news"]).config
    assert pair.config.data.services == ("search", "news")
    assert (pair.row["services"], only.row["services"]) == ("search+news", "news")
    assert [r.config.data.n_services for r in (whole, pair, only)] == [3, 2, 1]
    assert [r.config.data.n_views for r in (whole, pair, only)] == [3, 2, 2]
    # A loss over other views of the pool's users does not compare.
    assert len({r.config.pool.digest for r in (whole, pair, only)}) == 3
    assert {r.config.pool.size for r in (whole, pair, only)} == {64}


def test_a_service_with_single_logs_cannot_be_contrasted_with_itself() -> None:
    lengths = {"search": [0.0, 0.1, 0.9], "shop": [0.0, 0.0, 1.0]}
    some = card(items_per_user=lengths)
    [run] = grid(base={"model": "1x16", "batch_size": 8, "services": ["shop"]}).runs(some)
    assert run.row["items_per_user_mean"] == 1
    with pytest.raises(ConfigError, match=r"a single log of 'search'.*users\.min_logs = 2"):
        grid(base={"model": "1x16", "batch_size": 8, "services": ["search"]}).runs(some)
    alone = card(services=["search"], items_per_user={"search": lengths["search"]})
    with pytest.raises(ConfigError, match="a single log of 'search'"):
        grid(base={"model": "1x16", "batch_size": 8}).runs(alone)


# ---- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("1x16", ("clue", 1, 16, 1)),
        ("6x192", ("clue", 6, 192, 3)),
        ("single-3x128", ("single", 3, 128, 2)),
        *((f"1x{d}", ("clue", 1, d, 1)) for d in (8, 16, 32, 48, 64, 100, 127)),
        ("2x96", ("clue", 2, 96, 1)),
        ("8x720", ("clue", 8, 720, 10)),  # 720 // 64 = 11 divides nothing
        ("8x200", ("clue", 8, 200, 2)),
        ("1x251", ("clue", 1, 251, 1)),  # a prime
        ({"layers": 8, "d_model": 720, "heads": 6}, ("clue", 8, 720, 6)),
        ({"system": "single", "layers": 1, "d_model": 8, "heads": 2}, ("single", 1, 8, 2)),
    ],
)
def test_models_are_shapes_or_tables(name: Any, expected: tuple[Any, ...]) -> None:
    [run] = grid(base={"model": name, "batch_size": 8}).runs(card())
    assert run.config is not None
    m = run.config.model
    assert (m.system, m.layers, m.d_model, m.heads) == expected


PUBLISHED = {
    "clue-4m": 4, "clue-8m": 8, "clue-15m": 15, "clue-30m": 30, "clue-60m": 60, "clue-120m": 120,
    "clue-160m": 160,
}  # fmt: skip


def test_named_sizes_count_what_they_are_called() -> None:
    sizes = load_sizes(SWEEPS / "models.toml")
    runs = Grid.parse(
        {
            "name": "sizes", "figure": "", "source": "", "corpus": "c", "sizes": sizes,
            "base": {"batch_size": 8}, "grid": {"model": list(sizes)},
        },
        "test",
    ).runs(card(vocab_size=50_257))  # fmt: skip
    counted = {r.row["model"]: r.row["n_total"] for r in runs}
    assert list(counted) == list(sizes)
    for name, millions in PUBLISHED.items():
        assert counted[name] / 1e6 == pytest.approx(millions, rel=0.045), name
    assert counted["table8"] == 137_298_961
    assert counted["single-235m"] == 238_062_961
    assert sorted(set(sizes) - set(PUBLISHED)) == ["single-235m", "table8"]


def test_the_comments_in_models_toml_are_right() -> None:
    text = (SWEEPS / "models.toml").read_text()
    told = re.findall(r"^\[(.+)\]\s+#\s+([\d.]+)M, without tables ([\d.]+)M", text, re.M)
    sizes = load_sizes(SWEEPS / "models.toml")
    assert {name for name, *_ in told} == set(sizes)
    runs = grid(base={"batch_size": 8}, grid={"model": list(sizes)}, sizes=sizes).runs(
        card(vocab_size=50_257)
    )
    for (_, total, without), run in zip(told, runs, strict=True):
        assert float(total) == round(run.row["n_total"] / 1e6, 2)
        assert float(without) == round(run.row["n_non_embedding"] / 1e6, 2)


def test_sizes_are_named_only_at_the_paper_s_vocabulary() -> None:
    sizes = load_sizes(SWEEPS / "models.toml")
    small = sizes["clue-4m"]
    assert model_name(small, 50_257, sizes) == "clue-4m"
    assert model_name(small.model_copy(update={"dropout": 0.0}), 50_257, sizes) == "clue-4m"
    assert model_name(small, 1000, sizes) == "8x64"
    assert model_name(ModelConfig(layers=8, d_model=64, heads=2), 50_257, sizes) == "8x64"


@pytest.mark.parametrize(
    ("base", "vocabulary", "name"),
    [
        ({"model": "clue-4m"}, 50_257, "clue-4m"),
        ({"model": "clue-4m", "feature_dim": 32}, 50_257, "clue-4m-f32"),
        ({"model": "8x64", "feature_dim": 32, "dropout": 0.0}, 50_257, "clue-4m-f32"),
        ({"model": "8x64", "feature_dim": 32}, 1000, "8x64-f32"),
        ({"model": "single-8x64", "feature_dim": 32}, 50_257, "single-8x64-f32"),
        (
            {"model": {"layers": 8, "d_model": 64, "heads": 2, "feature_dim": 63}},
            1000, "8x64-f63",
        ),
        (
            {"model": {"layers": 8, "d_model": 64, "heads": 2, "feature_dim": 63},
             "feature_dim": 1},
            1000, "8x64-f1",
        ),
    ],
)  # fmt: skip
def test_the_name_of_a_model_says_its_features_width(
    base: dict[str, Any], vocabulary: int, name: str
) -> None:
    sizes = load_sizes(SWEEPS / "models.toml")
    [run] = grid(base={**base, "batch_size": 8}, sizes=sizes).runs(card(vocab_size=vocabulary))
    assert run.config is not None
    assert run.row["model"] == name
    assert run.row["feature_dim"] == run.config.model.feature_dim
    assert (f"-f{run.row['feature_dim']}" in name) == (run.row["feature_dim"] is not None)


@pytest.mark.parametrize("name", load_sizes(SWEEPS / "models.toml"))
def test_the_advice_at_another_vocabulary_can_be_followed(name: str) -> None:
    sizes = load_sizes(SWEEPS / "models.toml")
    with pytest.raises(SweepError, match=rf"{name} is a size .* 50257, .* has 1000; ") as e:
        grid(base={"model": name, "batch_size": 8}, sizes=sizes).runs(card())
    advice = tomllib.loads(str(e.value).partition("give its shape instead: ")[2])
    [run] = grid(base={**advice, "batch_size": 8}).runs(card())
    assert run.config is not None
    assert run.config.model == sizes[name]


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[base]\nbatchsize = 8\n", "sweep.toml: base: unknown key 'batchsize'; valid keys: model"),
        ("[grid]\nwidth = [8]\n", "sweep.toml: grid: unknown key 'width'; valid keys: "),
        ("[[zip.rows]]\n[[zip.rows]]\noptim.beta = 1\n", "zip.rows[1]: unknown key 'optim.beta'"),
        ("[base]\nseed = 1\n", "unknown key 'seed'; valid keys: .*; seeds are set by 'seeds'"),
        ("[base]\npool = 1\n", "unknown key 'pool'"),
        ("[grid]\nbatch_size = 8\n", "grid: batch_size = 8 is not a list of values"),
        ("[grid]\nbatch_size = []\n", "grid: batch_size = [] is not a list of values"),
        ("[grid]\nsteps = [8]\n[[zip.rows]]\nsteps = 9\n", "'steps' is in grid and in zip.rows[0]"),
        ("workers = 3\n", "sweep.toml: unknown key 'workers'; valid keys: base, corpus, figure, "),
        ("[zip]\nrow = []\n", "unknown key 'zip.row'; valid keys: rows"),
        ("seeds = []\n", "seeds = []"),
        ("[base]\nmodel = 'x\n", "sweep.toml: not valid TOML: "),
    ],
)
def test_a_wrong_file_is_refused_when_read(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        Grid.read(written(tmp_path, text))
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), str(e.value)), e.value
    assert str(tmp_path) in str(e.value)


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such file"):
        Grid.read(tmp_path / "none.toml")
    path = tmp_path / "a.toml"
    path.write_text('name = "a"\n')
    with pytest.raises(ConfigError, match="key 'figure' is missing"):
        Grid.read(path)


@pytest.mark.parametrize("name", ["Has Space", "../up", "", "-x", "a" * 65])
def test_names_are_safe_in_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name = "):
        grid(name=name)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"batch_size": 8}, "no 'model' in base, grid or zip.rows"),
        ({"model": "1x16"}, "no 'batch_size' in base, grid or zip.rows"),
        ({"model": "8by64", "batch_size": 8}, "model = '8by64' is neither a shape such as '8x64'"),
        ({"model": "1x1000000000000037", "batch_size": 8}, "is neither a shape such as"),
        ({"model": "clue-5m", "batch_size": 8}, "(none, for there is no models.toml beside"),
        ({"model": 3, "batch_size": 8}, "model = 3 is neither"),
        ({"model": "8x100", "batch_size": 8, "dropout": 1}, "dropout = 1: "),
        ({"model": "8x0", "batch_size": 8}, "d_model = 0: "),
        (
            {"model": "8x64", "batch_size": 8, "feature_dim": 64},
            "feature_dim = 64 does not reduce d_model = 64; valid: at least 1 and below 64",
        ),
        ({"model": {"layers": 1, "width": 2}, "batch_size": 8}, "unknown key 'width'; valid keys"),
        ({"model": "1x16", "batch_size": 8, "negatives": 3}, "negatives = 3 does not divide"),
        ({"model": "1x16", "batch_size": "8"}, "batch_size = '8': "),
        ({"model": "1x16", "batch_size": 8, "items_per_user": 1000}, "items_per_user = 1000: "),
        ({"model": "1x16", "batch_size": 8, "steps": 10}, "evaluations = 20 exceeds steps = 10"),
        ({"model": "1x16", "batch_size": 8, "optim.lr": -1}, "optim.lr = -1: "),
        ({"model": "1x16", "batch_size": 8, "services": ["news"]},
         "services = ['news']; valid: one or more of the services of pretraining of corpus test, "
         "each once: search, shop"),
        ({"model": "1x16", "batch_size": 8, "services": ["shop", "shop"]}, "each once: search"),
        ({"model": "1x16", "batch_size": 8, "services": []}, "services = []; valid: one or more"),
        ({"model": "1x16", "batch_size": 8, "services": 3}, "services = 3; valid: one or more"),
    ],
)  # fmt: skip
def test_a_wrong_point_is_refused_when_planned(base: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as e:
        grid(base=base).runs(card())
    assert message in str(e.value)
    assert str(e.value).startswith("test: ")


def test_a_wrong_point_names_file_row_and_grid_once(tmp_path: Path) -> None:
    rows = "[[zip.rows]]\nbatch_size = 8\n[[zip.rows]]\nbatch_size = 8.5\n"
    path = written(tmp_path, f'[base]\nsteps = 20\n[grid]\nmodel = ["1x16"]\n{rows}')
    with pytest.raises(ConfigError) as e:
        Grid.read(path).runs(card())
    place = f"{path}: zip.rows[1], grid with model = '1x16': "
    assert str(e.value) == f"{place}batch_size = 8.5: Input should be a valid integer"


def test_unknown_sizes_name_those_there_are() -> None:
    sizes = load_sizes(SWEEPS / "models.toml")
    with pytest.raises(SweepError, match=r"clue-5m.*\(clue-4m, clue-8m, .*single-235m\)"):
        grid(base={"model": "clue-5m", "batch_size": 8}, sizes=sizes).runs(card())


def test_a_batch_larger_than_the_users_of_its_fraction_is_refused() -> None:
    sweep = grid(grid={"data_fraction": [1.0, 0.01], "batch_size": [64, 128]})
    message = r"batch_size = 128 exceeds the 100 users of data_fraction = 0\.01 of corpus test"
    with pytest.raises(SweepError, match=message):
        sweep.runs(card())
    fits = grid(grid={"data_fraction": [1.0, 0.01], "batch_size": [64, 100]})
    assert len(fits.runs(card())) == 4


def test_a_malformed_sizes_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text("[a]\nlayers = 1\nd_model = 8\nheads = 3\n")
    with pytest.raises(ConfigError, match=r"models\.toml: a: heads = 3 does not divide"):
        Grid.read(written(tmp_path, ""))


# ---- plan rows ----------------------------------------------------------------------------------


def test_a_plan_row_by_hand() -> None:
    base = {"model": "1x16", "batch_size": 8, "steps": 1000, "items_per_user": 50,
            "data_fraction": 0.5, "negatives": 4, "shuffle": False}  # fmt: skip
    [run] = grid(base=base, seeds=[5]).runs(card())
    d, block = 16, 12 * 16 * 16
    stack = block + 13 * d + 2 * d
    n_total = 1000 * d + (32 + 512) * d + 2 * stack + 2 * d * d + 1
    flops = 6 * n_total * 8 * 1000 * 50
    users = 8 * 1000
    items, items_sq = users * (26 + 10), users * ((2**2 + 50**2) / 2 + 10**2)
    tokens, tokens_sq = items * 6, items * (4**2 + 8**2) / 2
    exact = (
        3 * (2 * block * (tokens + items) + 4 * d * (tokens_sq + items_sq))
        + 12 * d * d * 2 * users
        + 6 * users * 4 * d
    )
    assert run.row == pytest.approx(
        {
            "run_key": run.config.run_key if run.config else None,
            "sweep": "test", "model": "1x16", "layers": 1, "d_model": 16, "heads": 1,
            "feature_dim": None, "n_total": n_total, "n_non_embedding": 2 * stack + 2 * d * d + 1,
            "n_item": stack, "n_service": stack, "batch_size": 8, "negatives": 4,
            "items_per_user": 50, "items_per_user_mean": 18.0, "sequence_length": 50,
            "tokens_per_item_mean": 6.0, "data_fraction": 0.5, "services": None, "shuffle": False,
            "n_users": 5000, "users_seen": 5000, "epochs": 1.6, "repeats": 0.6, "steps": 1000,
            "seed": 5, "lr": 5e-4, "eps": 1e-6, "clip_norm": 0.01, "precision": "fp32",
            "gather": "exact",
            "gather_ranks": None, "distinct_items": False,
            "flops": flops, "flops_exact": exact, "pf_days": flops / 8.64e19,
            "pf_days_exact": exact / 8.64e19,
        }
    )  # fmt: skip


@given(
    n_users=st.integers(8, 60), steps=st.integers(2, 20), seed=st.integers(0, 9),
    shuffle=st.booleans(),
)  # fmt: skip
def test_users_seen_are_those_that_the_batches_hold(
    n_users: int, steps: int, seed: int, shuffle: bool
) -> None:
    base = {"model": "1x16", "batch_size": 8, "steps": steps, "evaluations": 1, "shuffle": shuffle}
    [run] = grid(base=base, seeds=[seed]).runs(card(n_users=n_users))
    met = {int(u) for t in range(steps) for u in step_users(n_users, 8, t, seed, shuffle)}
    if shuffle:  # whoever sits out of one epoch may sit out of the next
        assert len(met) <= run.row["users_seen"] <= min(n_users, 8 * steps)
    else:
        assert run.row["users_seen"] == len(met)


def test_less_than_an_epoch_meets_each_user_once() -> None:
    [run] = grid(base={"model": "1x16", "batch_size": 8, "steps": 100}).runs(card())
    assert run.row["users_seen"] == 800
    assert run.row["epochs"] == pytest.approx(0.08)
    assert run.row["repeats"] == 0


def test_rows_have_the_columns_of_the_plan_and_are_json() -> None:
    rows = [r.row for r in grid(grid={"items_per_user": [2, 4]}).runs(card())]
    for row in rows:
        assert tuple(row) == tuple(PLAN_COLUMNS)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_a_nominal_corpus_is_planned_but_not_keyed() -> None:
    nominal = card(digest=None, pool=None)
    [run] = grid().runs(nominal)
    [real] = grid().runs(card())
    assert run.config is None
    assert run.row == {**real.row, "run_key": None}
    with pytest.raises(SweepError, match="nominal"):
        sweep_id("test", [run])


# ---- identity and the sweep folder --------------------------------------------------------------


def test_an_extended_grid_keeps_its_runs_and_is_another_sweep() -> None:
    small = grid(grid={"items_per_user": [4, 8]}).runs(card())
    large = grid(grid={"items_per_user": [4, 8, 16]}).runs(card())
    keys = [r.row["run_key"] for r in large]
    assert [r.row["run_key"] for r in small] == keys[:2]
    assert sweep_id("test", small) != sweep_id("test", large)
    assert re.fullmatch(r"test-[a-z2-7]{8}", sweep_id("test", small))


def test_a_sweep_s_identity_does_not_depend_on_order_or_wording() -> None:
    one = grid(grid={"items_per_user": [4, 8]}, figure="Fig. 1").runs(card())
    two = grid(zip={"rows": [{"items_per_user": 8}, {"items_per_user": 4}]}).runs(card())
    assert sweep_id("test", one) == sweep_id("test", two)


def test_another_corpus_is_another_sweep() -> None:
    one, two = grid().runs(card()), grid().runs(card(digest="b" * 16))
    assert sweep_id("test", one) != sweep_id("test", two)


def test_the_sweep_folder_holds_definition_and_plan(tmp_path: Path) -> None:
    sweep = grid(grid={"items_per_user": [4, 8]})
    runs = sweep.runs(card())
    folder = write_sweep(tmp_path, sweep, card(), runs)
    assert folder == tmp_path / "sweeps" / sweep_id("test", runs)
    plan = json.loads((folder / "plan.json").read_text())
    assert set(plan) == {
        "schema_version", "sweep", "sweep_id", "figure", "source", "corpus", "corpus_digest",
        "runs",
    }  # fmt: skip
    assert plan["schema_version"] == 1
    assert plan["sweep_id"] == folder.name
    assert (plan["corpus"], plan["corpus_digest"]) == ("test", DIGEST)
    assert plan["runs"] == [r.row for r in runs]
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert write_sweep(tmp_path, sweep, card(), runs) == folder
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["1x16", "2x64", {"layers": 3, "d_model": 8, "heads": 2}]),
    "dropout": st.floats(0, 0.5),
    "feature_dim": st.integers(1, 7),
    "steps": st.integers(20, 10**6),
    "items_per_user": st.integers(1, 512),
    "data_fraction": st.floats(0.1, 1),
    "shuffle": st.booleans(),
    "optim.lr": st.floats(1e-9, 1),
    "optim.betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(list),
}
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30)


@given(
    rows=st.lists(st.fixed_dictionaries({}, optional=VALUES), max_size=3),
    seeds=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3),
    figure=TEXT,
    source=TEXT,
)
def test_the_definition_written_is_the_definition_read(
    rows: list[dict[str, Any]], seeds: list[int], figure: str, source: str
) -> None:
    sweep = grid(zip={"rows": rows}, seeds=seeds, figure=figure, source=source)
    back = Grid.parse(tomllib.loads(sweep.to_toml()), "written")
    assert back.runs(card()) == sweep.runs(card())
    assert (back.figure, back.source) == (figure, source)


def test_the_definition_written_has_the_sizes_it_uses(tmp_path: Path) -> None:
    sweep = Grid.read(SWEEPS / "best.toml")
    (tmp_path / "sweep.toml").write_text(sweep.to_toml())
    back = Grid.read(tmp_path / "sweep.toml")
    assert list(back.sizes) == ["table8"]
    nominal = card(vocab_size=50_257, n_users=11_294_122, digest=None, pool=None)
    assert back.runs(nominal) == sweep.runs(nominal)
    assert back.corpus == (SWEEPS / "corpora" / "paper.toml").absolute()


# ---- the studies shipped ------------------------------------------------------------------------


def rows_of(name: str, tmp_path: Path) -> list[dict[str, Any]]:
    sweep = Grid.read(SWEEPS / f"{name}.toml")
    return [r.row for r in sweep.runs(read_card(sweep.corpus, tmp_path))]


def test_figure_2_crosses_model_size_with_batch_and_with_items(tmp_path: Path) -> None:
    rows = rows_of("scale_factors", tmp_path)
    left = {(r["model"], r["batch_size"]) for r in rows if r["items_per_user"] == 128}
    right = {(r["model"], r["items_per_user"]) for r in rows if r["batch_size"] == 256}
    assert left == set(itertools.product(PUBLISHED, [64, 128, 256, 512]))
    assert right == set(itertools.product(PUBLISHED, [16, 32, 64, 128, 256, 512]))
    assert len(rows) == len(left) + len(right) - len(PUBLISHED) == 63
    assert {r["steps"] for r in rows} == {100_000}
    assert {r["data_fraction"] for r in rows} == {1.0}


def test_figure_3_varies_users_with_and_without_shuffling(tmp_path: Path) -> None:
    rows = rows_of("data_fraction", tmp_path)
    fractions = [0.01, 0.03, 0.1, 0.3, 1.0]
    assert [(r["shuffle"], r["data_fraction"]) for r in rows] == [
        *itertools.product([True, False], fractions)
    ]
    fixed = {(r["model"], r["items_per_user"], r["batch_size"], r["steps"]) for r in rows}
    assert fixed == {("clue-160m", 128, 256, 100_000)}
    assert rows[2]["n_users"] == 1_129_412
    assert rows[0]["epochs"] == pytest.approx(256e5 / 112_941)


def test_figure_4_spans_every_size_and_four_decades_of_compute(tmp_path: Path) -> None:
    rows = rows_of("compute", tmp_path)
    assert {r["model"] for r in rows} == set(PUBLISHED)
    assert {r["steps"] for r in rows} == {100_000}
    days = [r["pf_days"] for r in rows]
    assert max(days) / min(days) > 1e4


def test_table_8_is_eight_epochs_at_batch_256(tmp_path: Path) -> None:
    [row] = rows_of("best", tmp_path)
    assert row["n_total"] == 137_298_961
    assert (row["batch_size"], row["items_per_user"], row["steps"]) == (256, 512, 352_941)
    assert row["steps"] == 8 * 11_294_122 // 256
    assert row["epochs"] == pytest.approx(8, abs=1e-4)
    assert row["pf_days"] == pytest.approx(0.4411, abs=1e-4)


@pytest.mark.parametrize("name", ["scale_factors", "data_fraction", "compute", "best"])
def test_headers_and_the_table_in_the_readme_say_what_the_plan_says(
    name: str, tmp_path: Path
) -> None:
    rows = rows_of(name, tmp_path)
    told = [f"{sum(r[c] for r in rows):.3f}" for c in ("pf_days", "pf_days_exact")]
    header = (SWEEPS / f"{name}.toml").read_text().split("\n\n")[0].replace("\n# ", " ")
    assert f"Runs: {len(rows)}; PF-days: {told[0]} (paper's formula), {told[1]} (exact)." in header
    assert f"clue-scaling plan sweeps/{name}.toml" in header
    assert "Source: " in header
    line = f"({name}.toml) | {len(rows)} | {told[0]} | {told[1]} |"
    assert line in (SWEEPS / "README.md").read_text()


def test_every_sweep_file_is_in_the_readme_with_its_runs() -> None:
    """Sweeps on corpora that have to be prepared first are planned on any card of their size."""
    readme = (SWEEPS / "README.md").read_text()
    for path in sorted(SWEEPS.glob("*.toml")):
        if path.name == "models.toml":
            continue
        sweep = Grid.read(path)
        assert sweep.name == path.stem
        assert (path.parent / sweep.corpus).exists() or sweep.corpus.exists()
        vocabulary = 50_257 if sweep.corpus.name == "paper.toml" else 1000
        lengths = card().items_per_user["shop"]
        services = read_corpus_file(sweep.corpus).services
        runs = sweep.runs(
            card(
                services=services, items_per_user=dict.fromkeys(services, lengths),
                vocab_size=vocabulary, n_users=11_294_122,
            )
        )  # fmt: skip
        assert f"]({path.name}) | {len(runs)} |" in readme


def test_figures_2_to_4_share_runs(tmp_path: Path) -> None:
    keys = {}
    for name in ("scale_factors", "data_fraction", "compute"):
        sweep = Grid.read(SWEEPS / f"{name}.toml")
        pool = PoolConfig(size=1024, digest=DIGEST)
        logs = read_card(sweep.corpus, tmp_path).model_copy(update={"digest": DIGEST, "pool": pool})
        keys[name] = {r.row["run_key"] for r in sweep.runs(logs)}
    assert len(keys["scale_factors"] & keys["compute"]) == 7
    assert len(keys["scale_factors"] & keys["data_fraction"] & keys["compute"]) == 1
