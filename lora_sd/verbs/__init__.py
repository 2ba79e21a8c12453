"""The verbs of `python -m lora_sd`, a file each: the verb as a function, its flags, and `run`.

A verb's file has `DESCRIPTION` and `EXAMPLE` for its help, `add_arguments(parser)` and
`run(options)`, which returns the exit status. It imports torch only inside its functions, so that
`--help` and mistyped flags are answered at once.
"""

SUMMARIES = {
    "check-data": "check a folder of pictures before training: sizes, crops, captions, duplicates",
    "plan": "say what memory, time and disk a run needs, and which cards it fits",
    "inspect": "show what an adapter holds: ranks, norms, spectrum, metadata; a table or a plot",
    "convert": "write an adapter in another format or precision",
    "resize": "lower an adapter's rank: to a rank, a share of its energy, or a file size",
    "combine": "make one adapter of several, each at its scale",
    "extract": "make an adapter of what a fine-tuned model has more than its base",
    "bake": "put adapters into a base model for good",
    "verify": "check that an adapter file loads whole in every client",
    "caption": "write captions for pictures that have none, with BLIP, Florence-2 or a WD14 tagger",
}
"""What each verb does, in a line; its file has the same name, with '_' for '-'."""
