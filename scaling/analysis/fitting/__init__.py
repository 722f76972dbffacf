"""The fitter: laws as data, one engine, error bars and verdicts. It works on any table of runs."""
