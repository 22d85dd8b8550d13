"""Networks of transformers with random weights, saved to disk: what a user would download."""

import json

import torch


def write_clip(folder):
    """A CLIP of 16 px and 8 features whose tokenizer knows the small letters."""
    import transformers

    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    transformers.CLIPTokenizer(*files).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=size
        | {"vocab_size": 54, "max_position_embeddings": 12, "bos_token_id": 52,
           "eos_token_id": 53, "pad_token_id": 53},
        vision_config=size | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(folder)
    _write_processor(folder, "CLIPImageProcessor")
    return folder


def write_vit(folder):
    """A vision transformer of 16 px and 16 features, which knows no captions."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(folder)
    _write_processor(folder, "ViTImageProcessor")
    return folder


def _write_processor(folder, kind):
    settings = {
        "image_processor_type": kind, "size": {"height": 16, "width": 16}, "do_resize": True,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    if kind == "CLIPImageProcessor":
        settings |= {"size": {"shortest_edge": 16}, "do_center_crop": True,
                     "crop_size": {"height": 16, "width": 16}}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
