"""What kohya and Stability's ModelSpec call the base models that files are made for."""

VERSIONS = {"sd15": "sd_v1", "sd21": "sd_v2", "sdxl": "sdxl_base_v1-0"}
ARCHITECTURES = {
    "sd_v1": "stable-diffusion-v1",
    "sd_v2": "stable-diffusion-v2-512",
    "sd_v2_v": "stable-diffusion-v2-768-v",
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
}


def kohya_version(family: str, prediction_type: str) -> str:
    """`ss_base_model_version` of a family; '' for one that kohya does not know.

    Args:
        prediction_type: 'epsilon' or 'v_prediction'.
    """
    version = VERSIONS.get(family, "")
    return f"{version}_v" if version == "sd_v2" and prediction_type == "v_prediction" else version


def adapter_metadata(version: str) -> dict[str, str]:
    """What an adapter says of the base model it is for: A1111 hides one that it takes for another
    family's.

    Args:
        version: as of `kohya_version`, or the name of a model that kohya does not know.
    """
    metadata = {"ss_base_model_version": version, "ss_v2": str(version.startswith("sd_v2"))}
    if architecture := ARCHITECTURES.get(version):
        metadata["modelspec.architecture"] = f"{architecture}/lora"
    return metadata
