"""One rank of a run, as a process: ``rank.py ROOT RUN_KEY CORPUS``."""

import os
import sys
import time
from pathlib import Path

from scaling.config import TrainSettings
from scaling.data.corpus import Corpus
from scaling.rundir import RunDir
from scaling.train.loop import train

root, run_key, corpus = sys.argv[1:]
stage = os.environ.get("ZERO_STAGE")
train(
    RunDir(Path(root), run_key),
    Corpus.open(Path(corpus)),
    TrainSettings(zero_stage=int(stage) if stage else None, threads=1),
    progress=lambda *_: time.sleep(float(os.environ.get("STEP_SECONDS", "0"))),
)
