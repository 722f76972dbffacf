"""One rank of a run, as a process: ``rank.py ROOT RUN_KEY CORPUS``.

With FORK it is all ranks, so many: processes that share what one of them has imported.
"""

import json
import os
import sys
import time
from pathlib import Path

import fp16

from scaling.config import TrainSettings
from scaling.data.corpus import Corpus
from scaling.rundir import RunDir
from scaling.train.loop import train

root, run_key, corpus = sys.argv[1:]
stage = os.environ.get("ZERO_STAGE")
settings = {
    "threads": 1,
    "zero_stage": int(stage) if stage else None,
    **json.loads(os.environ.get("SETTINGS", "{}")),
}
if forks := int(os.environ.get("FORK", "0")):
    os.environ.update(WORLD_SIZE=str(forks), DS_ACCELERATOR="cpu")
    import deepspeed  # noqa: F401
    import torch._inductor.compile_fx  # noqa: F401  # by DeepSpeed, for nothing

    for rank in range(forks):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        if not os.fork():
            break
    else:
        ended = [os.wait()[1] for _ in range(forks)]
        sys.exit(any(ended))
if "FP16" in os.environ:
    fp16.accept(**json.loads(os.environ["FP16"]))
last, done = int(os.environ.get("STOP_AFTER", sys.maxsize)), 0


def progress(step: int, *_: object) -> None:
    global done
    done = step
    time.sleep(float(os.environ.get("STEP_SECONDS", "0")))


train(
    RunDir(Path(root), run_key),
    Corpus.open(Path(corpus)),
    TrainSettings.model_validate(settings),
    progress=progress,
    should_stop=lambda: done >= last,
)
