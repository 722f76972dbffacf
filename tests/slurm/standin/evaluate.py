"""Stand-in for ``scaling.transfer.evaluate`` in the processes of test jobs.

Leaves the records that evaluation leaves and computes nothing. ``<root>/evaluation.json`` tells it
how: ``seconds`` of each, ``kill_at`` (dies of SIGKILL before that record), ``stop_at`` (SIGTERM
before it), and ``error``, which it raises. Every evaluation that begins is a line of
``<run>/evaluated.log``.
"""

import json
import os
import signal
import time

from scaling import ClueError
from scaling.files import write_json


def evaluate(run, corpus, wanted, *, progress=None, should_stop=bool):
    how = {}
    if (run.root / "evaluation.json").exists():
        how = json.loads((run.root / "evaluation.json").read_text())
    for number, evaluation in enumerate(wanted):
        path = run.path / "transfer" / f"{evaluation.key}.json"
        if path.exists():
            continue
        if should_stop():
            return
        with open(run.path / "evaluated.log", "a") as log:
            log.write(f"{evaluation.task}\n")
        time.sleep(how.get("seconds", 0.0))
        if how.get("kill_at") == evaluation.task:
            os.kill(os.getpid(), signal.SIGKILL)
        if how.get("stop_at") == evaluation.task:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if how.get("error"):
            raise ClueError(how["error"])
        write_json(path, {"task": evaluation.task, "rows": []})
        progress((number + 1) / len(wanted), evaluation.key)
