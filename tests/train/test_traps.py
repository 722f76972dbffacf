"""Known ways to get the training of a contrastive encoder silently wrong, one test each.

The name of a test is the trap; it fails where the trap is fallen into.
"""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_loop import StopAt, configure, curve, parameters
from torch import Tensor, nn

from scaling.config import ModelConfig, RunConfig, TrainSettings
from scaling.data.batches import Batches
from scaling.models import build, clue, transformer
from scaling.models.losses import contrastive_loss, logits, scale
from scaling.packing import PackedBatch
from scaling.rundir import RunDir
from scaling.train import engine as engines
from scaling.train.contrast import contrast
from scaling.train.engine import (
    create_optimizer_state,
    damping,
    fp32_logit_scale,
    master,
    start_engine,
    update,
)
from scaling.train.loop import learning_rate, train
from scaling.train.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
USERS, WIDTH = 16, 5
MODES = ("exact", "detached", "local", "none")


@pytest.fixture(autouse=True)
def one_thread():
    """Of small matrices, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fp64(monkeypatch):
    """Losses insist on fp32 by ``.float()``; here it is fp64, so that 1e-12 can be asked for."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def start(corpus):
    """Start a real engine on the small model: ``start(stage, model=None, **changes of the run)``;
    returns it with the run's configuration."""
    engine = None

    def make(stage, model=None, **changes):
        nonlocal engine
        ranks, config = Ranks.join(), configure(corpus, **changes)
        model = model or build(config.model, config.data.vocab_size, config.seed)
        engine = start_engine(model, config, TrainSettings(zero_stage=stage), ranks)
        create_optimizer_state(engine, 0)
        return engine, config

    yield make
    if engine is not None:
        engine.destroy()


# ---- the clip and Adam's eps --------------------------------------------------------------------


def test_a_clip_of_a_hundredth_fires_at_every_step_and_is_counted(corpus, tmp_path):
    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    result = train(run, corpus, TrainSettings(threads=1))
    assert min(r["grad_norm"] for r in run.curve("train")) > 0.01
    assert result["clipped_steps"] == 24


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_clipped_adam_sees_the_direction_of_a_gradient_alone(start, stage):
    """Gradients a thousand times larger, where both are clipped, make the same step."""
    moved = []
    for factor in (1.0, 1000.0):
        engine, _ = start(stage)
        torch.manual_seed(0)
        weights = [torch.randn_like(p) for p in engine.module.parameters()]
        for _ in range(3):
            products = [
                (w * p).sum() for w, p in zip(weights, engine.module.parameters(), strict=True)
            ]
            engine.backward(factor * torch.stack(products).sum())
            norm, taken = update(engine, 1e-2)
            assert taken
            unclipped = torch.cat([w.flatten() for w in weights]).norm()
            assert norm == pytest.approx(factor * float(unclipped), rel=1e-5)
        moved.append({n: master(engine, p) for n, p in engine.module.named_parameters()})
        first = next(iter(engine.module.parameters()))
        clipped = weights[0] * 0.01 / unclipped
        after = (1 - 0.9**3) * clipped
        assert torch.allclose(master(engine, first, "exp_avg"), after, rtol=1e-4, atol=1e-12)
        engine.destroy()
    for name, value in moved[0].items():
        assert torch.allclose(value, moved[1][name], rtol=1e-5, atol=1e-7), name


def expected_damping(moments: list[Tensor], beta2: float, eps: float, step: int) -> np.ndarray:
    """Quantiles .1 and .5 of sqrt(v) / (sqrt(v) + eps), in numpy and fp64."""
    v = np.concatenate([m.double().numpy().ravel() for m in moments]) / (1 - beta2**step)
    return np.quantile(np.sqrt(v) / (np.sqrt(v) + eps), [0.1, 0.5])


