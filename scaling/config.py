"""What a run is: frozen, fully resolved configurations, and the key that names a run.

``RunConfig`` holds the science of a run and nothing else: no path, no partition, no node count. Two
configurations that would train the same numbers have the same ``run_key`` whatever file they came
from. How a run is executed (``TrainSettings``) lies beside it and is recorded per attempt.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from decimal import Decimal
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from scaling import ClueError

SCHEMA_VERSION = 1
PAPER_VOCABULARY = 50_257
"""Vocabulary of the paper (Shin et al. 2023, Table 8); the named model sizes hold for it."""
MAX_ITEMS = 512
"""Rows of the item position table (Table 8: max sequence length), whatever a run's cap is."""
MAX_TOKENS = 32
"""Rows of the token position table (Table 7: maximum token length)."""
MAX_TOKENS_SINGLE = 2_048
"""Rows of the position table of the single Transformer (Table 5: sequence length 2,048)."""

# Strict: pydantic would otherwise take "64", 64.0 and true for whole numbers.
Fraction = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, gt=0, le=2**53)]  # what a float holds exactly
Digest = Annotated[str, Field(pattern=r"^[a-z0-9]{16}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


class ConfigError(ClueError):
    """A configuration is wrong; the message names file, key, value and what is valid."""


class Frozen(BaseModel):
    """Base of all configuration models: immutable, unknown keys refused, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def parse(cls, data: Any, where: str) -> Self:
        """Validate ``data``; ``where`` (a file, say) begins every message.

        Raises:
            ConfigError: with one line per problem: key, value, and the valid keys or values.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            raise ConfigError("\n".join(_explain(cls, err, where) for err in e.errors())) from None


def _explain(cls: type[BaseModel], error: Any, where: str) -> str:
    path = [p for p in error["loc"] if not (isinstance(p, str) and p.startswith("function-"))]
    key = ".".join(str(p) for p in path)
    if error["type"] == "extra_forbidden":
        owner = _model_at(cls, path[:-1])
        valid = ", ".join(sorted(owner.model_fields)) if owner else "none"
        return f"{where}: unknown key {key!r}; valid keys: {valid}"
    if error["type"] == "missing":
        return f"{where}: key {key!r} is missing"
    given = "" if isinstance(error["input"], Mapping) else f" = {error['input']!r}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {key + given + ': ' if key else ''}{message}"


def _model_at(cls: type[BaseModel], path: list[Any]) -> type[BaseModel] | None:
    owner: Any = cls
    for part in path:
        if isinstance(part, int) or (
            isinstance(owner, type)
            and issubclass(owner, BaseModel)
            and part not in owner.model_fields
        ):
            continue
        annotation = owner.model_fields[part].annotation
        stack, owner = [annotation], None
        while stack and owner is None:
            candidate = stack.pop()
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                owner = candidate
            stack.extend(get_args(candidate))
        if owner is None:
            return None
    return owner if isinstance(owner, type) and issubclass(owner, BaseModel) else None


class ModelConfig(Frozen):
    """Shape of an encoder. Both stacks of CLUE have the same shape (Table 8)."""

    system: Literal["clue", "single"] = "clue"
    """``clue``: Item and Service Transformer; ``single``: one Transformer over tokens (Table 5)."""
    layers: Count
    """Layers of each stack."""
    d_model: Count
    """Width of token, item and user embeddings; the feed-forward width is four times this."""
    heads: Count
    """Attention heads of each layer; must divide ``d_model``."""
    dropout: Share = 0.1
    """Dropout rate of embeddings, attention weights and residual branches (Table 8)."""
    feature_dim: Count | None = None
    """Width that a linear layer, trained with the encoder, reduces a user's features in one service
    to (Table 6); None: no such layer."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide d_model = {self.d_model}")
        if self.feature_dim is not None and self.feature_dim >= self.d_model:
            raise ValueError(
                f"feature_dim = {self.feature_dim} does not reduce d_model = {self.d_model}; "
                f"valid: at least 1 and below {self.d_model}"
            )
        return self

    @property
    def feature_width(self) -> int:
        """Width of a user's features in one service, and of their projection; an item's is d."""
        return self.feature_dim or self.d_model

    @property
    def suffix(self) -> str:
        """``-f32``: what a ``feature_dim`` adds to the name of a model; without one, nothing."""
        return "" if self.feature_dim is None else f"-f{self.feature_dim}"

    @property
    def shape(self) -> str:
        """``8x64``, ``8x64-f32``: layers and widths, the name of a model at any vocabulary."""
        prefix = "" if self.system == "clue" else f"{self.system}-"
        return f"{prefix}{self.layers}x{self.d_model}{self.suffix}"


class DataConfig(Frozen):
    """Which users and how much of each a run sees."""

    corpus_digest: Digest
    """Digest of the prepared corpus; a corpus prepared otherwise is another run."""
    vocab_size: Count
    """Entries of the corpus's tokenizer, pad and service tokens included."""
    n_services: Count = 2
    """Services whose views of one user are contrasted."""
    services: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """Which ones, in the corpus's order; None: all of the corpus's pretraining."""
    data_fraction: Fraction = 1.0
    """Share of pretraining users; a prefix of the corpus, so that fractions are nested."""
    items_per_user: Annotated[Count, Field(le=MAX_ITEMS)] = 128
    """Cap S on a user's most recent items, per service. [items]"""
    shuffle: StrictBool = True
    """New batch composition every epoch; False: fixed composition (Fig. 3, right)."""

    @model_validator(mode="after")
    def _counted(self) -> Self:
        if self.services is not None and self.n_services != len(self.services):
            raise ValueError(f"n_services = {self.n_services}, but services = {self.services}")
        return self

    @property
    def n_views(self) -> int:
        """Views of one user that are contrasted: one a service, two of a single one."""
        return max(2, self.n_services)


SINGLE_LOGS = (
    "users have a single log of {!r}, the only service, whose halves are to be contrasted; prepare "
    "the corpus with users.min_logs = 2 or more"
)
"""Why a service cannot be contrasted with itself."""


class OptimConfig(Frozen):
    """AdamW and its schedule; the defaults are the paper's (Appendix B, Table 8)."""

    lr: Positive = 5e-4
    betas: tuple[Share, Share] = (0.9, 0.98)
    eps: Positive = 1e-6
    weight_decay: NonNegative = 0.1
    """On every parameter but the logit scale."""
    warmup: Share = 0.01
    """Share of the steps with a linear warm-up."""
    final_lr: Fraction = 0.1
    """Learning rate at the last step as a share of ``lr``; a cosine leads there."""
    clip_norm: Positive = 0.01
    """Largest norm of the gradient of all parameters together."""


class PoolConfig(Frozen):
    """Fixed candidate pool of users no run trains on; its contrastive loss is the loss of a run."""

    size: Count
    """Users in the pool: a loss over other users or another number of them is not comparable."""
    digest: Digest
    """Digest of the pool's users and their logs."""


ADDED: dict[str, Any] = {
    "gather": "exact",
    "gather_ranks": None,
    "distinct_items": False,
    "data.services": None,
    "model.feature_dim": None,
}
"""Fields of ``RunConfig``, those of its parts dotted, that the first runs did not have, with the
value they ran under. It is part of the definition of ``run_key``: never change a value, whatever
becomes of the default."""


class RunConfig(Frozen):
    """Everything that decides the numbers of a run."""

    schema_version: Literal[1] = 1
    model: ModelConfig
    data: DataConfig
    batch_size: Annotated[Count, Field(ge=2)]
    """Users per step over all ranks. [users]"""
    negatives: Annotated[Count, Field(ge=2)]
    """The loss contrasts within chunks of this many users of the batch; divides ``batch_size``."""
    steps: Count = 100_000
    """Optimiser steps; fixed over a study (the paper: 100,000)."""
    optim: OptimConfig = OptimConfig()
    pool: PoolConfig
    evaluations: Count = 20
    """Evenly spaced evaluations on the pool, the last at the last step."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the encoder; loss and optimiser are always in fp32. fp16 scales the loss."""
    gather: Literal["exact", "detached", "local", "none"] = "exact"
    """Which gradients cross ranks (``scaling.train.contrast``); the paper's wording fits
    ``detached`` or ``local``."""
    gather_ranks: Count | None = None
    """Ranks of a run whose ``gather`` is not ``exact``: its numbers depend on them."""
    distinct_items: StrictBool = False
    """Encode every distinct item of a rank's batch once a step. Where dropout is off this changes
    nothing; where it is on, all logs that hold an item share its mask."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**31)] = 0
    """Seed of initialisation, dropout and data order."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.negatives:
            raise ValueError(
                f"negatives = {self.negatives} does not divide batch_size = {self.batch_size}"
            )
        if self.evaluations > self.steps:
            raise ValueError(f"evaluations = {self.evaluations} exceeds steps = {self.steps}")
        if (self.gather == "exact") != (self.gather_ranks is None):
            raise ValueError(
                f"gather = {self.gather!r} with gather_ranks = {self.gather_ranks}: give the "
                "number of ranks with 'detached', 'local' and 'none', and not with 'exact'"
            )
        if self.gather_ranks is not None:
            share, left = divmod(self.batch_size, self.gather_ranks)
            if left:
                raise ValueError(
                    f"gather_ranks = {self.gather_ranks} does not divide "
                    f"batch_size = {self.batch_size}"
                )
            inside, across = share % self.negatives == 0, self.negatives % share == 0
            if self.gather == "none" and not inside:
                raise ValueError(
                    f"gather = 'none': negatives = {self.negatives} does not divide the {share} "
                    "users of a rank"
                )
            if self.gather == "local" and not (inside or across):
                raise ValueError(
                    f"gather = 'local': neither of negatives = {self.negatives} and the {share} "
                    "users of a rank divides the other"
                )
        return self

    @property
    def run_key(self) -> str:
        """Name of the run: 80 bits of the SHA-256 of the canonical JSON, as 16 base-32 letters.

        A field that came later (``ADDED``) is left out at the value that all earlier runs had, so
        that they keep their names.
        """
        science = self.model_dump(mode="json")
        for name, before in ADDED.items():
            *parts, field = name.split(".")
            owner = reduce(getitem, parts, science)
            if owner[field] == before:
                del owner[field]
        return short_digest(canonical_json(science))

    @property
    def sequence_length(self) -> int:
        """S of the paper's formula: items for CLUE, tokens for a single Transformer."""
        if self.model.system == "single":
            return min(MAX_TOKENS_SINGLE, MAX_TOKENS * self.data.items_per_user)
        return self.data.items_per_user

    @property
    def evaluation_steps(self) -> tuple[int, ...]:
        """Steps after which the pool loss is measured, ascending; the last is ``steps``."""
        return tuple(self.steps * (i + 1) // self.evaluations for i in range(self.evaluations))


class CorpusCard(Frozen):
    """The numbers of a corpus that planning and counting need; part of its manifest.

    A nominal corpus (the paper's) has such a card and no logs: ``digest`` is then None, and its
    runs can be planned and priced but have no key.
    """

    name: Name
    digest: Digest | None
    services: tuple[str, ...]
    """Services of pretraining, in the order of the corpus."""
    vocab_size: Count
    n_users: Count
    """Pretraining users."""
    pool: PoolConfig | None
    """None for a nominal corpus."""
    items_per_user: dict[str, tuple[float, ...]]
    """Per service: share of pretraining users with 0, 1, 2, ... items; the last entry is
    ``MAX_ITEMS`` or more."""
    tokens_per_item: tuple[float, ...]
    """Share of behaviours whose item has 0, 1, ... ``MAX_TOKENS`` tokens, the service token too."""

    def pool_of(self, services: tuple[str, ...] | None) -> PoolConfig | None:
        """The pool as a run on some of the services meets it: other views of its users are
        contrasted, so it is another pool.

        Args:
            services: of pretraining; None: all.
        """
        if self.pool is None or services is None:
            return self.pool
        digest = short_digest(canonical_json([self.pool.digest, services]))
        return self.pool.model_copy(update={"digest": digest})

    def fraction_users(self, fraction: float) -> int:
        """Users in a data fraction. [users]"""
        return users_in_fraction(self.n_users, fraction)


class TrainSettings(Frozen):
    """How a run is executed: nothing here changes what it computes beyond rounding."""

    zero_stage: Literal[0, 1, 2] | None = None
    """DeepSpeed ZeRO stage; None: 1, but 0 for a single rank in fp32, with nothing to share."""
    threads: Annotated[int, Field(strict=True, ge=0)] = 0
    """CPU threads per rank; 0: as many as the job has."""
    checkpoint_every: Annotated[int, Field(strict=True, ge=0)] = 0
    """Steps between checkpoints; 0: a twentieth of the run. The last step always has one."""
    keep_checkpoints: Annotated[Count, Field(ge=2)] = 2
    """Newest committed checkpoints kept."""
    milestones: Annotated[int, Field(strict=True, ge=0)] = 0
    """Evenly spaced steps whose parameters are exported and kept; 0: of the last step only."""
    micro_batch_tokens: Count | None = None
    """Most elements (tokens of items, items of rows) of a rank whose activations are held at once;
    larger batches are encoded in chunks that the backward pass computes again. None: as many as
    fit, found at the first start. [tokens]"""
    peak_tflops: Positive | None = None
    """Peak of a rank's device, for the utilisation; None: known devices' own. [TFLOP/s]"""
    mirrors: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics are shown besides the run's own files."""

    def milestone_steps(self, steps: int) -> tuple[int, ...]:
        """Steps whose parameters are exported, ascending; the last is ``steps``."""
        n = min(self.milestones, steps)
        return tuple(steps * (i + 1) // n for i in range(n)) or (steps,)


Head = Literal["u-mlp", "u-mlp-64", "linear", "hybrid"]


class Evaluation(Frozen):
    """One evaluation of an encoder on a downstream task: all that decides its numbers besides the
    encoder. How it is done is decision 0006."""

    schema_version: Literal[2] = 2
    corpus_digest: Digest
    """Corpus that the task is of: the run's own, or for a foreign task another."""
    task: Name
    task_digest: Digest
    head: Head = "u-mlp"
    history: Literal["target", "all"] = "target"
    folds: Literal[2, 5, 10] = 5
    """Means nothing for a ``leave_one_out`` task, whose users are all tested at once."""
    seeds: Count = 1
    """Seeds 0, 1, ... of the head; metrics are means over them."""
    feature_dim: Count | None = None
    """Width of a user's features in one service, after a linear layer that is learnt of the frozen
    encoder (``transfer.reduce``); None: as the encoder gives them."""

    @property
    def record(self) -> dict[str, Any]:
        """Its JSON; what came later is left out where it was not asked for, so that keys stay."""
        left_out = {"feature_dim"} if self.feature_dim is None else set()
        return self.model_dump(mode="json", exclude=left_out)

    @property
    def key(self) -> str:
        """Name of the record: ``<task>-<8 letters>``."""
        return f"{self.task}-{short_digest(canonical_json(self.record))[:8]}"


class TransferSettings(Frozen):
    """The downstream evaluations of every run of a sweep: its ``[transfer]`` table."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Tasks of the sweep's corpus, or ``<corpus>:<task>`` of another prepared corpus."""
    heads: Annotated[tuple[Head, ...], Field(min_length=1)] = ("u-mlp",)
    """``u-mlp``: the paper's two towers; ``u-mlp-64``: the same on the 64 leading principal
    components of the features, so that the head is the same at every width; ``linear``: one matrix
    a tower (LMRec's linear probe); ``hybrid``: ``u-mlp`` with the user vectors of the better of BST
    and LightGCN beside the features."""
    history: Literal["target", "all"] = "target"
    """User features from the task's own service, or from all its history services."""
    folds: Literal[2, 5, 10] = 5
    seeds: Count = 1
    feature_dim: Count | None = None
    """Dimensions of a user's features in one service, reduced after the training; to have them
    reduced in it is the encoder's ``feature_dim``."""


def canonical_json(obj: Any) -> bytes:
    """The one byte string of a JSON value: sorted keys, no spaces, no NaN, ASCII."""
    return json.dumps(
        obj, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
    ).encode()


def short_digest(data: bytes) -> str:
    """16 base-32 letters (80 bits) of the SHA-256 of ``data``: the form of all our digests."""
    return base64.b32encode(hashlib.sha256(data).digest()[:10]).decode().lower()


def users_in_fraction(n_users: int, fraction: float) -> int:
    """Users of a data fraction: the first ``floor(fraction * n_users)``. [users]

    The fraction is taken as the decimal number it is written as: 0.5689 of 10^8 users is
    56,890,000, which binary floats would miss by one.
    """
    return int(Decimal(str(float(fraction))) * n_users)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: it is missing or not TOML; the message names file, line and column.
    """
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not valid TOML: {e}") from None
