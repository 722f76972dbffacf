"""Which runs tell most for their price: criteria on the information matrix, and their optimum.

A run at x adds ``g g' / noise^2`` to the information on theta, where g is the gradient of the law's
ln y. ``Problem`` weighs two ends against each other, as a compound criterion (Atkinson, Donev and
Tobias 2007, chapter 21):

    (1 - w) / P ln det M  -  w sum_t share_t ln trace(T_t M^-1)               to be maximised

The first is D-optimality: all parameters together. The second are targets: ``T`` is the variance
of a prediction, or the decision that the law is for (``targets``). Targets alone would buy cheap
runs that leave exponents open which the target does not ask for; D-optimality alone does not know
what the law is for. The price is a constraint, not a divisor: the best design within a budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scaling.analysis.fitting.jets import Array

TARGET_WEIGHT = 0.8
COST_POWERS = (0.0, 0.3, 0.6, 1.0)
"""A design starts greedily once for each: by gain over cost to this power."""
EXCHANGE_PASSES = 5
ROUNDING = 1e-9
"""A design may exceed its budget by this share, for sums of floats round."""


@dataclass(frozen=True, eq=False)
class Problem:
    """Candidates for runs, under several laws at once.

    Attributes:
        gradients: ``[S, m, P]`` derivative of ln y by theta over the noise, by law and candidate.
        cost: ``[m]`` price of every candidate, positive.
        known: ``[S, P, P]`` information that there is already (prior and finished runs).
        targets: ``[T, S, P, P]`` what shall be known; T may be 0.
        shares: ``[T]`` of the targets among themselves; their sum is 1.
        weight: w above; 0 is D-optimality.
    """

    gradients: Array
    cost: Array
    known: Array
    targets: Array
    shares: Sequence[float] = ()
    weight: float = TARGET_WEIGHT

    def covariance(self, chosen: Sequence[int]) -> Array:
        """``[S, P, P]`` of theta after the chosen runs."""
        g = self.gradients[:, list(chosen)]
        return np.asarray(np.linalg.inv(self.known + np.swapaxes(g, 1, 2) @ g), dtype=np.float64)

    def value(self, chosen: Sequence[int]) -> float:
        """The criterion of a design, averaged over the laws."""
        return self._value(self.covariance(chosen))

    def _value(self, covariance: Array) -> float:
        entropy = -np.linalg.slogdet(covariance)[1] / covariance.shape[-1]
        value = (1 - self._w) * entropy
        if len(self.targets):
            variance = np.einsum("tspq,sqp->ts", self.targets, covariance)
            value = value - self._w * np.asarray(self.shares) @ np.log(variance)
        return float(value.mean())

    @property
    def _w(self) -> float:
        return self.weight if len(self.targets) else 0.0

    def gains(self, covariance: Array) -> Array:
        """``[m]`` what one more run at each candidate adds to the criterion (rank-one update)."""
        moved = self.gradients @ covariance
        leverage = np.einsum("smp,smp->sm", moved, self.gradients)
        gain = (1 - self._w) * np.log1p(leverage) / covariance.shape[-1]
        for share, target in zip(self.shares, self.targets, strict=True):
            before = np.einsum("spq,sqp->s", target, covariance)[:, None]
            less = np.einsum("smp,smp->sm", moved @ target, moved) / (1 + leverage)
            fall = np.minimum(less / before, 1 - 1e-12)
            gain = gain - self._w * share * np.log1p(-fall)
        return np.asarray(gain.mean(axis=0))


def choose(problem: Problem, budget: float, max_runs: int) -> list[int]:
    """The best design found within a budget: candidates, each at most once, in order of choice.

    Greedy by gain over cost^power, then exchanges of one run at a time, then filled up with what
    is left, until nothing changes; for every power of ``COST_POWERS``, of which the best is kept.

    Args:
        budget: highest sum of ``cost``.
        max_runs: most runs.
    """
    designs = []
    for power in COST_POWERS:
        chosen = _greedy(problem, budget, max_runs, power, [])
        for _ in range(EXCHANGE_PASSES):
            better = _exchange(problem, budget, chosen)
            better = _greedy(problem, budget, max_runs, 0.0, better)
            if better == chosen:
                break
            chosen = better
        designs.append(chosen)
    return max(designs, key=problem.value)


def _affordable(problem: Problem, budget: float, chosen: Sequence[int]) -> npt.NDArray[np.bool_]:
    left = budget * (1 + ROUNDING) - float(problem.cost[list(chosen)].sum())
    free = problem.cost <= left
    free[list(chosen)] = False
    return np.asarray(free)


def _greedy(
    problem: Problem, budget: float, max_runs: int, power: float, start: Sequence[int]
) -> list[int]:
    chosen = list(start)
    while len(chosen) < max_runs:
        free = _affordable(problem, budget, chosen)
        if not free.any():
            break
        worth = problem.gains(problem.covariance(chosen)) / problem.cost**power
        chosen.append(int(np.argmax(np.where(free, worth, -np.inf))))
    return chosen


def _exchange(problem: Problem, budget: float, start: Sequence[int]) -> list[int]:
    """One pass: every run in turn gives way to a better one that the budget allows."""
    chosen = list(start)
    value = problem.value(chosen)
    for i in range(len(chosen)):
        rest = chosen[:i] + chosen[i + 1 :]
        covariance = problem.covariance(rest)
        free = _affordable(problem, budget, rest)
        j = int(np.argmax(np.where(free, problem.gains(covariance), -np.inf)))
        trial = [*chosen[:i], j, *chosen[i + 1 :]]
        if j != chosen[i] and (new := problem.value(trial)) > value + 1e-9:
            chosen, value = trial, new
    return chosen