@pytest.mark.parametrize("eps", [1e-6, 1e-8])
@pytest.mark.parametrize("steps", [1, 3, 40])
def test_eps_of_the_size_of_clipped_gradients_shortens_the_steps_by_the_logged_damping(
    corpus, eps, steps
):
    """Against torch's own AdamW: v without its bias, quantiles over all but the tables."""
    config = configure(corpus, optim={"eps": eps})
    model = build(config.model, config.data.vocab_size, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=eps)
    torch.manual_seed(0)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    counted = [
        optimizer.state[p]["exp_avg_sq"]
        for n, p in model.named_parameters()
        if n not in {"token_emb.weight", "item.position_emb.weight", "service.position_emb.weight"}
    ]
    shim = SimpleNamespace(module=model, optimizer=optimizer)
    found = damping(shim, config, steps)
    expected = expected_damping(counted, 0.98, eps, steps)
    assert [found["damping_p10"], found["damping"]] == pytest.approx(expected, rel=1e-4)
    total = sum(p.numel() for p in model.parameters())
    rms = 0.01 / math.sqrt(total)
    if steps == 40:  # all elements have about the same gradient here
        assert found["damping"] == pytest.approx(rms / (rms + eps), rel=0.01)


@pytest.mark.parametrize(
    ("n_total", "expected"), [(4e6, 0.83), (15e6, 0.72), (136e6, 0.46), (160e6, 0.44), (1e9, 0.24)]
)
def test_eps_shortens_the_steps_of_large_models_more(corpus, n_total, expected):
    """A clipped gradient spread evenly over N parameters has elements of .01 / sqrt(N): the damping
    falls with N, which a scaling law must not take for a property of N."""
    config = configure(corpus)
    model = build(config.model, config.data.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        v = torch.full_like(p, (0.01 / math.sqrt(n_total)) ** 2)
        optimizer.state[p] = {"exp_avg_sq": v * (1 - 0.98**7)}
    found = damping(SimpleNamespace(module=model, optimizer=optimizer), config, 7)
    assert found["damping"] == pytest.approx(expected, abs=0.006)
    assert found["damping_p10"] == pytest.approx(found["damping"], rel=1e-4)


def test_the_damping_of_large_models_is_that_of_a_sample(corpus, monkeypatch):
    monkeypatch.setattr(engines, "DAMPING_SAMPLE", 20_000)
    config = configure(corpus, model=ModelConfig(layers=2, d_model=64, heads=2, dropout=0.0))
    model = build(config.model, config.data.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(0)
    counted = []
    for name, p in model.named_parameters():
        size = 1e-11 if p.ndim == 2 else 1e-8  # so that small ones must not count for more
        optimizer.state[p] = {"exp_avg_sq": torch.rand_like(p) ** 4 * size}
        if not name.endswith("_emb.weight"):
            counted.append(optimizer.state[p]["exp_avg_sq"])
    found = damping(SimpleNamespace(module=model, optimizer=optimizer), config, 9)
    assert sum(v.numel() for v in counted) > 100_000
    expected = expected_damping(counted, 0.98, 1e-6, 9)
    assert [found["damping_p10"], found["damping"]] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_damping_of_partitioned_moments_is_that_of_plain_ones(corpus, tmp_path, stage):
    seen = []
    for zero in (0, stage):
        run = RunDir.create(tmp_path / str(zero), configure(corpus), "tiny")
        train(run, corpus, TrainSettings(zero_stage=zero, threads=1))
        seen.append(run.curve("pool"))
    assert all(0 < r["damping_p10"] < r["damping"] < 1 for r in seen[0])
    for name in ("damping", "damping_p10"):
        plain, partitioned = ([r[name] for r in rows] for rows in seen)
        assert partitioned == pytest.approx(plain, rel=1e-3)


# ---- gradients across ranks ---------------------------------------------------------------------


class Exchange:
    """Where threads that play ranks leave a value and take everyone's."""

    def __init__(self, world_size: int) -> None:
        self.held: list[Tensor] = [torch.empty(0)] * world_size
        self.barrier = threading.Barrier(world_size, timeout=60)

    def __call__(self, rank: int, value: Tensor) -> list[Tensor]:
        self.held[rank] = value.detach().clone()
        self.barrier.wait()
        everyone = list(self.held)
        self.barrier.wait()
        return everyone


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Ranks that are threads of one process."""

    exchange: Callable[[int, Tensor], list[Tensor]] = lambda _, value: [value]

    def gather(self, local: Tensor, dim: int) -> Tensor:
        return torch.cat(self.exchange(self.rank, local), dim)

    def sum(self, local: Tensor) -> Tensor:
        return torch.stack(self.exchange(self.rank, local)).sum(0)


def planned(gather: str, world_size: int, negatives: int = USERS) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": ModelConfig(layers=1, d_model=8, heads=1),
            "data": {"corpus_digest": "a" * 16, "vocab_size": 99},
            "batch_size": USERS,
            "negatives": negatives,
            "pool": {"size": 9, "digest": "a" * 16},
            "gather": gather,
            "gather_ranks": None if gather == "exact" else world_size,
        }
    )


def toy() -> tuple[nn.Module, nn.Parameter, Tensor]:
    """A small encoder, its logit scale, and users of two services that it cannot tell apart yet."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, WIDTH)).double()
    for p in model.parameters():
        p.data = 0.3 * draw(p.shape)
    users = draw((1, USERS, 6)) + 0.7 * draw((2, USERS, 6))
    return model, nn.Parameter(torch.tensor([math.log(5.0)], dtype=torch.float64)), users


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def step_of_a_rank(ranks: Ranks, config: RunConfig) -> dict[str, Tensor]:
    """Loss and gradients as a data-parallel engine has them: averaged over ranks."""
    model, tau, users = toy()
    share = USERS // ranks.world_size
    own = model(users[:, ranks.rank * share : (ranks.rank + 1) * share])
    found = contrast(own, tau.detach(), config, ranks)
    found.surrogate(own, tau).backward()
    return {
        "loss": found.loss.reshape(1),
        "encoder": ranks.sum(flat(model)) / ranks.world_size,
        "logit_scale": ranks.sum(tau.grad) / ranks.world_size,
    }


def step_of_all(config: RunConfig, world_size: int) -> dict[str, Tensor]:
    """The same of threads; asserted to be the same on every one."""
    exchange = Exchange(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        steps = list(
            pool.map(
                lambda r: step_of_a_rank(
                    ThreadRanks(r, world_size, torch.device("cpu"), exchange), config
                ),
                range(world_size),
            )
        )
    for step in steps[1:]:
        assert all(torch.equal(v, steps[0][k]) for k, v in step.items())
    return steps[0]


def step_of_one(loss_of: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """Plain autograd on the whole batch in one process."""
    model, tau, users = toy()
    loss = loss_of(model(users), tau)
    loss.backward()
    return {"loss": loss.detach().reshape(1), "encoder": flat(model), "logit_scale": tau.grad}


def whole_batch(negatives: int = USERS) -> dict[str, Tensor]:
    return step_of_one(lambda z, tau: contrastive_loss(z, tau, negatives))


def anchors_only(negatives: int = USERS) -> dict[str, Tensor]:
    """Gradients of users as anchors only: whom they are compared with is a constant."""

    def loss(z, tau):
        unit = F.normalize(z, dim=-1)
        losses = []
        for a, b in ((0, 1), (1, 0)):
            for u in range(USERS):
                first = u // negatives * negatives
                candidates = unit[b, first : first + negatives].detach()
                scores = tau.exp() * (candidates @ unit[a, u])
                losses.append(torch.logsumexp(scores, 0) - scores[u - first])
        return torch.stack(losses).mean()

    return step_of_one(loss)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.allclose(v, b[k], rtol=1e-12, atol=1e-14) for k, v in a.items())


def compared(found: dict[str, Tensor], full: dict[str, Tensor]) -> tuple[float, float, float]:
    """Cosine and ratio of norms of the encoder's gradient; ratio of the logit scale's."""
    a, b = found["encoder"], full["encoder"]
    ratio = found["logit_scale"] / full["logit_scale"]
    return float(F.cosine_similarity(a, b, dim=0)), float(a.norm() / b.norm()), float(ratio)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("negatives", [4, 8, 16])
def test_gather_exact_is_the_whole_batch_in_one_process_and_not_a_share_of_it(
    fp64, world_size, negatives
):
    found = step_of_all(planned("exact", world_size, negatives), world_size)
    assert same(found, whole_batch(negatives))
    assert compared(found, whole_batch(negatives)) == pytest.approx((1, 1, 1), rel=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gather_detached_loses_a_factor_of_ranks_in_the_encoder_but_not_in_the_logit_scale(
    fp64, world_size
):
    full = whole_batch()
    found = step_of_all(planned("detached", world_size), world_size)
    assert compared(found, full) == pytest.approx((1, 1 / world_size, 1), rel=1e-12)
    assert torch.allclose(found["loss"], full["loss"], rtol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("negatives", [4, 8, 16])
def test_gather_local_bends_the_gradient_alike_at_every_number_of_ranks(
    fp64, world_size, negatives
):
    """The gradient as candidates is missing, whoever the candidates are."""
    found = step_of_all(planned("local", world_size, negatives), world_size)
    assert same(found, anchors_only(negatives))
    full = whole_batch(negatives)
    assert torch.allclose(found["loss"], full["loss"], rtol=1e-12)
    cosine, norm, scale_ratio = compared(found, full)
    assert 0.5 < cosine < 0.99
    assert 0.4 < norm < 0.8
    assert scale_ratio == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("world_size", [2, 4])
def test_gather_none_has_fewer_negatives_and_another_gradient(fp64, world_size):
    share = USERS // world_size
    found = step_of_all(planned("none", world_size, share), world_size)
    assert same(found, whole_batch(share))
    full = whole_batch()
    assert float(found["loss"]) < float(full["loss"]) - 0.5
    cosine, norm, scale_ratio = compared(found, full)
    assert cosine < 0.98
    assert abs(norm - 1) > 0.05
    assert abs(scale_ratio - 1) > 0.05


def gloo_rank(rank: int, world_size: int, folder: str) -> None:
    """A real rank: writes its steps of all modes."""
    join = f"file://{folder}/join"
    torch.distributed.init_process_group("gloo", join, rank=rank, world_size=world_size)
    torch.Tensor.float = torch.Tensor.double
    ranks = Ranks(rank, world_size, torch.device("cpu"))
    for gather in MODES:
        negatives = USERS // world_size if gather == "none" else USERS
        step = step_of_a_rank(ranks, planned(gather, world_size, negatives))
        save_file(step, f"{folder}/{gather}-{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_of_gloo_do_in_every_mode_what_threads_do(fp64, tmp_path):
    torch.multiprocessing.spawn(gloo_rank, args=(2, str(tmp_path)), nprocs=2)
    for gather in MODES:
        negatives = USERS // 2 if gather == "none" else USERS
        expected = step_of_all(planned(gather, 2, negatives), 2)
        for rank in range(2):
            found = load_file(tmp_path / f"{gather}-{rank}.safetensors")
            assert same(found, expected), gather


# ---- DeepSpeed ----------------------------------------------------------------------------------


def test_deepspeed_crashes_on_a_0_dim_parameter_so_the_logit_scale_has_a_dimension(corpus, start):
    config = configure(corpus)
    model = build(config.model, config.data.vocab_size)
    assert model.logit_scale.shape == (1,)
    model.logit_scale = nn.Parameter(model.logit_scale.detach()[0])
    with pytest.raises(RuntimeError, match=r"dim\(\) cannot be 0"):
        start(1, model)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_clamp_in_place_is_undone_by_the_hidden_master_but_not_the_one_of_the_forward_pass(
    start, stage
):
    engine, _ = start(stage, optim={"lr": 0.25})
    parameter = engine.module.logit_scale
    limit, seen = math.log(100), []
    for _ in range(16):
        engine.backward(-sum(p.sum() for p in engine.module.parameters()))
        update(engine, 0.25)
        with torch.no_grad():
            seen.append(parameter.item())
            parameter.clamp_(max=limit)
    if stage:
        assert seen == sorted(seen)
        assert seen[-1] > limit + 1  # it went on as if nothing had been clamped
    else:
        assert seen[-1] < limit + 0.3
    assert float(scale(fp32_logit_scale(engine))) <= 100
    assert scale(parameter).item() <= 100


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_scale_beyond_its_limit_is_never_used_or_told(corpus, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(clue, "INITIAL_SCALE", 300.0)
    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    result = train(run, corpus, TrainSettings(zero_stage=stage, threads=1))
    assert float(parameters(run)["logit_scale"]) > math.log(200)
    rows = run.curve("train") + run.curve("pool")
    assert {r["logit_scale"] for r in rows} == {result["logit_scale"]} == {100.0}
    monkeypatch.setattr(clue, "INITIAL_SCALE", 100.0)
    first = build(run.spec().model, run.spec().data.vocab_size, run.spec().seed)
    projected = first.project(first(Batches(corpus, run.spec()).batch(0))).view(2, USERS, -1)
    at_limit = contrastive_loss(projected, first.logit_scale, USERS)
    assert rows[0]["loss"] == pytest.approx(at_limit.item(), rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_scale_at_its_limit_can_come_down_again(corpus, tmp_path, monkeypatch, stage):
    """Encoders just initialised tell no users apart and want a smaller scale."""
    monkeypatch.setattr(clue, "INITIAL_SCALE", 101.0)
    run = RunDir.create(tmp_path, configure(corpus, optim={"lr": 1e-2}), "tiny")
    result = train(run, corpus, TrainSettings(zero_stage=stage, threads=1))
    assert result["logit_scale"] < 99


def test_the_scalar_that_the_engine_starts_from_has_the_gradients_of_the_loss(corpus, fp64):
    """Of a whole encoder, in chunks, at once and by hand; the logit scale's is no multiple."""
    config = configure(corpus)
    model = build(config.model, config.data.vocab_size, 1).double()
    batch = Batches(corpus, config).batch(0)
    names = [n for n, _ in model.named_parameters()]

    def projected(micro_batch_tokens):
        return model.project(model(batch, micro_batch_tokens)).view(2, USERS, -1)

    loss = contrastive_loss(projected(None), model.logit_scale, USERS)
    direct = torch.autograd.grad(loss, list(model.parameters()))
    for micro_batch_tokens in (None, 40):
        own = projected(micro_batch_tokens)
        found = contrast(own, model.logit_scale.detach(), config, ALONE)
        surrogate = found.surrogate(own, model.logit_scale)
        ours = torch.autograd.grad(surrogate, list(model.parameters()))
        assert found.loss.item() == pytest.approx(loss.item(), rel=1e-12)
        for name, a, b in zip(names, ours, direct, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-13), name


# ---- low precision ------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "low_error"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_similarities_in_low_precision_are_off_where_ours_are_not(rng, dtype, low_error):
    """Logits up to 100: normalise, product and scale in fp32, whatever the encoder computes in."""
    low = torch.from_numpy(rng.normal(size=(2, 64, 48))).to(dtype)
    tau = torch.tensor([math.log(100.0)])
    unit = F.normalize(low.double(), dim=-1)
    exact = 100 * unit[0] @ unit[1].T
    coarse = F.normalize(low, dim=-1)
    careless = 100 * (coarse[0] @ coarse[1].T)
    assert float((careless.double() - exact).abs().max()) > low_error
    ours = logits(low, tau, 64)[0, 0]
    assert ours.dtype == torch.float32
    assert float((ours.double() - exact).abs().max()) < 1e-4


@pytest.mark.parametrize("gather", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_low_precision_embeddings_is_computed_in_fp32(rng, gather, dtype):
    low = torch.from_numpy(rng.normal(size=(2, USERS, WIDTH))).to(dtype)
    tau = torch.tensor([4.0])
    found, full = (contrast(z, tau, planned(gather, 1), ALONE) for z in (low, low.float()))
    for name in ("loss", "projected", "logit_scale"):
        value = getattr(found, name)
        assert value.dtype == torch.float32
        assert torch.equal(value, getattr(full, name)), name


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_weight_decay_pulls_at_all_parameters_but_the_logit_scale(start, stage):
    engine, _ = start(stage)
    model = engine.module
    with torch.no_grad():
        before = {n: master(engine, p) for n, p in model.named_parameters()}
    engine.backward(sum((0.0 * p).sum() for p in model.parameters()))
    update(engine, 0.5)
    for name, parameter in model.named_parameters():
        share = 1.0 if name == "logit_scale" else 1 - 0.5 * 0.1
        after = master(engine, parameter)
        assert torch.allclose(after, share * before[name], rtol=1e-6), name


def test_the_schedule_of_a_run_is_a_function_of_steps_taken(corpus, tmp_path):
    """Not of backward passes: see the tests of fp16 beside the engine's."""
    run = RunDir.create(tmp_path, configure(corpus), "tiny")
    stop = StopAt(9)
    train(run, corpus, TrainSettings(threads=1), progress=stop.progress, should_stop=stop)
    train(run, corpus, TrainSettings(threads=1))
    told = [r["lr"] for r in run.curve("train")]
    assert told == [learning_rate(run.spec(), step) for step in range(24)]


# ---- dropout and the embedding cache ------------------------------------------------------------


def random_batch(
    rng: np.random.Generator, users: int = 4, distinct: int | None = None
) -> PackedBatch:
    """Two services of users with up to 9 items each, of up to 6 tokens."""
    row_lengths = rng.integers(2, 10, 2 * users)
    total = int(row_lengths.sum())
    n_items = distinct or total
    item_lengths = rng.integers(1, 7, n_items)
    return PackedBatch(
        tokens=rng.integers(1, 50, item_lengths.sum()),
        token_offsets=np.append(0, item_lengths.cumsum()),
        items=rng.integers(0, n_items, total) if distinct else np.arange(total),
        item_offsets=np.append(0, row_lengths.cumsum()),
        n_views=2,
    )


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(params=["clue", "single"])
def dropping(request, rng, fp64):
    """Gradients of a step with dropout, in chunks of so many elements, always the same draw."""
    config = ModelConfig(system=request.param, layers=2, d_model=12, heads=3, dropout=0.1)
    model = build(config, 50, 3).double().train()
    batch = random_batch(rng)

    def gradients(most):
        torch.manual_seed(11)
        projected = model.project(model(batch, most)).view(2, 4, -1)
        loss = contrastive_loss(projected, model.logit_scale, 4)
        found = torch.autograd.grad(loss, list(model.parameters()))
        return torch.cat([g.flatten() for g in found])

    return gradients


def plainly(encode, *args, use_reentrant, preserve_rng_state):
    """In the place of ``checkpoint``: nothing is computed twice."""
    return encode(*args)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("most", [9, 40])
def test_a_chunk_computed_again_has_the_dropout_it_had(dropping, monkeypatch, most):
    cached = dropping(most)
    assert torch.equal(cached, dropping(most))
    monkeypatch.setattr(transformer, "checkpoint", plainly)
    assert off(cached, dropping(most)) < 1e-12


def test_without_the_same_random_numbers_a_chunk_computed_again_is_another(dropping, monkeypatch):
    """So the test above could fail."""
    cached, checkpoint = dropping(20), transformer.checkpoint

    def forgetful(encode, *args, use_reentrant, preserve_rng_state):
        return checkpoint(encode, *args, use_reentrant=use_reentrant, preserve_rng_state=False)

    monkeypatch.setattr(transformer, "checkpoint", forgetful)
    assert off(dropping(20), cached) > 0.05


# ---- determinism --------------------------------------------------------------------------------


def test_items_that_repeat_add_up_their_gradients_in_the_same_order_every_time(rng):
    """On threads, too: of the gradients of an index that repeats, none may depend on timing."""
    torch.set_num_threads(2)
    model = build(ModelConfig(layers=1, d_model=16, heads=2, dropout=0.1), 50, 3)
    batch = random_batch(rng, users=400, distinct=5)
    assert len(batch.items) * 16 > 2 * 32768  # what a thread of an elementwise operation gets
    seen = []
    for most in (None, None, 900, 900):
        torch.manual_seed(2)
        projected = model.project(model(batch, most)).view(2, 400, -1)
        loss = contrastive_loss(projected, model.logit_scale, 400)
        seen.append(torch.autograd.grad(loss, list(model.parameters())))
    for first, again in (seen[:2], seen[2:]):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_run_on_distinct_items_gives_the_same_bits_twice(corpus, tmp_path):
    config = configure(corpus, dropout=0.1, distinct_items=True)
    batch = Batches(corpus, config, distinct=True).batch(0)
    assert len(batch.items) > len(batch.token_offsets) - 1  # some repeat
    runs = []
    for name in ("first", "second"):
        run = RunDir.create(tmp_path / name, config, "tiny")
        train(run, corpus, TrainSettings(threads=1, micro_batch_tokens=100))
        runs.append(run)
    first, second = runs
    assert curve(first) == curve(second)
    assert curve(first, "pool") == curve(second, "pool")
    assert all(torch.equal(v, parameters(second)[n]) for n, v in parameters(first).items())


# ---- users alike --------------------------------------------------------------------------------


@pytest.mark.parametrize("alike", [2, 3])
def test_users_alike_are_each_other_s_negatives_and_cost_the_logarithm_of_their_number(alike):
    """Nothing is masked: a false negative at logit 0 would still add exp(0) = 1 to the sum, and one
    left out would make the loss depend on who else is in the batch."""
    users = 8
    z = torch.eye(users)
    z[:alike] = z[0]
    both = torch.stack([z, z])
    scores = logits(both, torch.tensor([math.log(100.0)]), users)[0, 0]
    assert torch.equal(scores[:alike, :alike], torch.full((alike, alike), 100.0))
    expected = alike * math.log(alike) / users  # the others are told apart perfectly
    for gather in ("exact", "local"):
        config = planned(gather, 1).model_copy(update={"negatives": users})
        found = contrast(both, torch.tensor([math.log(100.0)]), config, ALONE)
        assert float(found.loss) == pytest.approx(expected, rel=1e-5)


def test_two_identical_logs_leave_a_loss_of_ln_2_that_no_encoder_can_lower(rng):
    """Four users in two identical pairs, through a whole encoder."""
    one = random_batch(rng)
    rows = [one.items[a:b] for a, b in zip(one.item_offsets, one.item_offsets[1:], strict=False)]
    twice = [rows[i] for i in (0, 1, 0, 1, 4, 5, 4, 5)]
    batch = PackedBatch(
        tokens=one.tokens,
        token_offsets=one.token_offsets,
        items=np.concatenate(twice),
        item_offsets=np.append(0, np.cumsum([len(r) for r in twice])),
        n_views=2,
    )
    model = build(ModelConfig(layers=1, d_model=8, heads=1, dropout=0.0), 50, 1)
    with torch.no_grad():
        for p in (model.token_emb.weight, model.w1.weight, model.w2.weight):
            p *= 10  # so that they learn in 60 steps
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        projected = model.project(model(batch)).view(2, 4, -1)
        assert torch.allclose(projected[:, :2], projected[:, 2:], atol=1e-5)
        loss = contrastive_loss(projected, model.logit_scale, 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert float(loss.detach()) > math.log(2) - 1e-5
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=0.05)
