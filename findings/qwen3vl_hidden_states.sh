#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0).
# Expected: with output_hidden_states=True, hidden_states[i] is what block i reads: that holds for
#           Qwen2.5-VL, and for other models a truncated copy that ends there continues from it.
# Seen:     in Qwen3-VL the first entries (1, 2, 3 in the published models, one for each of
#           deepstack_visual_indexes) lack the deepstack features of the picture: entries are taken
#           from a block's output, the features are added behind the block. Text tokens and later
#           entries are right, so nothing looks wrong. Whoever reads or continues from an early block
#           (probe, draft head, action head) hooks the input of the block behind instead.
# Source:   this run; _can_record_outputs and Qwen3VLTextModel.forward in modeling_qwen3_vl.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

IMAGE = 90  # the token that stands for a piece of the picture
torch.manual_seed(0)
text = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
vision = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
config = Qwen3VLConfig(
    text_config=text,
    vision_config=vision,
    image_token_id=IMAGE,
    video_token_id=91,
    vision_start_token_id=92,
    vision_end_token_id=93,
)
model = Qwen3VLForConditionalGeneration(config).eval()

inputs = []


def keep(layer, args, kwargs):
    inputs.append(args[0] if args else kwargs["hidden_states"])


for layer in model.model.language_model.layers:
    layer.register_forward_pre_hook(keep, with_kwargs=True)

# 4 x 4 patches of 3 colours, 2 frames, 4 x 4 pixels; 2 x 2 patches are one token
ids = torch.tensor([[1, 92, IMAGE, IMAGE, IMAGE, IMAGE, 93, 2, 3]])
is_image = ids == IMAGE
with torch.no_grad():
    out = model(
        input_ids=ids,
        pixel_values=torch.randn(16, 3 * 2 * 4 * 4),
        image_grid_thw=torch.tensor([[1, 4, 4]]),
        mm_token_type_ids=is_image.int(),
        output_hidden_states=True,
    )

apart = []
for i, read in enumerate(inputs):
    difference = (out.hidden_states[i] - read).abs()
    apart.append(difference[is_image].max().item())
    words = difference[~is_image].max().item()
    print(f"hidden_states[{i}] against what block {i} reads:", end=" ")
    print(f"picture {apart[i]:.4f}, words {words:.4f}, mean size {read.abs().mean():.4f}")
    assert words == 0
assert apart[0] == apart[3] == 0
assert min(apart[1:3]) > 0.01, "the features are in now: this finding is out of date"
PYTHON
