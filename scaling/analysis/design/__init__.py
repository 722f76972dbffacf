"""Design of runs: what a planned grid can tell (``audit``), and which runs to do next (``next``).

Neither needs a loss: both ask what the runs' positions alone would do to the error bars of an
assumed law (docs/decisions/0014-design-of-runs.md).
"""
