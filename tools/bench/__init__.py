"""The benchmark: what a training step, a run and a picture cost, beside what they could cost.

    python -m tools.bench [--quick] [--only PART,...] [--json FILE]

Figures of different machines, or of different moments of a busy one, are not compared: the sides
of a comparison take turns in one process, round by round, and a ratio is the median of the rounds'
own ratios. On the CPU one thread computes, and what is taken is its processor time, which other
programs on the machine lengthen little; on a GPU it is wall time between synchronisations. What
starts processes of its own (`whole_run`) takes wall time, and tells processor time beside it.
"""

import os

# Before torch is imported; threads that spin while they wait would lengthen every figure.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
