"""vlm.py keeps its promises: it matches transformers, cached = uncached, padding has no effect."""

import numpy as np
import pytest
import torch
from small import (
    GREY,
    IMAGES,
    SHAPES,
    picture,
    prompts,
    random_model,
    small_config,
    small_tokenizer,
    token_types,
    with_transformers,
)

from checkpoint import VLMConfig, hub_weights
from positions import mrope_positions
from processor import process_images, process_videos
from vlm import VLM, Cache, attend


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="parity: pip install transformers")
    return with_transformers(transformers, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_hidden_states_match_transformers(reference, tokenizer, shape, side):
    ours, theirs = reference[shape]
    assert ("lm_head.weight" in ours.state_dict()) == shape.startswith("untied")
    batch = prompts(tokenizer, ours.config, side)
    with torch.no_grad():
        expected = theirs(
            **batch, mm_token_type_ids=token_types(batch, ours.config), output_hidden_states=True
        )
        real = batch["attention_mask"].bool()
        found = ours(**batch)
        for k in range(4):  # transformers returns those of the last block after the norm
            torch.testing.assert_close(
                found.hidden_states[k][real], expected.hidden_states[k][real], atol=1e-4, rtol=1e-4
            )
        torch.testing.assert_close(
            found.last_hidden_state[real], expected.hidden_states[4][real], atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(found.logits[real], expected.logits[real], atol=1e-4, rtol=1e-4)
        assert expected.logits.std() > 0.1  # the comparison is of numbers, not of zeros


def by_formula(config):
    """Weights that are the same for any version of torch: sines."""
    model = VLM(config).eval()
    for i, (name, parameter) in enumerate(
        sorted(hub_weights(dict(model.named_parameters()), config).items())
    ):  # pieces of the model's own tensors
        wave = (
            torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + i)
            .float()
            .view(parameter.shape)
        )
        parameter.data.copy_(
            wave * (0.3 if parameter.ndim == 1 else 1.4 * parameter[0].numel() ** -0.5)
            + ("norm" in name or "ln_q" in name)
        )
    return model


# of the prompts below, last token's first four logits; transformers 5.23 gives the same to 1e-4 (GOLDEN is what keeps us honest where it is not installed)
GOLDEN = [0.7416, -0.1870, -0.5263, 0.7928]


def test_golden_values(tokenizer):
    config = small_config(tokenizer)
    model, (height, width) = by_formula(config), (48, 80)
    image = (
        (128 + 100 * np.sin(np.arange(height * width * 3) * 0.013))
        .astype(np.uint8)
        .reshape(height, width, 3)
    )
    (pixels, grids), (frames, clips) = (
        process_images([image], IMAGES),
        process_videos([[image[:32, :48], image[16:, :48], image[:32, 32:]]], IMAGES),
    )
    ids = torch.tensor(
        [
            [
                1,
                2,
                *[config.image_token_id] * int(grids[0].prod() // 4),
                3,
                *[config.video_token_id] * int(clips[0].prod() // 4),
                4,
                5,
                6,
            ]
        ]
    )
    with torch.no_grad():
        out = model(
            ids,
            pixel_values=pixels,
            image_grid_thw=grids,
            pixel_values_videos=frames,
            video_grid_thw=clips,
        )
    found = [round(float(x), 4) for x in out.logits[0, -1, :4]]
    assert np.allclose(found, GOLDEN, atol=2e-4), found


def test_vit_and_merger_match_transformers(reference, tokenizer):
    ours, theirs = reference["tied, grouped"]
    values, grids = process_images(
        [picture(48, 96), picture(80, 112, 1), picture(64, 64, 2), picture(64, 64, 3)], IMAGES
    )
    values, grids = (
        torch.cat([values, torch.randn(2 * 6 * 10, values.shape[1])]),
        torch.cat([grids, torch.tensor([[2, 6, 10]])]),
    )  # a video too
    with torch.no_grad():
        tokens, features = ours.visual(values, grids)
        torch.testing.assert_close(
            tokens, theirs.model.visual(values, grid_thw=grids).pooler_output, atol=1e-4, rtol=1e-4
        )
        a, b = (
            ours.visual(*process_images([image], IMAGES))[1]
            for image in (picture(32, 64), np.roll(picture(32, 64), 8, axis=1))
        )
    assert len(features) == len(values)
    assert not torch.allclose(a, b)


def test_patch_features_are_in_raster_order(tokenizer):
    model = random_model(small_config(tokenizer))
    for block in model.visual.blocks:
        (
            torch.nn.init.zeros_(block.attn.proj.weight),
            torch.nn.init.zeros_(block.attn.proj.bias),
        )  # a patch now depends on its own pixels alone
    image = np.full((48, 80, 3), GREY, np.uint8)
    image[8 * 3 : 8 * 4, 8 * 7 : 8 * 8] = 255  # row 3, column 7 of 6 x 10 patches
    with torch.no_grad():
        features = model.visual(*process_images([image], IMAGES))[1].view(6, 10, -1)
    odd = (features - features[0, 0]).abs().amax(-1) > 1e-4
    assert odd.nonzero().tolist() == [[3, 7]]


def test_mrope_positions_match_transformers(reference, tokenizer):
    ours, theirs = reference["tied, grouped"]
    batch = prompts(tokenizer, ours.config)
    grids = {
        name: batch[name] for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    }
    found = mrope_positions(batch["input_ids"], batch["attention_mask"], ours.config, **grids)
    expected = theirs.model.get_rope_index(
        batch["input_ids"],
        token_types(batch, ours.config),
        attention_mask=batch["attention_mask"],
        **grids,
    )[0]
    assert torch.equal(found, expected)
    video, grid = ours.config.video_token_id, torch.tensor([[3, 4, 6]])
    ids = torch.tensor([[5, 6, *[video] * 18, 7, 8]])
    for seconds in (1.5, 0.75):  # a fraction is kept: 0, 1.5 and 3 positions, rounded down
        expected = theirs.model.get_rope_index(
            ids,
            2 * (ids == video).int(),
            video_grid_thw=grid,
            second_per_grid_ts=torch.tensor([seconds]),
        )[0]
        found = mrope_positions(
            ids, None, ours.config, video_grid_thw=grid, second_per_grid_ts=[seconds]
        )
        assert torch.equal(found[:, :, :-2], expected[:, :, :-2])
        assert (
            found[:, 0, -2:] == found[:, 0, :-2].max() + torch.tensor([1, 2])
        ).all()  # transformers 4; 5 continues at max(h, w), after the time
    assert found[0, 0, [2, 8, 14, -2]].tolist() == [2, 3, 5, 6]


def test_greedy_generation_matches_transformers(reference, tokenizer):
    ours, theirs = reference["tied, grouped"]
    batch = prompts(tokenizer, ours.config)
    found = ours.generate(**batch, max_new_tokens=12)
    types = token_types(batch, ours.config)
    expected = theirs.generate(
        **batch,
        mm_token_type_ids=types,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=ours.config.eos_token_id,
        pad_token_id=ours.config.eos_token_id,
    )[:, batch["input_ids"].shape[1] :]
    for row, wanted in zip(found, expected.tolist()):
        assert row == (
            wanted[: wanted.index(ours.config.eos_token_id)]
            if ours.config.eos_token_id in wanted
            else wanted
        )
    stop = found[0][3]  # and it stops: make the fourth token the end
    assert (
        ours.generate(**batch, max_new_tokens=12, stop_token_ids=[stop])[0]
        == found[0][: found[0].index(stop)]
    )


def test_cached_equals_uncached_and_padding_moves_nothing(tokenizer):
    model = random_model(small_config(tokenizer))
    batch = prompts(tokenizer, model.config)
    L = batch["input_ids"].shape[1]
    extra = torch.randint(0, 250, (3, 5))
    longer = {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], extra], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(3, 5)], 1),
    }
    with torch.no_grad():
        whole, cache = model(**longer), Cache(L + 5)
        model(**batch, cache=cache)
        real = longer["attention_mask"].bool()[:, None, None]
        parts = [model.step(extra[:, i], real[..., : L + i + 1], cache) for i in range(5)]
        torch.testing.assert_close(torch.stack(parts, 1), whole.logits[:, L:], atol=1e-5, rtol=1e-5)
        length = int(batch["attention_mask"][1].sum())  # of the row without a picture
        alone = {name: batch[name][1:2, -length:] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(
            model(**alone).logits, model(**batch).logits[1:2, -length:], atol=1e-5, rtol=1e-5
        )
        spoilt = {
            **batch,
            "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7),
        }
        real = batch["attention_mask"].bool()
        assert torch.equal(model(**spoilt).logits[real], model(**batch).logits[real])


def test_first_k_blocks_equal_hidden_states_of_the_full_run(tokenizer):
    model = random_model(small_config(tokenizer))
    batch = prompts(tokenizer, model.config)
    with torch.no_grad():
        for k in (1, 3, 4):
            first, full = model(**batch, num_layers=k), model(**batch)
            assert (
                first.logits is None
                and len(first.hidden_states) == k + 1
                and torch.equal(first.hidden_states[k], full.hidden_states[k])
            )
            assert torch.equal(first.patch_features, full.patch_features)
        some = torch.rand(batch["input_ids"].shape) > 0.7
        torch.testing.assert_close(model(**batch, logits_at=some).logits, full.logits[some])


def test_attention_of_bfloat16_is_computed_in_float32_on_a_cpu():
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 40, 16, dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, 2, 2)
    )
    wide = [tensor.detach().float().requires_grad_() for tensor in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):  # where autocast would compute it in bfloat16 again
        y = attend(q, k, v, is_causal=True, enable_gqa=True)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *wide, is_causal=True, enable_gqa=True
    )
    y.float().square().sum().backward(), expected.to(y.dtype).float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected.to(y.dtype))
    assert all(
        torch.equal(half.grad, full.grad.to(half.dtype)) for half, full in zip((q, k, v), wide)
    )


