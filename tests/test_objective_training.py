"""Every objective teaches: an adapter lowers its error on draws that it was not trained on."""

import pytest
import torch
from conftest import PICTURE_PX, choose

from lora_sd import inject
from lora_sd.data.folder import read_folders
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.store import MemoryStore
from lora_sd.data.training_data import TrainingData
from lora_sd.data.views import make_views
from lora_sd.objective import Objective
from lora_sd.train_step import errors_of

STEPS, UNSEEN, PICTURES = 12, 3, 6
BOTH = ("epsilon", "v_prediction")
WEIGHTINGS = [
    (kind, {"weighting": name})
    for kind in BOTH
    for name in ("none", "min_snr", "soft_min_snr", "debiased")
]
OTHERS = [
    {"error": "l1"},
    {"error": "huber", "huber_schedule": "constant"},
    {"error": "huber", "huber_schedule": "exponential"},
    {"error": "huber", "huber_schedule": "snr"},
    {"error": "smooth_l1", "huber_schedule": "snr"},
    {"noise_offset": 0.1},
    {"multires_noise_iterations": 6},
    {"input_perturbation": 0.1},
    {"timesteps": "logit_normal", "logit_mean": 0.5},
    {"timesteps": "biased", "timestep_bias": 1.0},
    {"timesteps": "biased", "timestep_bias": -1.0},
    {"min_timestep": 200, "max_timestep": 800},
]


@pytest.mark.parametrize(
    ("kind", "options"),
    [*WEIGHTINGS, *(("epsilon", options) for options in OTHERS)],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_it_learns(base, image_folder, kind, options):
    base.set_prediction_type(kind)
    views, _ = make_views(
        read_folders([FolderOptions(image_folder, resolution_px=(PICTURE_PX,))]), 8
    )
    objective = Objective(base.noise_schedule(), **options)
    data = TrainingData(base, views, MemoryStore(), objective, seed=0, step_pictures=PICTURES)
    data.encode(lambda done, of: False)
    layers = inject.attach(base.unet, choose(base.unet, "full"))
    learning = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=4e-2)

    def loss(step):
        (batch,) = data.batches(step, PICTURES)
        return (errors_of(base, objective, batch, 75) * batch.weights).sum()

    @torch.no_grad()
    def unseen():
        return float(sum(loss(step) for step in range(1000, 1000 + UNSEEN)) / UNSEEN)

    before = unseen()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(step).backward()
        assert all(p.grad.isfinite().all() for p in learning if p.grad is not None)
        optimizer.step()
    assert unseen() < 0.9 * before
