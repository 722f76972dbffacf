"""Identity of runs and what a wrong configuration is answered with."""

import base64
import hashlib
import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling.config import (
    ADDED,
    ConfigError,
    ModelConfig,
    RunConfig,
    TrainSettings,
    canonical_json,
    read_toml,
    short_digest,
    users_in_fraction,
)

DIGEST = "abcdefghijklmnop"
MINIMAL: dict[str, Any] = {
    "model": {"layers": 8, "d_model": 64, "heads": 1},
    "data": {"corpus_digest": DIGEST, "vocab_size": 50257},
    "batch_size": 256,
    "negatives": 256,
    "pool": {"size": 1024, "digest": DIGEST},
}
# Written by hand: what the run key is the digest of.
CANONICAL = (
    '{"batch_size":256,"data":{"corpus_digest":"abcdefghijklmnop","data_fraction":1.0,'
    '"items_per_user":128,"n_services":2,"shuffle":true,"vocab_size":50257},"evaluations":20,'
    '"model":{"d_model":64,"dropout":0.1,"heads":1,"layers":8,"system":"clue"},"negatives":256,'
    '"optim":{"betas":[0.9,0.98],"clip_norm":0.01,"eps":1e-06,"final_lr":0.1,"lr":0.0005,'
    '"warmup":0.01,"weight_decay":0.1},"pool":{"digest":"abcdefghijklmnop","size":1024},'
    '"precision":"fp32","schema_version":1,"seed":0,"steps":100000}'
)


def configured(**changes: Any) -> dict[str, Any]:
    """MINIMAL with changes; a dotted key changes a part: ``data__shuffle=False``."""
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in MINIMAL.items()}
    for key, value in changes.items():
        *parts, last = key.split("__")
        target = config
        for part in parts:
            target = target.setdefault(part, {})
        target[last] = value
    return config


def parsed(**changes: Any) -> RunConfig:
    return RunConfig.parse(configured(**changes), "x.toml")


# ---- run keys -----------------------------------------------------------------------------------


def test_run_key_is_the_digest_of_the_canonical_json() -> None:
    digest = hashlib.sha256(CANONICAL.encode()).digest()
    assert parsed().run_key == base64.b32encode(digest)[:16].decode().lower()


@pytest.mark.parametrize(
    ("changes", "before", "written"),
    [
        (
            {"model__feature_dim": 16},
            '"dropout":0.1,"heads"', '"dropout":0.1,"feature_dim":16,"heads"',
        ),
        ({"distinct_items": True}, '"evaluations"', '"distinct_items":true,"evaluations"'),
    ],
)  # fmt: skip
def test_a_later_field_is_part_of_the_key_where_it_is_set(
    changes: dict[str, Any], before: str, written: str
) -> None:
    assert CANONICAL.count(before) == 1
    digest = hashlib.sha256(CANONICAL.replace(before, written).encode()).digest()
    assert parsed(**changes).run_key == base64.b32encode(digest)[:16].decode().lower()


def test_later_fields_lie_where_the_configuration_has_them_with_the_value_of_the_first_runs() -> (
    None
):
    full = parsed().model_dump(mode="json")
    for name, before in ADDED.items():
        *parts, field = name.split(".")
        owner: Any = full
        for part in parts:
            owner = owner[part]
        assert owner[field] == before == DEFAULTS[name.replace(".", "__")]


def test_the_configuration_of_an_earlier_version_has_the_same_key() -> None:
    """As ``spec.json`` of a run holds it that began before any later field was there."""
    before = RunConfig.parse(json.loads(CANONICAL), "spec.json")
    assert before == parsed()
    assert before.run_key == parsed().run_key


@pytest.mark.parametrize(
    ("changes", "run_key"),
    [
        ({}, "xwv2zdmdafs3fu4n"),
        ({"seed": 1}, "jwy7vubylpymvvix"),
        ({"model__layers": 10, "model__d_model": 720, "model__heads": 6}, "hw4rpbx5jifshevt"),
        ({"data__shuffle": False, "data__data_fraction": 0.01}, "ubsessqevykdz4b2"),
        ({"optim__lr": 1e-3, "precision": "bf16"}, "3mz6rouvy7hhhz5r"),
    ],
)
def test_golden_run_keys(changes: dict[str, Any], run_key: str) -> None:
    """If this fails, every run on every disk has lost its name."""
    assert parsed(**changes).run_key == run_key


DEFAULTS = {
    "schema_version": 1,
    "steps": 100_000,
    "evaluations": 20,
    "precision": "fp32",
    "gather": "exact",
    "gather_ranks": None,
    "distinct_items": False,
    "seed": 0,
    "model__system": "clue",
    "model__dropout": 0.1,
    "model__feature_dim": None,
    "data__n_services": 2,
    "data__services": None,
    "data__data_fraction": 1.0,
    "data__items_per_user": 128,
    "data__shuffle": True,
    "optim__lr": 5e-4,
    "optim__betas": [0.9, 0.98],
    "optim__eps": 1e-6,
    "optim__weight_decay": 0.1,
    "optim__warmup": 0.01,
    "optim__final_lr": 0.1,
    "optim__clip_norm": 0.01,
}


