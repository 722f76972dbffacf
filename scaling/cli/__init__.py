"""The command line: every verb names first what it works on.

A verb reads its arguments, calls one or two functions of the package and prints what they return.
Whatever is heavy is imported inside the verb, so that ``--help`` and ``status`` start at once; no
module here imports torch. An error meant for people (``ClueError``) is one paragraph on stderr and
exit status 2; Ctrl-C is exit status 130.
"""

import sys

try:  # Ctrl-C in the first tenths of a second finds Python here
    from scaling.cli import (  # noqa: F401  (their verbs)
        allocate,
        baselines,
        corpora,
        design,
        embed,
        fit,
        plans,
        rollout,
        runs,
        studies,
        sweeps,
    )
    from scaling.cli.app import app, main
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    raise SystemExit(130) from None

__all__ = ["app", "main"]
