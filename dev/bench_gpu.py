"""What a large GPU achieves at the large sizes: acting, decoding, a training step of each stage.

    python -m dev.bench --only gpu                  one GPU of 80 GB, no network, at most 8 minutes
    python -m dev.bench --only gpu --device cpu     a dry run at tiny sizes: all code, no figures

    act       pixels and a state to a chunk, with random weights: block 12 of Qwen2.5-VL-3B or
              Qwen3-VL-2B, a DiT of GR00T's size, 4 Euler steps, two images of 224 x 224
    decode    tokens per second at batch 1, as a share of what the memory bandwidth allows
    stage 1   a step of train_sft.py: LoRA on Qwen2.5-VL-3B, rows packed
    stage 2   a step of train_policy.py at GR00T's size, from hidden states of such a model
    nano      both stages at the shipped sizes, by the scripts themselves

For reference it also measures how fast the machine multiplies and copies. A part that fails is
reported and left out, so that the others still count.
"""

import itertools
import time
from dataclasses import dataclass, field, replace
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import train_sft
import trainer
from checkpoint import VisionConfig, VLMConfig
from embodiment import Embodiment
from policy import PRESETS, EmbodimentLinear, Policy, PolicyConfig
from positions import vision_plan
from vlm import VLM, Cache

# ms from observation to chunk on an H100, as published by the authors of GR00T N1.7 (3 B)
GROOT = {"eager": 156, "compiled": 72, "TensorRT": 47, "TensorRT, the ViT too": 30}
GOAL = 47  # ms per chunk, in plain PyTorch
BUDGET = 450  # s after which no further part starts
LORA_RANK = 16
ROBOTS = {"panda": Embodiment(17, 8), "widowx": Embodiment(16, 7)}


@dataclass
class Sizes:
    """What is measured. The defaults are for a large GPU."""

    vlms: dict  # {name: VLMConfig}; the first is also trained
    policy: PolicyConfig = field(default_factory=lambda: PRESETS["gr00t"])
    side: int = 224  # pixels, side of an image
    words: int = 48  # tokens of text in a prompt
    past: int = 512  # tokens in the cache when a decoding step is timed
    tokens: int = 64  # tokens to generate
    sft_rows: int = 32
    policy_rows: int = 128
    product: int = 8192  # side of the matrices whose product is timed
    copied: int = 2**31  # bytes to copy
    seconds: float = 3.0  # s per measurement
    compiler: str = "inductor"


QWEN3 = {"model_type": "qwen3_vl", "rms_norm_eps": 1e-6, "rope_theta": 5e6}
LARGE = Sizes(
    vlms={
        "Qwen2.5-VL-3B": VLMConfig(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            rope_theta=1e6,
            mrope_section=(16, 24, 24),
            vision_config=VisionConfig(
                32, 1280, 3420, 16, 2048, 14, window_size=112, fullatt_block_indexes=(7, 15, 23, 31)
            ),
        ),
        "Qwen3-VL-2B": VLMConfig(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            mrope_section=(24, 20, 20),
            vision_config=VisionConfig(
                24,
                1024,
                4096,
                16,
                2048,
                model_type="qwen3_vl",
                num_position_embeddings=48 * 48,
                deepstack_visual_indexes=(5, 11, 17),
            ),
            **QWEN3,
        ),
    }
)
TINY = Sizes(
    vlms={
        "Qwen2.5-VL": VLMConfig(num_hidden_layers=3),
        "Qwen3-VL": VLMConfig(
            num_hidden_layers=3,
            mrope_section=(8, 4, 4),
            vision_config=VisionConfig(
                model_type="qwen3_vl",
                num_position_embeddings=49,
                deepstack_visual_indexes=(0, 2),
            ),
            **QWEN3,
        ),
    },
    policy=replace(PRESETS["nano"], num_layers=2, future_layer=1, intent_layer=2),
    side=64,
    words=8,
    past=16,
    tokens=24,  # with fewer the difference would disappear in the machine's noise
    sft_rows=2,
    policy_rows=4,
    product=64,
    copied=2**16,
    seconds=0.0,
    compiler="eager",
)