def test_defaults_are_all_listed_here() -> None:
    full = parsed().model_dump(mode="json")
    flat = {
        f"{k}__{kk}" if isinstance(v, dict) else k: vv
        for k, v in full.items()
        for kk, vv in (v.items() if isinstance(v, dict) else [("", v)])
    }
    required = {
        "model__layers", "model__d_model", "model__heads", "data__corpus_digest",
        "data__vocab_size", "batch_size", "negatives", "pool__size", "pool__digest",
    }  # fmt: skip
    assert {k: v for k, v in flat.items() if k not in required} == DEFAULTS


@given(spelled=st.sets(st.sampled_from(sorted(DEFAULTS))), data=st.data())
def test_a_default_spelled_out_gives_the_same_key(spelled: set[str], data: st.DataObject) -> None:
    order = data.draw(st.permutations(sorted(spelled)))
    assert parsed(**{k: DEFAULTS[k] for k in order}).run_key == parsed().run_key


@pytest.mark.parametrize(
    "change",
    [
        {"model__system": "single"}, {"model__layers": 7}, {"model__d_model": 65},
        {"model__heads": 2}, {"model__dropout": 0.0}, {"model__feature_dim": 63},
        {"data__corpus_digest": "b" * 16},
        {"data__vocab_size": 8192}, {"data__n_services": 3}, {"data__data_fraction": 0.1},
        {"data__services": ["a", "b"]}, {"data__services": ["b", "a"]},
        {"data__items_per_user": 64}, {"data__shuffle": False}, {"negatives": 128},
        {"batch_size": 512}, {"steps": 99_999}, {"evaluations": 10}, {"precision": "bf16"},
        {"seed": 1}, {"pool__size": 512}, {"pool__digest": "b" * 16}, {"optim__lr": 1e-3},
        {"optim__betas": [0.9, 0.999]}, {"optim__eps": 1e-8}, {"optim__weight_decay": 0.0},
        {"optim__warmup": 0.0}, {"optim__final_lr": 1.0}, {"optim__clip_norm": 1.0},
        {"gather": "local", "gather_ranks": 4}, {"distinct_items": True},
    ],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_every_setting_is_part_of_the_key(change: dict[str, Any]) -> None:
    assert parsed(**change).run_key != parsed().run_key


def test_whole_floats_and_ints_are_one_run() -> None:
    assert parsed(data__data_fraction=1).run_key == parsed(data__data_fraction=1.0).run_key


def test_how_a_run_is_executed_is_not_part_of_it() -> None:
    assert not set(TrainSettings.model_fields) & set(RunConfig.model_fields)


def test_a_config_read_back_from_json_is_the_same() -> None:
    config = parsed(optim__lr=1e-3)
    assert RunConfig.parse(config.model_dump(mode="json"), "spec.json") == config


def test_digests_are_80_bits_in_base_32() -> None:
    digest = short_digest(b"")
    assert base64.b32decode(digest.upper()) == hashlib.sha256(b"").digest()[:10]


def test_canonical_json_refuses_nan_and_escapes_the_rest() -> None:
    assert canonical_json({"b": "ä", "a": [1, 0.5]}) == b'{"a":[1,0.5],"b":"\\u00e4"}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"x": float("nan")})


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batchsize": 1}, "x.toml: unknown key 'batchsize'; valid keys: batch_size, data, "),
        (
            {"optim__beta": 1},
            "x.toml: unknown key 'optim.beta'; valid keys: betas, clip_norm, eps, final_lr, lr, "
            "warmup, weight_decay",
        ),
        (
            {"model__width": 1},
            "'model.width'; valid keys: d_model, dropout, feature_dim, heads, layers, system",
        ),
        ({"batch_size": "256"}, "batch_size = '256': "),
        ({"batch_size": 256.0}, "batch_size = 256.0: "),
        ({"model__layers": True}, "model.layers = True: "),
        ({"data__shuffle": 1}, "data.shuffle = 1: "),
        ({"data__services": ["a"]}, "n_services = 2, but services = ('a',)"),
        ({"data__services": []}, "data.services = []: "),
        ({"data__services": ["../a", "b"]}, "'../a'"),
        ({"optim__lr": "1e-3"}, "optim.lr = '1e-3': "),
        ({"optim__lr": float("nan")}, "optim.lr = nan: "),
        ({"optim__lr": 0}, "optim.lr = 0: "),
        ({"steps": float("inf")}, "steps = inf: "),
        ({"precision": "tf32"}, "precision = 'tf32': Input should be 'fp32', 'bf16' or 'fp16'"),
        (
            {"gather": "all"},
            "gather = 'all': Input should be 'exact', 'detached', 'local' or 'none'",
        ),
        (
            {"gather": "local"},
            "gather = 'local' with gather_ranks = None: give the number of ranks",
        ),
        ({"gather_ranks": 2}, "gather = 'exact' with gather_ranks = 2: give the number of ranks"),
        ({"gather": "detached", "gather_ranks": 3}, "gather_ranks = 3 does not divide batch_size"),
        ({"gather": "none", "gather_ranks": 2}, "negatives = 256 does not divide the 128 users"),
        ({"data__data_fraction": 0}, "data.data_fraction = 0: "),
        ({"data__data_fraction": 1.1}, "data.data_fraction = 1.1: "),
        ({"data__items_per_user": 513}, "data.items_per_user = 513: "),
        ({"data__corpus_digest": "../x"}, "data.corpus_digest = '../x': "),
        ({"negatives": 100}, "negatives = 100 does not divide batch_size = 256"),
        ({"model__heads": 3}, "model: heads = 3 does not divide d_model = 64"),
        ({"model__feature_dim": 0}, "model.feature_dim = 0: Input should be greater than 0"),
        ({"model__feature_dim": 16.0}, "model.feature_dim = 16.0: "),
        (
            {"model__feature_dim": 64},
            "model: feature_dim = 64 does not reduce d_model = 64; valid: at least 1 and below 64",
        ),
        ({"steps": 10}, "evaluations = 20 exceeds steps = 10"),
        ({"schema_version": 2}, "schema_version = 2: "),
        ({"model": 3}, "model = 3: "),
    ],
    ids=str,
)
def test_errors_name_file_key_value_and_what_is_valid(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as e:
        parsed(**changes)
    assert str(e.value).startswith("x.toml: ")
    assert message in str(e.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as e:
        parsed(model__layers=0, batch_size=1, nonsense=3)
    assert len(str(e.value).splitlines()) == 3


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"x\.toml: key 'model' is missing"):
        RunConfig.parse({k: v for k, v in MINIMAL.items() if k != "model"}, "x.toml")


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parsed().steps = 1


def test_toml_errors_name_the_file_and_the_place(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml: no such file"):
        read_toml(tmp_path / "missing.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("a = 1\nb = [1,\nc = 2\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML: .*line 3"):
        read_toml(bad)
    bad.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML"):
        read_toml(bad)


# ---- derived numbers ----------------------------------------------------------------------------


@given(n_users=st.integers(1, 10**9), thousandths=st.integers(1, 10_000))
def test_a_fraction_is_exact_at_any_number_of_users(n_users: int, thousandths: int) -> None:
    assert users_in_fraction(n_users, thousandths / 10_000) == n_users * thousandths // 10_000


@given(st.integers(1, 10**9), st.floats(1e-9, 1), st.floats(1e-9, 1))
def test_fractions_are_nested(n_users: int, a: float, b: float) -> None:
    small, large = sorted((a, b))
    assert users_in_fraction(n_users, small) <= users_in_fraction(n_users, large) <= n_users


def test_the_paper_s_fractions() -> None:
    assert users_in_fraction(11_294_122, 0.1) == 1_129_412  # "only 1,130,000 users"
    assert users_in_fraction(11_294_122, 1.0) == 11_294_122


@given(steps=st.integers(1, 10**6), evaluations=st.integers(1, 100))
def test_evaluations_are_evenly_spaced_and_end_at_the_last_step(
    steps: int, evaluations: int
) -> None:
    if evaluations > steps:
        return
    at = parsed(steps=steps, evaluations=evaluations).evaluation_steps
    assert len(set(at)) == evaluations
    assert at[-1] == steps
    assert all(abs(Fraction(s) - Fraction(steps * (i + 1), evaluations)) < 1
               for i, s in enumerate(at))  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 128),
        ({"data__items_per_user": 512}, 512),
        ({"model__system": "single"}, 2048),
        ({"model__system": "single", "data__items_per_user": 10}, 320),
    ],
)
def test_sequence_length_counts_items_and_tokens_for_a_single_transformer(
    changes: dict[str, Any], length: int
) -> None:
    assert parsed(**changes).sequence_length == length


def test_shapes_name_models() -> None:
    assert ModelConfig(layers=8, d_model=64, heads=1).shape == "8x64"
    assert ModelConfig(system="single", layers=2, d_model=32, heads=1).shape == "single-2x32"
    assert ModelConfig(layers=8, d_model=64, heads=1, feature_dim=32).shape == "8x64-f32"


def test_features_have_the_width_they_are_reduced_to() -> None:
    assert ModelConfig(layers=10, d_model=720, heads=6).feature_width == 720
    assert ModelConfig(layers=10, d_model=720, heads=6, feature_dim=100).feature_width == 100
