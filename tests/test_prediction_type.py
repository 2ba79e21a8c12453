"""What a base predicts, told by its loss: the embedded base, and one made to predict the noise."""

import numpy as np
import pytest
import torch
from conftest import PROJECT
from PIL import Image

from lora_sd import prediction_type
from lora_sd.base_loading import load_base_model
from lora_sd.errors import BaseModelError

CPU = torch.device("cpu")
PICTURES = sorted((PROJECT / "assets" / "ink-icons").glob("*.png"))[:8]


def probe(base):
    """(latents, text, time ids) of the example pictures."""
    pixels = np.stack(
        [np.asarray(Image.open(file).convert("RGB").resize((64, 64))) for file in PICTURES]
    )
    latents, _ = base.encode_picture(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1)
    texts = [file.with_suffix(".txt").read_text().strip() for file in PICTURES]
    return latents, base.encode_text(texts), None


def predicting_noise(base, monkeypatch):
    """Let the base tell the noise that its velocity means."""
    schedule, predict = base.noise_schedule(), base.predict

    def as_noise(noisy, timesteps, text, time_ids=None, unet=None):
        velocity = predict(noisy, timesteps, text, time_ids, unet)
        alpha = schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return (1 - alpha).sqrt() * noisy + alpha.sqrt() * velocity

    monkeypatch.setattr(base, "predict", as_noise)
    return base


def test_what_is_right_passes_without_a_word():
    base = load_base_model("tiny-sd", CPU, torch.float32)
    assert "The base's loss" in prediction_type.check(base, *probe(base))[0]


def test_what_is_wrong_stops_with_both_figures():
    base = load_base_model("tiny-sd", CPU, torch.float32, prediction_type="epsilon")
    with pytest.raises(BaseModelError, match=r"\d.\d\d under epsilon, 0.\d\d under v_prediction"):
        prediction_type.check(base, *probe(base))


def test_a_noise_model_said_to_predict_v_stops(monkeypatch):
    base = load_base_model("tiny-sd", CPU, torch.float32, prediction_type="v_prediction")
    base = predicting_noise(base, monkeypatch)
    losses = prediction_type.measured_losses(base, *probe(base))
    assert losses["epsilon"] < 0.1 and losses["v_prediction"] > 1.3
    with pytest.raises(BaseModelError, match="Set base.prediction_type to epsilon"):
        prediction_type.check(base, *probe(base))


def test_what_nobody_said_is_decided_and_told():
    base = load_base_model("tiny-sd", CPU, torch.float32, prediction_type="epsilon")
    base.prediction_type_is_known = False
    (notice,) = prediction_type.check(base, *probe(base))
    assert base.prediction_type == base.noise_schedule().config.prediction_type == "v_prediction"
    assert "'v_prediction'" in notice and "under epsilon" in notice
    assert "The base's loss" in prediction_type.check(base, *probe(base))[0]


@pytest.mark.parametrize("said", ["epsilon", "v_prediction"])
def test_random_weights_never_stop_a_run(model_folder, said):
    base = load_base_model(str(model_folder), CPU, torch.float32, prediction_type=said)
    for seed in range(20):
        torch.manual_seed(seed)
        for weight in base.unet.parameters():
            weight.normal_(std=0.1)
        latents = torch.randn(1, 4, 8, 8)
        assert prediction_type.check(base, latents, base.encode_text(["a"]), None)


def test_random_weights_of_which_nothing_is_said_stay_what_they_are(base):
    base.prediction_type_is_known = False
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    (notice,) = prediction_type.check(base, latents, base.encode_text(["a"]), None)
    assert "Neither" in notice and base.prediction_type == "epsilon"


def test_pictures_of_one_colour_say_nothing(base):
    latents = torch.full((1, 4, 8, 8), 0.2)
    assert prediction_type.check(base, latents, base.encode_text(["a"]), None) == []


def test_a_damaged_base_is_said(base):
    base.unet.conv_in.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(BaseModelError, match="not finite numbers"):
        prediction_type.check(base, torch.randn(1, 4, 8, 8), base.encode_text(["a"]), None)
