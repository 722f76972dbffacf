"""What pretraining loss buys downstream: laws per task and pooled, chained from the configuration,
and the test whether equal loss gives equal transfer whichever factor bought it."""
