"""Does it help? Tasks, arms and one protocol that treats every arm alike: `python -m bench.convergence TASK`."""
