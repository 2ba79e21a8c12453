"""Nothing is wrong without a word: table C of RELIABILITY.md, 5.1.

Where each row is tested:

    C1, C2, C4   test_bad_numbers; C4 also test_checkpoint, test_formats
    C3, C5       test_cache, test_base_model (named in test_bad_numbers)
    C6           here: a trained file in a fresh pipeline of diffusers
    C7           here: alphas and ranks
    C8           test_inject (every single layer has an effect), test_formats_diffusers (every layer
                 at our scale)
    C9           test_oracle_peft, test_oracle_lycoris, test_formats_kohya
    C10          test_formats_kohya (values lost to float16 are counted), test_verify (rounding)
    C11          test_inject (a fresh adapter changes nothing to the last bit), test_layers
    C12          test_generate (at scale 0 it is the base), test_layers (a layer is its formula)
    C13          test_inject (loading tells every difference at once)
    C14          test_merge (a thousand changes), test_inject (random changes of live adapters)
    C15          here: twice
    C16          test_out_of_memory, test_samples; test_checkpoint for a save that fails
    C17          test_samples (one that fails is told and marked), test_train
    C18          here: the frozen base, and what the optimizer has
    C19          here: gradients; test_train and test_train_data for losses
    C20          here: few pictures, fewer than a batch; test_folder for none
    C21          test_train_adapters (the same file to the byte); new processes in tests/torture
"""

from pathlib import Path

import pytest
import torch
from conftest import make_unet, randomise
from diffusers import StableDiffusionPipeline
from test_train import losses, train

from lora_sd import inject, layer_choice, layer_names, train_step
from lora_sd.errors import UserError
from lora_sd.formats import load_adapter, save_adapter
from lora_sd.merge import MergedWeights
from lora_sd.train_step import TrainStep


def test_a_trained_file_does_in_a_fresh_pipeline_what_it_does_here_c6(
    run_settings, base, model_folder
):
    run_settings["train"]["steps"] = 20
    run_settings["output"]["dtype"] = "float32"
    file = train(run_settings).adapter_file

    def drawn(pipeline) -> torch.Tensor:
        return pipeline(
            "a red wall", num_inference_steps=4, guidance_scale=3, width=16, height=16,
            generator=torch.Generator().manual_seed(4), output_type="latent",
        ).images  # fmt: skip

    plain = drawn(base.pipeline())
    merged = MergedWeights(base.components)
    merged.set([(load_adapter(file, layer_names.layer_shapes(base.components)), 1.0)])
    ours = drawn(base.pipeline())
    fresh = StableDiffusionPipeline.from_pretrained(model_folder, safety_checker=None)
    fresh.set_progress_bar_config(disable=True)
    fresh.load_lora_weights(str(file.parent), weight_name=file.name)
    theirs = drawn(fresh)
    assert float((ours - plain).abs().max()) > 1e-3
    # Latents of up to 57: other orders of adding up differ by 3e-5 to 6e-5, in ten runs.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * float(ours.abs().max()))


@pytest.mark.parametrize("rank", [1, 4, 16, 128])
@pytest.mark.parametrize("alpha", ["1", "half", "rank", "double"])
@pytest.mark.parametrize("file_format", ["kohya", "diffusers"])
def test_alpha_over_rank_is_the_scale_after_export_too_c7(tmp_path, rank, alpha, file_format):
    amount = {"1": 1, "half": rank / 2, "rank": rank, "double": 2 * rank}[alpha]
    unet = make_unet(block_out_channels=(64, 128), cross_attention_dim=128)
    before = {name: p.clone() for name, p in unet.named_parameters()}
    shapes = layer_names.layer_shapes(unet)
    options = {"rank": rank, "alpha": amount, "conv_rank": rank, "conv_alpha": amount}
    fits = [name for name, shape in shapes.items() if min(shape[0], shape[1]) >= rank]
    chosen = {name: shapes[name] for name in fits if "to_k" in name or "conv1" in name}
    inject.attach(unet, layer_choice.choose_layers(chosen, "attention-conv", **options))
    randomise(unet)
    layers = inject.lora_layers(unet)
    assert layers and all(layer.scaling == amount / rank for layer in layers.values())
    file = tmp_path / "a.safetensors"
    save_adapter(inject.collect(unet), file, torch.float32, file_format)
    deltas = {name: layer.weights().delta() for name, layer in layers.items()}
    inject.detach(unet)
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters())
    read = load_adapter(file, shapes)
    for name, delta in deltas.items():
        torch.testing.assert_close(read.layers[name].delta(), delta, atol=1e-5, rtol=1e-5)
        assert read.layers[name].scaling == pytest.approx(amount / rank)


