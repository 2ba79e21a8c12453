"""Build lora_sd/clients/tables/ from raw tables: `python -m tools.client_tables RAW`.

RAW is a folder of json files, one a client and base model, which were made by running each client's
own key mapping on models without weights. Here they are cut down to what the rules in
lora_sd/clients/ read, and packed: one file a base model. `lora_sd/clients/tables/README.md` names
the versions of the clients.
"""

import json
import lzma
import sys
from pathlib import Path
from typing import Any

from lora_sd import durable
from lora_sd.clients.tables import FOLDER, TABLES


def packed(raw: Path, family: str) -> bytes:
    """The table file of one base model."""

    def read(name: str) -> dict[str, Any]:
        return json.loads((raw / f"{name}_{family}.json").read_text(encoding="utf-8"))

    comfy, forge = read("comfy_keys"), read("forge_keys")
    if comfy["unet"] != forge["unet"]:
        raise ValueError("ComfyUI and Forge no longer share their UNet keys")
    table = {
        "modules": {
            component: [[m.get("file_name", m["name"]), m["cls"], m["weight_shape"]] for m in rows]
            for component, rows in read("diffusers_modules").items()
            if component != "_about"
        },
        "comfy_unet": comfy["unet"],
        "comfy_text": comfy["clip"],
        "forge_text": forge["clip"],
        "a1111": {
            key: [e["layer"], e["type"], e["weight_shape"], e["lora"], e.get("mha")]
            for key, e in read("a1111_keys")["prefixes"].items()
        },
        "invoke": {k: e["weight_shape"] for k, e in read("invoke_keys")["prefixes"].items()},
        "kohya": {k: e["base_weight"] for k, e in read("kohya_keys")["with_conv"].items()},
    }
    return lzma.compress(json.dumps(table, separators=(",", ":")).encode(), preset=9)


if __name__ == "__main__":
    for name in TABLES:
        durable.write_bytes(FOLDER / f"{name}.json.xz", packed(Path(sys.argv[1]), name))