def test_every_parameter_gets_gradient(tokenizer):
    model = random_model(small_config(tokenizer))
    model(**prompts(tokenizer, model.config)).logits.square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    gradients = hub_weights({name: p.grad for name, p in model.named_parameters()}, model.config)
    assert not [
        name
        for name, grad in gradients.items()
        if not grad.abs().sum() > 0 and "k_proj.bias" not in name
    ]


def test_generation_stops_and_needs_left_padding(tokenizer):
    model = random_model(small_config(tokenizer))
    batch = prompts(tokenizer, model.config)
    found = model.generate(**batch, max_new_tokens=8, stop_token_ids=[-1])
    assert [len(row) for row in found] == [8, 8, 8]
    stop = found[0][3]
    assert (
        model.generate(**batch, max_new_tokens=8, stop_token_ids=[stop, 299])[0]
        == found[0][: found[0].index(stop)]
    )
    with pytest.raises(ValueError, match="left"):
        model.generate(**prompts(tokenizer, model.config, "right"))
    for grids, said in (
        (batch["image_grid_thw"][:1], "placeholders left"),
        (batch["image_grid_thw"] * torch.tensor([1, 2, 1]), "placeholders left"),
        (torch.cat([batch["image_grid_thw"]] * 2), "the images give"),
    ):
        with pytest.raises(ValueError, match=said):
            model(
                batch["input_ids"],
                pixel_values=torch.randn(int(grids.prod(1).sum()), batch["pixel_values"].shape[1]),
                image_grid_thw=grids,
                pixel_values_videos=batch["pixel_values_videos"],
                video_grid_thw=batch["video_grid_thw"],
            )


def test_sampling_with_a_seed_repeats(tokenizer):
    model = random_model(small_config(tokenizer))
    batch = prompts(tokenizer, model.config)
    runs = [
        model.generate(**batch, max_new_tokens=8, temperature=1.5, seed=seed) for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert model.generate(**batch, max_new_tokens=8, temperature=1e-4, seed=3) == model.generate(
        **batch, max_new_tokens=8
    )


def test_new_model_is_initialised_as_documented():
    model = VLM(VLMConfig())
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "norm" in name or "ln_q" in name:
            assert (p == 1).all()
        else:
            assert abs(p.std() - 0.02) < 0.001 and abs(p.mean()) < 0.001
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 6e6
