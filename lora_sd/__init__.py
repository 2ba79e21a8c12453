"""Train Stable Diffusion LoRA adapters on a folder of images, and use them at once."""

import logging
import os

__version__ = "0.1.0"

# Read by OpenMP when torch is first imported, which only modules below this one do: threads that
# spin while they wait make a busy CPU up to 20 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# transformers otherwise prints notices about torchvision, which is not needed.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# torchao, which diffusers imports, warns of every GPU kernel that this machine cannot run; torch of
# what torchao still does in an old way; and diffusers of an older torchao's parts that it misses.
for _warns in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_warns).setLevel(logging.ERROR)
