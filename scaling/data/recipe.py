"""The corpus file: what to prepare, and every choice of the preparation, as a frozen model."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from scaling.config import (
    MAX_ITEMS,
    PAPER_VOCABULARY,
    Count,
    Frozen,
    Name,
    Positive,
    Share,
    canonical_json,
    read_toml,
    short_digest,
)
from scaling.data.sources import source_config
from scaling.data.task_config import TaskConfig

PREPARATION = 2
"""Version of the preparation: rises when the same corpus file would give another corpus."""


class LogFilters(Frozen):
    """What happens to the logs, in this order; the manifest counts what each step left."""

    max_malformed: Share = 0.0
    """Largest share of rows that may be unreadable; above it, preparation refuses."""
    clean_text: bool = False
    """Resolve HTML entities in item texts and join runs of white space."""
    max_same_text: Share = 0.5
    """Largest share of a service's items that may have one text; above it, preparation refuses."""
    drop_untitled: bool = False
    """Drop logs whose item has no text; False: refuse them."""
    min_rating: float | None = None
    """Drop logs rated lower, and unrated ones; a service without any rating is refused."""
    deduplicate: Literal["latest", "none"] = "none"
    """``latest``: of several logs of one user and item keep the latest (the paper keeps one)."""
    min_per_month: Positive | None = None
    """Drop users with fewer logs a month, a mean over the time that all logs cover. The paper drops
    those below one in two months: 0.5."""
    k_core: Count | None = None
    """Drop users and items with fewer logs, over all services, until none is left."""


class Users(Frozen):
    """Which users there are, and what each keeps."""

    salt: str = "clue-scaling"
    """Of the hash that orders and splits users; another salt is another split."""
    max_logs: Annotated[int, Field(gt=0, le=MAX_ITEMS)] = MAX_ITEMS
    """Most recent logs kept per user and service. [items]"""
    eligible_logs: Count = 1
    """A user is eligible for the downstream split with so many logs in each pretraining service."""
    downstream: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the eligible users set aside for downstream tasks, never pretrained on."""
    min_logs: Count = 1
    """A pretraining user has at least so many logs in each pretraining service."""
    validation: Count = 1_024
    """Unseen users on which the logit scale is refitted."""
    pool: Annotated[int, Field(ge=2)] = 1_024
    """Unseen users of the fixed candidate pool."""
    held_out_from: Literal["pretraining", "downstream"] = "pretraining"
    """Where validation and pool users come from. From ``downstream`` they stay in the tasks too."""


class TokenizerConfig(Frozen):
    """The byte-level BPE tokenizer."""

    vocab_size: Annotated[int, Field(gt=256, le=1 << 20)] = PAPER_VOCABULARY
    """Entries at most, the pad and service tokens included; small corpora fill fewer."""
    sample: Count = 500_000
    """Distinct texts of pretraining it learns from, at most: those of the lowest hashes."""


class Nominal(Frozen):
    """Statistics of a corpus nobody has here, so that its sweeps can be planned and priced."""

    n_users: Count
    n_behaviours: Count
    n_tokens: Count
    """Over all behaviours, service tokens included."""
    items_per_user_sigma: Positive
    """Shape of a lognormal for a user's items per service; its mean follows from the counts."""
    tokens_per_item_sigma: Positive
    """Shape of a lognormal for an item's tokens; its mean follows from the counts."""


class CorpusFile(Frozen):
    """A corpus file (TOML)."""

    name: Name
    services: Annotated[tuple[Name, ...], Field(min_length=1)]
    """Services of pretraining, in the order of the corpus."""
    downstream_services: tuple[Name, ...] = ()
    """Services of tasks only: their items are in the corpus, their logs not in pretraining."""
    source: Any = None
    """Kind and settings of a source (``scaling/data/sources``); none for a nominal corpus."""
    logs: LogFilters = LogFilters()
    users: Users = Users()
    tokenizer: TokenizerConfig = TokenizerConfig()
    tasks: dict[Name, TaskConfig] = Field(default_factory=dict)
    nominal: Nominal | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [*self.services, *self.downstream_services]
        if len(set(names)) < len(names):
            raise ValueError(f"a service is named twice: {', '.join(names)}")
        least = 1 + len(names) + 256
        if self.tokenizer.vocab_size < least:
            raise ValueError(
                f"tokenizer.vocab_size = {self.tokenizer.vocab_size} does not cover all texts: the "
                f"pad token, {len(names)} service tokens and the 256 bytes are {least} entries"
            )
        if (self.source is None) == (self.nominal is None):
            raise ValueError("a corpus has either a [source] or, for planning only, [nominal]")
        if self.users.held_out_from == "downstream" and not self.users.downstream:
            raise ValueError("users.held_out_from = 'downstream' needs users.downstream > 0")
        for name, task in self.tasks.items():
            if task.service not in names:
                raise ValueError(
                    f"tasks.{name}.service = {task.service!r}; valid services: {', '.join(names)}"
                )
            if task.users == "downstream" and not self.users.downstream:
                raise ValueError(f"tasks.{name}.users = 'downstream' needs users.downstream > 0")
            if task.users == "all" and task.encoders == "own" and task.service in self.services:
                raise ValueError(
                    f"tasks.{name}.users = 'all' would test on logs of pretraining, "
                    f"as {task.service!r} is a service of it; for encoders of other corpora alone: "
                    "encoders = 'foreign'"
                )
        return self

    @property
    def all_services(self) -> tuple[str, ...]:
        """Services of pretraining, then those of tasks only."""
        return self.services + self.downstream_services

    @property
    def recipe(self) -> str:
        """Digest of what decides tokenizer, items and users; name and tasks are not in it."""
        keys = self.model_dump(mode="json", exclude={"name": True, "tasks": True, "nominal": True})
        keys["preparation"] = PREPARATION
        return short_digest(canonical_json(keys))

    def task_recipe(self, task: str) -> str:
        """Digest of what decides a task beside the recipe."""
        return short_digest(canonical_json([task, self.tasks[task].record]))


def read_corpus_file(path: Path) -> CorpusFile:
    """Read a corpus file.

    Raises:
        ConfigError: it is missing or wrong; the message names file, key, value and what is valid.
    """
    path = Path(path)
    data = read_toml(path)
    if "source" in data:
        data = {**data, "source": source_config(data["source"], str(path))}
    return CorpusFile.parse(data, str(path))
