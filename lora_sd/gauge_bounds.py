"""At what size of its update an adapter calls for a word; the app tells by them, too.

The measure is ||dW|| / ||W||, as `gauge` has it.
"""

NIL, NIL_SHARE = 1e-4, 0.1
"""What an update should have reached after so many of all steps. AdamW moves `lora_up` by about the
learning rate a step: on the miniature base, 1e-7 gave 1.6e-6 after 40 steps, 2e-3 0.014 after 20.
In proportion, what is below 1e-4 after a tenth of the steps ends below 1e-3."""
EXPLODING = 1.0
"""Above this an adapter is more than the base that it adapts: a rate of 1 gave 3 after 5 steps and
34 after 10."""
LARGE = 0.3
"""From there on, fast growth is told, too."""
