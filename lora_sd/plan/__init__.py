"""What a run needs before it starts: memory by part, time, disk; and which cards it fits.

| file | |
| --- | --- |
| making.py | the plan of a run's settings |
| facts.py | the plan, as plain values |
| setting.py | what memory depends on |
| prediction.py | memory by phase and part, from shapes |
| simulation.py | the passes of a run, on tensors without numbers |
| shaped_base.py, packed.py | a base model without numbers, its layers in few bits too |
| live_memory.py | what is alive while something runs |
| optimizer_states.py | what each optimizer keeps |
| measurement.py | a few real steps |
| cards.py | what fits which graphics card |
| base_configs.py, pictures.py | what is known of base and pictures without loading them |
"""

from lora_sd.plan.facts import ASSUMED, Plan
from lora_sd.plan.making import make_plan

__all__ = ["ASSUMED", "Plan", "make_plan"]