# ---- clocks


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def times_ms(job, sizes, device):
    """Milliseconds of each run of `job` within sizes.seconds, without the first run."""
    job()
    wait(device)
    # at least three, however slow: the median of one is no median
    times = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < sizes.seconds:
        start = time.perf_counter()
        job()
        wait(device)
        times.append(1000 * (time.perf_counter() - start))
    return times


def median_ms(job, sizes, device):
    return float(np.median(times_ms(job, sizes, device)))


def captured(job, device):
    """`job` as one CUDA graph: its kernels read fixed addresses, and one call starts them all."""
    if device.type != "cuda":
        return job
    # setup in the first calls must not be captured
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            job()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph.replay


def peak_memory(device):
    """Peak memory in GB since the last call; None without a GPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 1)


def machine_limits(sizes, device):
    """Floating point operations and bytes per second, of a bfloat16 product and of a copy."""
    # measured rather than advertised, so that a share of them is attainable
    n = sizes.product
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    product = median_ms(lambda: a @ a, sizes, device)
    x = torch.zeros(sizes.copied, device=device, dtype=torch.uint8)
    y = torch.empty_like(x)
    copy = median_ms(lambda: y.copy_(x), sizes, device)
    # a copy reads and writes
    return 2 * n**3 / product * 1000, 2 * sizes.copied / copy * 1000


# ---- acting


def new_vlm(config, device, dtype):
    """A random VLM, without gradients."""
    torch.manual_seed(0)
    with torch.device(device):
        vlm = VLM(config).to(dtype)
    return vlm.requires_grad_(False).eval()


def new_policy(config, sizes, device):
    """A random policy for the hidden states of such a VLM."""
    torch.manual_seed(0)
    with torch.device(device):
        return Policy(sizes.policy, config.hidden_size, ROBOTS).to(device)


def prompt(config, sizes, device, pictures=2):
    """Inputs for one row: images of noise, then random words."""
    generator = torch.Generator().manual_seed(0)
    vision = config.vision_config
    patches = sizes.side // vision.patch_size  # patches along a side
    tokens = (patches // vision.spatial_merge_size) ** 2
    ids = []
    for _ in range(pictures):
        places = [config.image_token_id] * tokens
        ids += [config.vision_start_token_id, *places, config.vision_end_token_id]
    ids += torch.randint(0, 256, (sizes.words,), generator=generator).tolist()
    numbers = 3 * vision.temporal_patch_size * vision.patch_size**2
    inputs = {"input_ids": torch.tensor([ids])}
    # an image is shown twice, so its patches have as many numbers as a video's
    if pictures:
        pixels = torch.randn(pictures * patches**2, numbers, generator=generator)
        grids = torch.tensor([[1, patches, patches]] * pictures)
        inputs |= {"pixel_values": pixels, "image_grid_thw": grids}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def sample(policy, hidden, *inputs):
    """`Policy.sample`, in the dtype of the hidden states."""
    half = hidden.dtype == torch.bfloat16
    # without a cache of casts: a graph would keep pointers to what the cache frees
    with torch.autocast(hidden.device.type, torch.bfloat16, half, cache_enabled=False):
        return policy.sample(hidden, *inputs)


class Look(nn.Module):
    """Pixels (P, 3*2*p*p) and state (1, S) to a chunk (1, T, A), for prompts of one shape.

    The same as `VLM.forward` and `Policy.sample`, but everything that is the same for all
    observations is computed once: positions, masks, rotary angles, the words. So no number has to
    come back from the GPU, and the whole can be one graph.
    """

    def __init__(self, vlm, policy, inputs, noise):
        super().__init__()
        self.vlm = vlm
        self.policy = policy
        self.noise = noise
        device = noise.device
        config = vlm.config
        visual = vlm.visual
        self.blocks = vlm.model.layers[: policy.config.intent_layer]
        # each block's inputs besides x, and the first block's x
        self.where = {}
        hooks = []
        for block in (*visual.blocks, *self.blocks):
            hooks.append(block.register_forward_pre_hook(self.keep))
        vlm(**inputs, num_layers=len(self.blocks))
        for hook in hooks:
            hook.remove()
        order = vision_plan(inputs["image_grid_thw"].tolist(), visual.config)[0].to(device)
        self.order = order
        self.back = torch.argsort(order[:: visual.config.spatial_merge_size**2])
        first, *_ = self.where[visual.blocks[0]]
        self.learned = first - visual.patch_embed(inputs["pixel_values"][order])  # Qwen3-VL's table
        ids = inputs["input_ids"]
        self.text = vlm.model.embed_tokens(ids)
        self.places = (ids[0] == config.image_token_id).nonzero()[:, 0]
        self.mask = torch.ones_like(ids, dtype=torch.bool)
        self.embodiment = torch.zeros(1, dtype=torch.long, device=device)

    def keep(self, block, inputs):
        self.where[block] = inputs

    def forward(self, pixels, state):
        visual = self.vlm.visual
        x = visual.patch_embed(pixels[self.order]) + self.learned
        deep = []
        for i, block in enumerate(visual.blocks):
            x = block(x, *self.where[block][1:])
            if i in visual.config.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[len(deep)]
                deep.append(merger(x)[self.back])
        tokens = visual.merger(x)[self.back]
        # image tokens replace their placeholders
        x = self.text.index_copy(1, self.places, tokens[None].to(self.text.dtype))
        for i, block in enumerate(self.blocks):
            x = block(x, *self.where[block][1:])
            if i < len(deep):
                x = x.index_add(1, self.places, deep[i][None].to(x.dtype))
        # a single robot, so its index need not be read from the GPU either
        with mock.patch("policy.embodiment_groups", return_value=([0], [1])):
            return sample(self.policy, x, self.mask, state, self.embodiment, self.noise)


def new_look(config, sizes, device, dtype):
    """(Look, its pixels and state, the same chunk computed the ordinary way)."""
    vlm = new_vlm(config, device, dtype)
    policy = new_policy(config, sizes, device).requires_grad_(False).eval()
    for module in policy.modules():
        if isinstance(module, (nn.Linear, EmbodimentLinear)):
            module.to(dtype)  # only weights that are read in every step; norms are small
    inputs = prompt(config, sizes, device)
    shape = (1, policy.config.action_horizon, policy.action_dim)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    # as for a robot at rest
    state = torch.zeros(1, policy.state_dim, device=device)
    robot = torch.zeros(1, dtype=torch.long, device=device)

    def ordinary():
        hidden = vlm(**inputs, num_layers=policy.config.intent_layer).hidden_states[-1]
        mask = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        return sample(policy, hidden, mask, state, robot, noise)

    return Look(vlm, policy, inputs, noise), (inputs["pixel_values"], state), ordinary


def act(name, sizes, device, dtype):
    """Rows: a chunk in eager mode, as one graph, and as one graph with compiled blocks."""
    with torch.no_grad():
        look, seen, ordinary = new_look(sizes.vlms[name], sizes, device, dtype)
        ways = {"eager": median_ms(ordinary, sizes, device)}
        graph = captured(lambda: look(*seen), device)
        ways["one graph"] = median_ms(graph, sizes, device)
        del graph
        # block by block, so that a kind of block is compiled once, not 32 times
        for block in (*look.vlm.visual.blocks, *look.blocks, *look.policy.blocks):
            block.compile(backend=sizes.compiler)
        graph = captured(lambda: look(*seen), device)
        ways["compiled, one graph"] = median_ms(graph, sizes, device)
    rows = []
    for way, ms in ways.items():
        row = {"what": f"act, {name}, {way}", "ms": round(ms, 2)}
        rows.append(row | {"chunks_a_second": round(1000 / ms, 1)})
    return rows


# ---- decoding


class LongCache(Cache):
    """A cache that stays at `past` tokens, so that the same step can be repeated."""

    def __init__(self, vlm, past, device, dtype):
        super().__init__(past + 1)
        config = vlm.config
        shape = (1, 2 * config.num_key_value_heads, past + 1, config.head_dim)
        self.layers = [torch.randn(shape, device=device, dtype=dtype) for _ in vlm.model.layers]
        self.turns = itertools.repeat(vlm.rotary(torch.full((3, 1, 1), past, device=device)))


def decode(name, sizes, device, dtype, bytes_a_second):
    """Rows: tokens per second of `generate`, and of one step as a graph, with a fixed cache."""
    config = sizes.vlms[name]
    with torch.no_grad():
        vlm = new_vlm(config, device, dtype)
        inputs = prompt(config, replace(sizes, words=sizes.past), device, pictures=0)

        def generate(count):
            return lambda: vlm.generate(**inputs, max_new_tokens=count, stop_token_ids=[-1])

        # Subtract the time of the prompt. Use the fastest of each, because disturbances only add
        # time: on a busy machine a difference of medians may be negative.
        first = min(times_ms(generate(1), sizes, device))
        all_of_them = min(times_ms(generate(1 + sizes.tokens), sizes, device))
        ways = {"generate": (all_of_them - first) / sizes.tokens}

        cache = LongCache(vlm, sizes.past, device, dtype)
        token = torch.zeros(1, dtype=torch.long, device=device)

        def step():
            cache.length = sizes.past
            return vlm.step(token, None, cache)

        ways["a step as one graph"] = median_ms(captured(step, device), sizes, device)
    # every weight is read once per token; a tied table is also the head
    read = sum(p.nbytes for p in vlm.model.parameters())
    read += sum(layer.nbytes for layer in cache.layers)
    rows = []
    for way, ms in ways.items():
        row = {"what": f"decode, {name}, {way}", "ms": round(ms, 3)}
        share = read / bytes_a_second * 1000 / max(ms, 1e-6)
        rows.append(row | {"tokens_a_second": round(1000 / max(ms, 1e-6), 1)})
        rows[-1]["share_of_bandwidth"] = round(share, 3)
    return rows


# ---- training


class Flops(TorchDispatchMode):
    """Counts floating point operations of matrix products and attention, also in backward.

    torch's own FlopCounterMode (2.13) stops at a module whose input is a parameter.
    """

    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        count = flop_registry.get(operation.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def timed_step(what, forward, optimizers, sizes, device, flops_a_second):
    """The row for a training step; `forward` computes the loss."""
    # weights stay in float32, as in the scripts
    parameters = trainer.trained_parameters(optimizers)

    def gradients():
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward()
        loss.backward()

    def step():
        gradients()
        trainer.clip_gradients(parameters)
        trainer.step_optimizers(optimizers, 1e-4)
        trainer.zero_gradients(optimizers)

    # count forward and backward; the optimizer's products take time, but are not useful work
    with Flops() as counter:
        gradients()
    trainer.zero_gradients(optimizers)
    peak_memory(device)
    ms = median_ms(step, sizes, device)
    share = counter.total / (ms / 1000) / flops_a_second
    row = {"what": what, "ms": round(ms, 1), "share_of_product": round(share, 3)}
    row["teraflop"] = round(counter.total / 1e12, 3)
    return row | {"peak_gb": peak_memory(device)}


def sft_batch(config, sizes, device):
    """Packed rows of an image and words each; the second half of the words is the answer."""
    row = prompt(config, sizes, device, pictures=1)
    ids = row["input_ids"]
    labels = torch.full_like(ids, -100)
    answer = sizes.words // 2
    labels[:, -answer:] = ids[:, -answer:]
    count = sizes.sft_rows
    batch = {"input_ids": ids.repeat(1, count), "labels": labels.repeat(1, count)}
    batch["pixel_values"] = row["pixel_values"].repeat(count, 1)
    batch["image_grid_thw"] = row["image_grid_thw"].repeat(count, 1)
    return batch | {"segments": [[ids.shape[1]]] * count}


def stage_1(name, sizes, device, flops_a_second):
    config = sizes.vlms[name]
    torch.manual_seed(0)
    with torch.device(device):
        model = VLM(config)
        train_sft.select_parts(model, train_sft.SFTConfig(train="llm", lora_rank=LORA_RANK))
    optimizers = trainer.make_optimizers([model], 1e-4, 0.05, torch.bfloat16)
    batch = sft_batch(config, sizes, device)
    totals = train_sft.count([batch], None)

    def forward():
        return train_sft.compute_losses(model, None, batch, totals)["loss"]

    tokens = batch["input_ids"].numel()
    what = f"Stage I, {name}, LoRA {LORA_RANK}, {sizes.sft_rows} rows, {tokens} tokens"
    return [timed_step(what, forward, optimizers, sizes, device, flops_a_second)]


def stage_2(name, sizes, device, flops_a_second):
    config = sizes.vlms[name]
    policy = new_policy(config, sizes, device)
    rows = sizes.policy_rows
    length = prompt(config, sizes, torch.device("cpu"))["input_ids"].shape[1]
    shape = (rows, policy.config.action_horizon, policy.action_dim)
    robots = torch.arange(rows) * len(ROBOTS) // rows  # sorted, as in real batches
    batch = {"state": torch.randn(rows, policy.state_dim), "action": torch.randn(shape)}
    batch |= {"embodiment": robots, "future_valid": torch.ones(rows, dtype=torch.bool)}
    batch["waypoints"] = torch.zeros(rows, policy.config.num_waypoints, 3)
    for when in ("", "future_"):
        hidden = torch.randn(rows, length, config.hidden_size)
        batch[f"{when}hidden"] = hidden.half()  # as in the cache
        batch[f"{when}mask"] = torch.ones(rows, length, dtype=torch.bool)
    batch |= policy.draw(rows)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    optimizers = trainer.make_optimizers([policy], 1e-4, 0.01, torch.bfloat16)

    def forward():
        return policy(batch)["loss"]

    what = f"Stage II on {name}, {rows} rows"
    return [timed_step(what, forward, optimizers, sizes, device, flops_a_second)]


# ---- all parts


def shipped(name, measure_it):
    return [measure_it() | {"what": f"a step of {name}, nano"}]


def measure(device, nano, sizes=None, dtype=torch.bfloat16):
    """Rows {"what", "ms", ...} of all parts, printed one by one.

    nano: {stage: function that measures the row of the shipped size}, only on a GPU.
    """
    began = time.perf_counter()
    sizes = sizes or (LARGE if device.type == "cuda" else TINY)
    flops_a_second, bytes_a_second = machine_limits(sizes, device)
    print(
        f"a product: {flops_a_second / 1e12:.1f} Tflop/s, a copy: {bytes_a_second / 1e9:.0f} GB/s"
    )
    print("GR00T N1.7, published, ms a chunk on an H100:", GROOT, "goal here:", GOAL)
    rows = [{"what": "limits", "flops": flops_a_second, "bytes": bytes_a_second, "ms": None}]
    common = (sizes, device)
    first = next(iter(sizes.vlms))
    parts = [(act, name, *common, dtype) for name in sizes.vlms]
    parts += [(decode, name, *common, dtype, bytes_a_second) for name in sizes.vlms]
    # training comes last: it needs all of the memory
    parts += [(stage_1, first, *common, flops_a_second), (stage_2, first, *common, flops_a_second)]
    if device.type == "cuda":
        parts += [(shipped, *job) for job in nano.items()]
    for part, *arguments in parts:
        name = f"{part.__name__} {arguments[0]}"
        if time.perf_counter() - began > BUDGET:
            rows.append({"what": name, "ms": None, "left_out": "no time"})
            continue
        try:
            new = part(*arguments)
        # whatever it is: out of memory, a missing compiler, a driver error
        except Exception as error:  # noqa: BLE001
            new = [{"what": name, "ms": None, "left_out": f"{type(error).__name__}: {error}"[:500]}]
        for row in new:
            print(row, flush=True)
        rows += new
        if device.type == "cuda":  # free the memory of the finished part
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return rows
