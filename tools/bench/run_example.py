"""Run diffusers' example script where torchvision is not installed.

    python run_example.py SCRIPT ARGUMENTS...

The script takes six transforms from torchvision; `example_transforms` stands in for it, for this
process alone. What transformers, diffusers and datasets find installed is settled before.
"""

import importlib.util
import runpy
import sys
import types

if __name__ == "__main__":
    if importlib.util.find_spec("torchvision") is None:
        import datasets  # noqa: F401
        import diffusers.utils  # noqa: F401
        import example_transforms
        import transformers.utils

        transformers.utils.is_torchvision_available()
        stand_in = types.ModuleType("torchvision")
        vars(stand_in)["transforms"] = example_transforms
        sys.modules["torchvision"] = stand_in
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
