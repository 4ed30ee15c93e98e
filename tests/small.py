"""A Qwen2.5-VL and a Qwen3-VL small enough for tests, a tokenizer, pictures and prompts."""

from functools import cache

import numpy as np
import torch

from checkpoint import VisionConfig, VLMConfig
from processor import (
    ImageConfig,
    Processor,
    Tokenizer,
    chat,
    collate,
    process_images,
    process_videos,
    train_tokenizer,
)
from vlm import VLM

CORPUS = [
    "Where is the red cube? It is left of the blue sphere.",
    '{"point_2d": [41, 57], "label": "red cube"}',
    "system\nYou are a helpful assistant.\nuser\nassistant\n",
    "Pick up the cube, then stack it on the green one.",
] * 3


IMAGES = ImageConfig(patch_size=8, min_pixels=16 * 16, max_pixels=128 * 128)


GREY = tuple(int(255 * mean) for mean in IMAGES.image_mean)

SHAPES = {
    "tied, grouped": {"tie_word_embeddings": True},
    "untied, multi-head": {"tie_word_embeddings": False, "num_key_value_heads": 4},
}


@cache
def small_tokenizer():
    return train_tokenizer(CORPUS, vocab_size=300)


def small_config(tokenizer, **changes):
    vision = VisionConfig(
        depth=3,
        hidden_size=32,
        intermediate_size=40,
        num_heads=2,
        out_hidden_size=48,
        patch_size=8,
        window_size=32,
        fullatt_block_indexes=[1],
    )
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mrope_section": (2, 2, 2),
    }
    return VLMConfig(**{**sizes, **changes}, vision_config=vision).for_tokenizer(tokenizer)


def qwen3_config(tokenizer, **changes):
    vision = VisionConfig(
        model_type="qwen3_vl",
        depth=4,
        hidden_size=32,
        intermediate_size=40,
        num_heads=2,
        out_hidden_size=48,
        patch_size=8,
        num_position_embeddings=49,  # images in the tests have fewer rows than 7, and more
        deepstack_visual_indexes=[0, 2],
    )
    sizes = {
        "model_type": "qwen3_vl",
        "hidden_size": 48,
        "head_dim": 16,  # more than a quarter of 48
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mrope_section": (4, 2, 2),
    }
    return VLMConfig(**{**sizes, **changes}, vision_config=vision).for_tokenizer(tokenizer)


@cache
def qwen3_processor():
    half = (0.5, 0.5, 0.5)
    image = ImageConfig(8, 2, 2, 32 * 32, 128 * 128, image_mean=half, image_std=half)
    return Processor(Tokenizer(small_tokenizer().fast, qwen3=True), image)


def random_model(config, seed=0):
    """Weights large enough that every part matters: with 0.02 a wrong rotary angle would pass."""
    torch.manual_seed(seed)
    model = VLM(config).eval()
    for name, parameter in model.named_parameters():
        deviation = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = torch.randn_like(parameter) * deviation + (
            "norm" in name or "ln_q" in name
        )
    return model


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def prompts(tokenizer, config, side="left"):
    """Three prompts of different lengths, with their vision inputs: two non-square pictures and a video; nothing; a picture with partial windows."""
    seen = [
        ([picture(48, 96), picture(80, 32, 1)], [[picture(32, 48, seed) for seed in range(3, 6)]]),
        ([], []),
        ([picture(112, 80, 2)], []),
    ]
    rows, pixels, grids, clips = [], [], [], ()
    for i, (images, videos) in enumerate(seen):
        now = []
        if images:
            values, grid = process_images(images, IMAGES)
            pixels, grids, now = [*pixels, values], [*grids, grid], grid.tolist()
        if videos:
            clips = process_videos(videos, IMAGES)
            now = [*now, *clips[1].tolist()]
        content = (
            [{"type": "image"} for _ in images]
            + [{"type": "video"} for _ in videos]
            + [{"type": "text", "text": "Where is the red cube?" * (i + 1)}]
        )
        rows.append(chat(tokenizer, [{"role": "user", "content": content}], now)[0])
    batch = collate(rows, config.bos_token_id, side)
    return {
        **batch,
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.cat(grids),
        "pixel_values_videos": clips[0],
        "video_grid_thw": clips[1],
        "second_per_grid_ts": torch.tensor([0.5]),
    }


def token_types(batch, config):
    """0 text, 1 image, 2 video: without them transformers 5 silently uses plain positions."""
    return (batch["input_ids"] == config.image_token_id).int() + 2 * (
        batch["input_ids"] == config.video_token_id
    ).int()


def with_transformers(transformers, folder):
    """{shape: (our model, the same one that transformers loads from our folder)}"""
    pairs = {}
    for shape, changes in SHAPES.items():
        model = random_model(small_config(small_tokenizer(), **changes))
        model.save_pretrained(folder / shape)
        theirs, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder / shape, output_loading_info=True, dtype=torch.float32
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        pairs[shape] = model, theirs.eval()
    return pairs