def test_loaded_or_unloaded_twice_it_is_there_once_or_not_at_all_c15(unet, unet_inputs, adapter):
    before = unet(*unet_inputs).sample
    merged = MergedWeights({"unet": unet})
    merged.set([(adapter, 1.0)])
    once = unet(*unet_inputs).sample
    merged.set([(adapter, 1.0)])
    assert torch.equal(unet(*unet_inputs).sample, once) and not torch.equal(once, before)
    merged.set([])
    merged.clear()
    merged.clear()
    assert torch.equal(unet(*unet_inputs).sample, before)
    inject.attach_adapter(unet, adapter)
    live = unet(*unet_inputs).sample
    with pytest.raises((UserError, ValueError)):
        inject.attach_adapter(unet, adapter)
    assert torch.equal(unet(*unet_inputs).sample, live)
    inject.detach(unet)
    inject.detach(unet)
    assert torch.equal(unet(*unet_inputs).sample, before)


@pytest.mark.parametrize("text_encoder", [False, True])
def test_the_base_is_frozen_and_the_optimizer_has_the_adapter_alone_c18(
    run_settings, monkeypatch, text_encoder
):
    run_settings["adapter"]["text_encoder"] = text_encoder
    run_settings["data"]["cache"] = "memory"
    gradients, step = TrainStep.gradients, torch.optim.AdamW.step
    kept, learned, had = {}, [], set()

    def frozen(base) -> dict[str, torch.Tensor]:
        parts = {"unet": base.unet, "text_encoder": base.text_encoder}
        return {
            f"{part}.{name}": parameter
            for part, module in parts.items()
            for name, parameter in [*module.named_parameters(), *module.named_buffers()]
            if not parameter.requires_grad and not parameter.is_meta
        }

    def watched(self, number):
        if not kept:
            kept.update({name: one.clone() for name, one in frozen(self.base).items()})
            for part in self.base.components.values():
                learned.extend(one for one in part.parameters() if one.requires_grad)
        now = frozen(self.base)
        assert now.keys() == kept.keys()
        assert all(torch.equal(one, kept[name]) for name, one in now.items())
        return gradients(self, number)

    def noted(self, *arguments, **options):
        had.update(id(one) for group in self.param_groups for one in group["params"])
        return step(self, *arguments, **options)

    monkeypatch.setattr(TrainStep, "gradients", watched)
    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    train(run_settings)
    assert kept and had == {id(one) for one in learned}
    encoder = [name for name in kept if name.startswith("text_encoder") and "weight" in name]
    assert bool(encoder) == text_encoder  # it is let go where it does not learn


def test_accumulated_gradients_are_those_of_the_whole_batch_c19(run_settings, monkeypatch):
    clip, found = train_step.Accelerator.clip_grad_norm_, []

    def noted(self, parameters, most):
        found.append([one.grad.clone() for one in parameters if one.grad is not None])
        return clip(self, parameters, most)

    monkeypatch.setattr(train_step.Accelerator, "clip_grad_norm_", noted)
    run_settings["train"] |= {"steps": 1, "batch_size": 4}
    train(run_settings)
    run_settings["train"] |= {"batch_size": 1, "gradient_accumulation": 4}
    run_settings["output"]["name"] = "accumulated"
    train(run_settings)
    whole, parts = found
    assert len(whole) == len(parts) and any(one.any() for one in whole)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("pictures", "batch"), [(1, 1), (1, 4), (5, 8)])
def test_every_step_is_whole_however_few_pictures_there_are_c20(
    run_settings, image_folder, monkeypatch, pictures, batch
):
    for number in range(pictures, 5):
        (image_folder / f"{number}.png").unlink()
        (image_folder / f"{number}.txt").unlink()
    run_settings["train"] |= {"steps": 3, "batch_size": batch}
    errors_of, seen = train_step.errors_of, []

    def noted(base, objective, batch, *arguments):
        seen.append((len(batch.names), float(batch.weights.sum())))
        return errors_of(base, objective, batch, *arguments)

    monkeypatch.setattr(train_step, "errors_of", noted)
    run = train(run_settings)
    assert seen == [(batch, pytest.approx(1.0))] * 3
    assert len(losses(run)) == 3 and run.adapter_file.is_file()


def test_no_pictures_are_an_error_before_anything_is_made_c20(run_settings, image_folder):
    for file in image_folder.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="pictures"):
        train(run_settings)
    assert not Path(run_settings["output"]["folder"]).exists()
