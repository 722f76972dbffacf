"""The tables ``[tasks.<name>]`` of a corpus file: which of a user's logs are predicted from which.

The forms are those of the papers:

* ``last``: the latest logs of the service. Three of them are the Amazon benchmark of Shin et al.
  2023, Section 4.2; one is our reading of their industrial tasks.
* ``random``: items set aside at random, for a service without dates (their FWR).
* ``first``: a user's first log of the service, from those of the other services before it: the "New
  Customer Booking Prediction" of the paper's first version (NCBP).
* ``leave_one_out``: the last log but one validates and the last one tests, over all users and among
  all items (Shin et al. 2022, "LMRec", Section 3.2).
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictBool, model_validator

from scaling.config import Count, Frozen, Name

FORMS: dict[str, dict[str, Any]] = {
    "last": {},
    "random": {"targets": 1, "history": "service"},
    "first": {"targets": 1},
    "leave_one_out": {"users": "all", "targets": 2, "history": "service", "negatives": 0},
}
"""Defaults of each form, where they are not those of the fields."""


class TaskConfig(Frozen):
    """A downstream task: predict some of a user's items of one service."""

    form: Literal["last", "random", "first", "leave_one_out"] = "last"
    """Which logs are targets."""
    service: Name
    users: Literal["downstream", "all"] = "downstream"
    """``all``: whoever has the logs. Only where the service is not one of pretraining, or the
    encoders come from elsewhere."""
    encoders: Literal["own", "foreign"] = "own"
    """``foreign``: the task is for encoders of other corpora alone, so it does not matter what this
    one's pretraining has of its users."""
    targets: Count = 3
    """Per user: ``last`` 3, ``random`` 1; always 1 of ``first`` and 2 of ``leave_one_out``."""
    min_history: Count = 1
    """Logs beside the targets that a user must have: of the service (``last`` and
    ``leave_one_out``: earlier ones; ``random``: other items), or for ``first`` earlier ones of the
    other services."""
    history: Literal["service", "all"] = "all"
    """Logs that are stored: of the task's service, or of every service of pretraining too. Features
    are made from the task's service all the same unless the evaluation asks for all."""
    negatives: Annotated[int, Field(strict=True, ge=0, le=2**53)] = 100
    """Items per target that it is ranked with, none of which the user ever touched; 0: it is ranked
    among all items of the service, and none are stored."""
    negatives_from: Literal["uniform", "popularity"] = "uniform"
    """How negatives are drawn: each item alike, or in proportion to its logs of pretraining users
    (of histories, where ``users`` is ``all``). Without replacement."""
    cut: Literal["day", "time", "order"] | None = None
    """History is strictly before the first target by day, by time or by stored order; None: by day
    where all times are whole days, by order where there are none, else by time. By order, the task
    has histories of its own service alone."""
    segments: StrictBool = False
    """Store who is new, cold, regular or heavy; needs times in all services."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_form(cls, data: Any) -> Any:
        form = data.get("form", "last") if isinstance(data, dict) else None
        return {**FORMS[form], **data} if isinstance(form, str) and form in FORMS else data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        form = self.form
        fixed = {"first": 1, "leave_one_out": 2}.get(form, self.targets)
        if self.targets != fixed:
            raise ValueError(f"targets = {self.targets}, but form = {form!r} has {fixed}")
        if form == "first" and self.history == "service":
            raise ValueError(
                "history = 'service', but form = 'first' predicts the first log of it; valid: 'all'"
            )
        if form == "first" and self.cut == "order":
            raise ValueError(
                "cut = 'order', but form = 'first' compares logs of different services; "
                "valid: 'day', 'time'"
            )
        if form == "random" and (self.cut or self.segments):
            raise ValueError("form = 'random' is for logs without times: no cut and no segments")
        if self.encoders == "foreign" and self.users != "all":
            raise ValueError("encoders = 'foreign' allows users = 'all'; it means nothing without")
        if not self.negatives and self.negatives_from != "uniform":
            raise ValueError(f"negatives_from = {self.negatives_from!r}, but negatives = 0")
        if (form, self.users, self.negatives_from) == ("first", "all", "popularity"):
            raise ValueError(
                "negatives_from = 'popularity' counts histories where users = 'all', and form = "
                f"'first' has no history of {self.service!r}"
            )
        return self

    @property
    def record(self) -> dict[str, Any]:
        """Content for ``task.json`` and for digests.

        Keys that came after the first version are there only where they are not at their default:
        a task that does without them keeps its digest, which results refer to.
        """
        first = {"service", "users", "targets", "min_history", "negatives", "cut"}
        return {
            **self.model_dump(mode="json", include=first),
            **self.model_dump(mode="json", exclude_defaults=True),
        }
