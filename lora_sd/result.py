"""What a finished run leaves: the adapter, read back and checked, and the grid of scales."""

import logging
from collections.abc import Sequence

import torch

from lora_sd import adapter_metadata, inject
from lora_sd.base_model import BaseModel
from lora_sd.config import Config
from lora_sd.data.views import View
from lora_sd.formats import save_adapter
from lora_sd.run_folder import RunFolder
from lora_sd.verify import check_file

log = logging.getLogger("lora_sd")


def save_result(
    config: Config,
    base: BaseModel,
    run: RunFolder,
    step: int,
    shown: Sequence[View],
    file_format: str,
    told: Sequence[str],
) -> str:
    """Write the result, read it back, and say how it compares with what was trained.

    Args:
        shown: the pictures that were trained on.
        told: what was said before the start, and need not be said again.
    """
    adapter = inject.collect(base.components)
    adapter.metadata = {
        **adapter_metadata.describe_run(config, base, run.name),
        **adapter_metadata.describe_data(shown),
        **adapter_metadata.describe_result(run, run.sample_file(step, 0)),
        "ss_steps": str(step),  # fewer than was planned, where patience ended the run
    }
    dtype = getattr(torch, config.output.dtype)
    notices = save_adapter(adapter, run.adapter_file, dtype, file_format)
    log.info("Adapter: %s", run.adapter_file)
    report = check_file(run.adapter_file, base.family, adapter, base)
    for notice in notices:
        if notice not in told:
            log.warning("Note: %s", notice)
    log.info("Read back: %s", report.summary())
    for line in report.lines():
        if line not in told:
            log.info("  %s", line)
    return report.summary()
