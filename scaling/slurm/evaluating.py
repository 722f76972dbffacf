"""The second phase of a job: the downstream evaluations that its trained run still lacks.

It is a start of the run like one that trains and has a generation: so its hours count, it is
recorded where and on what it ran, and starts that finish nothing are counted. It is fenced by
nothing: whoever evaluates at the same time writes the same bytes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scaling import ClueError
from scaling.config import Evaluation
from scaling.rundir import RunDir, append_line

ROW_S = 1.0
"""Between two rows of metrics. [seconds]"""

Tell = Callable[[float, str], None]


def evaluate_missing(
    run: RunDir,
    start: Mapping[str, Any],
    evaluate: Callable[[Sequence[Evaluation], Tell], object],
    should_stop: Callable[[], bool],
) -> bool:
    """Evaluate what a trained run is wanted to be evaluated on and is not.

    Args:
        start: ``attempt``, ``job`` and ``world_size``, for the first row of the generation.
        evaluate: does it; told how to report the share that is done, and what is at work.
        should_stop: polled; what is evaluated by then stays.

    Returns:
        Whether nothing is missing any more; False if it was stopped.

    Raises:
        ClueError: an evaluation left no record; and whatever ``evaluate`` raises.
    """
    missing = run.evaluations()[1]
    if not missing or should_stop():
        return not missing
    result = run.result() or {}
    at = {"step": int(result["step"]), "seconds": float(result.get("seconds") or 0.0)}
    generation = run.start_generation(
        {
            **start,
            "resumed_from": at["step"],
            "seconds": at["seconds"],
            "time": time.time(),
            "missing": len(missing),
        }
    )
    began = written = time.monotonic()
    told = ""
    with open(run.metrics_path(generation), "ab") as file:

        def write() -> None:
            nonlocal written
            written = time.monotonic()
            row = {**at, "seconds": at["seconds"] + written - began}
            left = len(run.evaluations()[1])
            append_line(file, {"kind": "evaluation", **row, "missing": left})

        def tell(share: float, what: str) -> None:
            nonlocal told
            if what != told:
                print(f"evaluating {what}, {share:.0%} done", flush=True)
                told = what
            if time.monotonic() > written + ROW_S:
                write()

        try:
            while missing and not should_stop():
                evaluate([e for e in run.wanted() if e.key in missing], tell)
                before, missing = missing, run.evaluations()[1]  # some may be declared meanwhile
                if set(before) <= set(missing) and not should_stop():
                    raise ClueError(f"{run.path}: {', '.join(before)} left no record")
        finally:
            write()
    return not missing
