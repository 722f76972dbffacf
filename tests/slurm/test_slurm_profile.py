"""Cluster profiles: the shipped ones, their documentation, and what is refused."""

from pathlib import Path

import pytest

from scaling.config import ConfigError, RunConfig, read_toml
from scaling.slurm.doctor import doctor
from scaling.slurm.profile import ClusterProfile, Shape, ShapeRule

FOLDER = Path(__file__).parents[2] / "slurm"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda p: p.name)
def test_shipped_profiles_are_valid(path):
    profile = ClusterProfile.read(path)
    assert profile.name == path.stem.removeprefix("example_")


def test_the_documented_example_has_every_key():
    given = read_toml(FOLDER / "example_v100.toml")
    assert set(given) == set(ClusterProfile.model_fields)
    assert set(given["shape"]) == set(Shape.model_fields)
    assert set(given["larger"][0]) <= set(ShapeRule.model_fields)
    assert set(given["train"]) == set(ClusterProfile.model_fields["train"].annotation.model_fields)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"partitions": "a"}, "unknown key 'partitions'; valid keys: account, array_size"),
        ({"shape": {"gpus": 1}}, "unknown key 'shape.gpus'; valid keys: cpus_per_task"),
        ({"executor": "local", "partition": "a"}, "executor = 'local' has no partition"),
        ({"executor": "local", "setup": ["true"]}, "executor = 'local' has no setup"),
        ({"executor": "local", "shape": {"nodes": 2}}, "one node"),
        (
            {"executor": "local", "shape": {"gpus_per_node": 1}, "max_parallel": 2},
            "set max_parallel = 1",
        ),
        ({"shape": {"time_min": 5}}, "leaves nothing before the signal"),
        ({"larger": [{"time_min": 5}]}, "leaves nothing before the signal"),
        ({"shape": {"mem_gb": float("nan")}}, "mem_gb"),
        ({"partition": "gpu\n"}, "partition"),
        ({"train": {"zero_stage": 3}}, "train.zero_stage"),
    ],
)
def test_what_is_refused(keys, message):
    with pytest.raises(ConfigError) as e:
        ClusterProfile.parse({"name": "x", **keys}, "mine.toml")
    assert message in str(e.value)
    assert "mine.toml" in str(e.value)


def test_the_last_rule_that_holds_gives_the_shape(make_runs):
    (run,) = make_runs(1)
    config = run.spec()  # batch size 8, width 64
    rules = (
        ShapeRule(batch_size_from=8, nodes=2),
        ShapeRule(d_model_from=64, nodes=4),
        ShapeRule(d_model_from=65, nodes=8),
    )
    assert ClusterProfile(name="x", larger=rules).shape_of(config) == Shape(nodes=4)
    assert ClusterProfile(name="x", larger=rules[2:]).shape_of(config) == Shape()


def test_doctor_on_a_cluster_that_can_do_little(tmp_path, fake_slurm, slurm_profile):
    fake_slurm.fault(sacct="off", max_array_size=1)
    found = {f.check: f for f in doctor(tmp_path / "root", slurm_profile)}
    assert found["exclusive link"].level == found["atomic rename"].level == "ok"
    assert found["MaxArraySize"].level == "warning"
    assert found["accounting"].level == "warning"
    assert all(f.advice for f in found.values() if f.level != "ok")
    assert list((tmp_path / "root").iterdir()) == []
    fake_slurm.fault(scontrol="down")
    assert doctor(tmp_path, slurm_profile)[-1].level == "problem"


def test_doctor_without_slurm(tmp_path, slurm_profile, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch" in doctor(tmp_path, slurm_profile)[-1].found


def test_doctor_names_a_root_that_cannot_be(tmp_path, slurm_profile):
    (tmp_path / "file").touch()
    local = ClusterProfile(name="x", executor="local")
    problems = [f for f in doctor(tmp_path / "file" / "root", local) if f.level == "problem"]
    assert [f.check for f in problems] == ["root folder"]
    assert problems[0].found.startswith("not writable")
    assert doctor(tmp_path / "a b", local)[0].level == "problem"


def test_a_run_for_another_number_of_ranks_is_refused_before_it_is_queued():
    config = RunConfig.model_validate(
        {
            "model": {"layers": 1, "d_model": 8, "heads": 1},
            "data": {"corpus_digest": "a" * 16, "vocab_size": 300},
            "batch_size": 16,
            "negatives": 16,
            "gather": "local",
            "gather_ranks": 4,
            "pool": {"size": 8, "digest": "a" * 16},
        }
    )
    profile = ClusterProfile(name="two", shape=Shape(tasks_per_node=2))
    with pytest.raises(ConfigError, match="gather_ranks = 4, and profile 'two' starts 2 ranks"):
        profile.shape_of(config)
    assert ClusterProfile(name="four", shape=Shape(tasks_per_node=4)).shape_of(config)
