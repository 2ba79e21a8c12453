"""What the clients make of an adapter file's metadata."""

import json
from collections.abc import Mapping

JSON_OBJECTS = ("ss_tag_frequency", "ss_bucket_info", "ss_dataset_dirs")
EXPECTED = (
    "ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_base_model_version",
    "ss_output_name", "sshs_model_hash",
)  # fmt: skip


def metadata_notes(metadata: Mapping[str, str], family: str) -> list[str]:
    """Sentences on what A1111 and Forge would show wrongly, hide, or miss."""
    notes = []
    says_sdxl = metadata.get("ss_base_model_version", "").startswith("sdxl_")
    if family == "sdxl" and not says_sdxl:
        notes.append(
            "A1111 hides the file under an SDXL checkpoint and Forge lists it as unknown, as "
            "ss_base_model_version does not begin with 'sdxl_'."
            if metadata
            else "A1111 and Forge list the file as of an unknown version: it has no metadata."
        )
    if family != "sdxl" and says_sdxl:
        notes.append("A1111 hides the file under this base: ss_base_model_version says SDXL.")
    if family == "sd21" and metadata and metadata.get("ss_v2") != "True":
        notes.append("A1111 and Forge list the file as SD 1: ss_v2 is not the word 'True'.")
    for key in JSON_OBJECTS:
        if key in metadata and not _is_json_object(metadata[key]):
            notes.append(f"A1111's card of the file fails: {key} is not a JSON object.")
    if not _is_number(metadata.get("ss_training_started_at", "0")):
        notes.append("A1111's card of the file fails: ss_training_started_at is not a number.")
    absent = [key for key in EXPECTED if key not in metadata]
    if absent:
        notes.append(f"The metadata lacks {', '.join(absent)}.")
    return notes


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
