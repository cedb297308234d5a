"""The plainest formulation of each method and refiner, one file of the same name each: references for speed and tests.

Knows nothing of runs or jobs, and takes from a method only what both must share: weights and constants.
"""
