"""Captioning models of a few random weights on disk, with their processors."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import (
    BartTokenizerFast,
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    PreTrainedModel,
    ProcessorMixin,
)

WORDS = ["a", "the", "red", "blue", "cat", "dog", "fox", "ink", "pen", "on", "of", "with"]
LETTERS = [chr(code) for code in range(33, 127)]
TAGS = {  # name: (category, weights of the picture's mean blue, green and red, bias)
    "general": (9, (0, 0, 0), 1),
    "sensitive": (9, (0, 0, 0), -1),
    "blue_sky": (0, (20, -10, -10), -5),
    "red_hair": (0, (-10, -10, 20), -5),
    "white_background": (0, (10, 10, 10), -20),
    "^_^": (0, (0, 0, 0), 0.2),
    "some_hero": (4, (-10, -10, 20), -9),
}


def make_blip(folder: Path) -> Path:
    """A BLIP that writes a few words."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(tokens))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), extra_special_tokens=["[DEC]"])
    text = dict(
        vocab_size=len(tokens),
        hidden_size=8,
        encoder_hidden_size=8,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=5,
        pad_token_id=0,
        eos_token_id=3,
        sep_token_id=3,
    )
    vision = dict(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": 16, "width": 16}), tokenizer)
    return _save(BlipForConditionalGeneration(config), processor, folder, seed=4)


def make_florence(folder: Path) -> Path:
    """A Florence-2 that writes a few letters."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *LETTERS, "Ġ"]
    tokenizer = BartTokenizerFast(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        extra_special_tokens={"image_token": "<image>"},
    )
    vision = dict(
        depths=(1,),
        patch_size=(7,),
        patch_stride=(4,),
        patch_padding=(3,),
        patch_prenorm=(False,),
        embed_dim=(8,),
        num_heads=(2,),
        num_groups=(2,),
        window_size=4,
        projection_dim=8,
        max_temporal_embeddings=4,
        max_position_embeddings=10,
    )
    text = dict(
        vocab_size=len(tokenizer),
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=200,
    )
    config = Florence2Config(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.image_token_id,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    pictures = CLIPImageProcessorPil(
        size={"height": 32, "width": 32}, do_center_crop=False, image_seq_length=65
    )
    processor = Florence2Processor(pictures, tokenizer)
    return _save(Florence2ForConditionalGeneration(config), processor, folder, seed=3)


def _save(model: PreTrainedModel, processor: ProcessorMixin, folder: Path, seed: int) -> Path:
    """With weights of a seed with which different pictures get different captions."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.data = torch.randn(weight.shape)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_tagger(folder: Path, batch: int | str = "n", side_px: int = 16) -> Path:
    """A WD14 tagger that looks at mean colours; `batch` 1: one picture at a time, as older ones."""
    from onnx import TensorProto, checker, helper, numpy_helper, save_model

    folder.mkdir(parents=True)
    rows = [f"{i},{name},{tag[0]},1" for i, (name, tag) in enumerate(TAGS.items())]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]))
    (folder / "config.json").write_text(json.dumps({"architecture": "a_vit"}))  # timm's
    constants = {
        "scale": np.array(255, np.float32),
        "weights": np.array([tag[1] for tag in TAGS.values()], np.float32).T,
        "bias": np.array([tag[2] for tag in TAGS.values()], np.float32),
        "axes": np.array([1, 2], np.int64),
    }
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
            helper.make_node("Div", ["mean", "scale"], ["colours"]),
            helper.make_node("MatMul", ["colours", "weights"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["sum"]),
            helper.make_node("Sigmoid", ["sum"], ["tags"]),
        ],
        "tagger",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, side_px, side_px, 3])],
        [helper.make_tensor_value_info("tags", TensorProto.FLOAT, [batch, len(TAGS)])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    checker.check_model(model)
    save_model(model, folder / "model.onnx")
    return folder
