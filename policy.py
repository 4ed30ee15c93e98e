"""The physical half of BLM: hidden states of the language model in, a chunk of joint targets out.

    H_k (B, L, Dc) ──► Perceiver ──► intent C (B, N, D) ── keys, values, once a chunk ──┐
                                                                                        ▼
    state (B, S) ──────► its robot's encoder ─► 1 token ─┐              cross, self, cross, self ...
    future tokens ─────► learned ────────────► M tokens ─┼─► DiT blocks ────────────────┬─► norm
    noised actions ────► its robot's encoder ─► T tokens ┘      ▲                       │     │
    tau ───────────────► AdaLN: attention norms, last norm ─────┘                       │     ▼
                                  cosine to the intent T steps later ◄─ future_layer ◄──┘  its robot's
                                                                                           decoder
                                                                        velocity (B, T, A) ◄──┘

With the waypoint loss a linear layer must also predict, from the mean of the intent, where the tool
will be T, 2 T, 3 T and 4 T steps later. It is used only in training, and is not part of BLM1: what
an instruction means shows in where the hand goes, and that is visible seconds before it shows in a
chunk.

One set of weights drives several robots: only the encoders and the decoder are per robot.

Flow matching, with tau = 0 at the noise eps and tau = 1 at the action A (code bases differ here):
A_tau = tau A + (1 - tau) eps, the network predicts A - eps, and sampling goes from eps to A in K
Euler steps.

Sources: BLM1 (arXiv 2510.24161) for the whole; GR00T N1 (2503.14734) for the DiT, the layers per
robot and the distribution of tau; FLARE (2505.15659) for the future loss; DiT (2212.09748) for
AdaLN.

Letters: B batch, L tokens of the prompt, Dc their width, N intent queries, D width here, M future
tokens, T action horizon (steps of 50 ms), A and S action and state dims, padded to those of the
largest robot, E robots ("embodiments"), H heads, d width of a head, K Euler steps.
embodiment.py explains a robot's numbers, and which action dims are targets for which state dims.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from cli import UserError
from inpainting import guided
from vlm import attend

TAU_BETA = 1.5  # u ~ Beta(1.5, 1), tau = (s - u) / s as in GR00T: more weight on noise
TAU_LIMIT = 0.999  # s
STATE_LIMIT = 5.0  # standard deviations: readings farther out tell nothing more

# ---- configuration


@dataclass
class PolicyConfig:
    """The sizes of the policy, as stored in policy.json. PRESETS names common ones."""

    intent_layer: int = 3  # k: the LLM block whose hidden states carry the intent
    text_first: bool = False  # the instruction comes before the images, not after them
    num_intent_queries: int = 16  # N
    perceiver_layers: int = 2  # each: cross-attention to the hidden states, MLP
    max_condition_tokens: int = 256  # longest prompt, images included, in tokens
    hidden_size: int = 192  # D
    num_layers: int = 6  # DiT blocks: even ones attend to the intent, odd ones are self-attention
    num_heads: int = 6  # H
    mlp_ratio: int = 2  # hidden width of an MLP, in units of D
    action_horizon: int = 16  # T, at 20 Hz
    num_inference_steps: int = 4  # K: Euler steps, as in GR00T N1.5
    num_future_tokens: int = 8  # M; each predicts the mean of N / M intent tokens
    future_layer: int = 4  # future tokens are read after this many blocks: 3/4, as in FLARE
    future_loss_weight: float = 0.2  # FLARE's
    num_waypoints: int = 4  # W: tool positions after T, 2 T, ... steps, predicted from the intent
    waypoint_loss_weight: float = 1.0
    use_intent: bool = True  # False: no intent, to see what a robot can do from its state alone

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            least = int(field.type is int)  # loss weights and switches may be 0
            fine = type(value) is field.type and least <= value < 100_000  # more would take forever
            assert fine, f"{field.name} is {value!r}"
        # heads of equal width; positions need an even width, half sines and half cosines
        assert self.hidden_size % (2 * self.num_heads) == 0, "hidden_size / num_heads must be even"
        queries = self.num_intent_queries
        assert queries % self.num_future_tokens == 0, f"num_future_tokens must divide {queries}"
        assert self.future_layer <= self.num_layers, "future_layer is after the last block"


PRESETS = {
    "nano": PolicyConfig(),
    "gr00t": PolicyConfig(
        intent_layer=12,
        num_intent_queries=32,
        perceiver_layers=4,
        max_condition_tokens=2048,
        hidden_size=1536,
        num_layers=16,
        num_heads=32,
        mlp_ratio=4,
        num_future_tokens=32,
        future_layer=12,
    ),
}


# ---- physical units <-> what the network reads


class Normalizer(nn.Module):
    """States and *relative* targets to zero mean and unit standard deviation, per step of a chunk.

    Relative: joint target minus current joint angle. An action that is not a target for a state
    dimension, such as a finger's target, stays as it is (Embodiment.relative). Statistics are
    buffers with one row per robot, so they are saved with the weights.
    """

    STATE_FLOOR = 1e-2  # rad, m: what hardly moves must not become noise of unit size
    ACTION_FLOOR = 1e-3

    def __init__(self, embodiments, horizon):
        super().__init__()
        with torch.device("cpu"):  # even under the meta device: masks are computed, not loaded
            robots = embodiments.values()
            states = torch.tensor([[robot.state_dim] for robot in robots])  # (E, 1)
            actions = torch.tensor([[robot.action_dim] for robot in robots])
            E = len(robots)
            S = int(states.max())
            A = int(actions.max())
            targets = [torch.tensor(robot.relative) for robot in robots]
            relative = pad_sequence(targets, True, -1)  # (E, A)
            known = {  # determined by the embodiments
                "state_mask": torch.arange(S) < states,  # (E, S): the robot's own dims
                "action_mask": torch.arange(A) < actions,  # (E, A)
                "relative_mask": relative >= 0,  # (E, A): targets for a state dim
                "relative_index": relative.clamp(min=0),  # (E, A): for which one
            }
            statistics = {
                "state_mean": torch.zeros(E, S),
                "state_std": torch.ones(E, S),
                "action_mean": torch.zeros(E, horizon, A),  # for each of the T steps
                "action_std": torch.ones(E, horizon, A),
                "fitted": torch.zeros(E, dtype=torch.bool),  # has statistics
            }
        for name, buffer in (known | statistics).items():
            self.register_buffer(name, buffer, persistent=name in statistics)

    def fit(self, embodiment, state, action):
        """Compute the statistics of one robot (its index) from padded demonstrations.

        state (n, S), action (n, T, A) absolute. Padded dims keep mean 0 and standard deviation 1.
        """
        relative = action - self.reference(state, embodiment)
        for name, numbers, floor in (
            ("state", state, self.STATE_FLOOR),
            ("action", relative, self.ACTION_FLOOR),
        ):
            # in double precision, because the sums run over many rows
            std, mean = torch.std_mean(numbers.double(), 0, correction=0)
            own = self.get_buffer(f"{name}_mask")[embodiment]
            self.get_buffer(f"{name}_mean")[embodiment] = torch.where(own, mean, 0.0)
            self.get_buffer(f"{name}_std")[embodiment] = torch.where(own, std.clamp(floor), 1.0)
        self.fitted[embodiment] = True

    def reference(self, state, embodiment):
        """What targets are relative to (B, 1, A): current joint angles, 0 for other actions."""
        index = self.relative_index[embodiment]
        now = state.gather(1, index.expand(len(state), -1))  # (B, A)
        return torch.where(self.relative_mask[embodiment], now, 0.0)[:, None]

    def normalize_state(self, state, embodiment, noise=0.0):
        """(B, S) in physical units to the encoder's input; noise is in standard deviations."""
        x = (state - self.state_mean[embodiment]) / self.state_std[embodiment] + noise
        x = x.clamp(-STATE_LIMIT, STATE_LIMIT)
        return torch.where(self.state_mask[embodiment], x, 0.0)

    def normalize_action(self, action, state, embodiment):
        """Absolute (B, T, A), rad and m, to the flow's endpoint. Padded dims may hold anything."""
        relative = action - self.reference(state, embodiment)
        return (relative - self.action_mean[embodiment]) / self.action_std[embodiment]

    def normalize_waypoints(self, waypoints, embodiment):
        """Tool positions (B, W, 3) in m, normalized like the TCP position in the state."""
        first = self.action_mask[embodiment].sum(1)  # it comes after joints and finger
        columns = first[:, None] + torch.arange(3, device=first.device)  # (B, 3)
        # other robots have none; their waypoints are zeros that do not count
        columns = columns.clamp(max=self.state_mean.shape[1] - 1)
        mean = self.state_mean[embodiment].gather(1, columns)
        std = self.state_std[embodiment].gather(1, columns)
        return (waypoints - mean[:, None]) / std[:, None]

    def unnormalize(self, x, state, embodiment):
        """The inverse of normalize_action: (B, T, A) back to rad and m. Padding stays 0."""
        relative = x * self.action_std[embodiment] + self.action_mean[embodiment]
        return relative + self.reference(state, embodiment)


# ---- blocks


def sinusoids(x, width):
    """Sines and cosines of x (...) at geometric frequencies from 1 to 1/10000: (..., width)."""
    steps = torch.arange(width // 2, device=x.device)
    frequency = torch.exp(-math.log(10000.0) * steps / len(steps))
    angle = x[..., None] * frequency  # (..., width / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def mlp(width, ratio):
    """A norm and two linear layers."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, ratio * width),
        nn.GELU(approximate="tanh"),
        nn.Linear(ratio * width, width),
    )


class Attention(nn.Module):
    """x (B, Q, D) attends to key_value (2, B, H, S, d), which `project_kv` computes from a context.

    mask (B, 1, 1, S) is True where attention is allowed; None: everywhere.
    """

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def project_kv(self, context):
        kv = self.key_value(context)
        return rearrange(kv, "B S (two H d) -> two B H S d", two=2, H=self.heads)

    def forward(self, x, key_value, mask=None):
        q = rearrange(self.query(x), "B Q (H d) -> B H Q d", H=self.heads)
        y = attend(q, *key_value, mask)
        return self.out(rearrange(y, "B H Q d -> B Q (H d)"))


class Perceiver(nn.Module):
    """N learned queries read hidden states (B, L, Dc), mask (B, L) True on tokens: (B, N, D).

    Hidden states carry *what*. Rotary positions never enter them, so *where* (which patch) comes
    from a learned table, indexed by `token_places` and added to the normalized states before keys
    and values are computed.
    """

    def __init__(self, config, condition_size):
        super().__init__()
        D = config.hidden_size
        layers = range(config.perceiver_layers)
        self.text_first = config.text_first
        places = torch.arange(config.max_condition_tokens)
        self.norm = nn.LayerNorm(condition_size)
        self.positions = nn.Parameter(sinusoids(places, condition_size))  # (max L, Dc)
        self.queries = nn.Parameter(torch.empty(config.num_intent_queries, D))
        self.query_norms = nn.ModuleList(nn.LayerNorm(D) for _ in layers)
        # the prompt is wider than the intent
        heads = config.num_heads
        self.attentions = nn.ModuleList(Attention(D, heads, condition_size) for _ in layers)
        self.mlps = nn.ModuleList(mlp(D, config.mlp_ratio) for _ in layers)
        self.out_norm = nn.LayerNorm(D)

    def token_places(self, mask):
        """Position of each token in the prompt, (B, L), counted so that each patch has a fixed one.

        Instructions differ in length, so where the images come last, positions count from the end.
        Prompts are padded on the right; the count does not depend on the batch.
        """
        places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        if not self.text_first:
            return places
        last = mask.sum(1, keepdim=True) - 1
        return (last - places).clamp(min=0)  # padding is masked anyway

    def forward(self, hidden, mask):
        B = len(hidden)
        hidden = torch.where(mask[..., None], hidden, 0.0)  # padding may even hold NaN
        context = self.norm(hidden) + F.embedding(self.token_places(mask), self.positions)
        x = self.queries.expand(B, -1, -1)  # (B, N, D)
        real = mask[:, None, None]  # (B, 1, 1, L), for all heads and queries
        layers = zip(self.query_norms, self.attentions, self.mlps)
        for norm, attention, feed_forward in layers:
            key_value = attention.project_kv(context)
            x = x + attention(norm(x), key_value, real)
            x = x + feed_forward(x)
        return self.out_norm(x)


def embodiment_groups(embodiment):
    """Runs of equal robots in (B,): ([robot], [rows of each run]).

    Each run costs a matrix product of its own, so rows sorted by robot are fastest.
    """
    robots, rows = torch.unique_consecutive(embodiment, return_counts=True)
    return robots.tolist(), rows.tolist()


class EmbodimentLinear(nn.Module):
    """A linear layer per robot: x (B, T, in) and its `embodiment_groups` to (B, T, out)."""

    def __init__(self, embodiments, inner, outer):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embodiments, inner, outer))
        self.bias = nn.Parameter(torch.empty(embodiments, outer))

    def forward(self, x, groups):
        # unbind and split only once: indexing would allocate a full-size gradient for every group
        robots, rows = groups
        weights = self.weight.unbind()
        biases = self.bias.unbind()
        parts = [
            F.linear(part, weights[robot].T, biases[robot])
            for robot, part in zip(robots, x.split(rows))
        ]
        return torch.cat(parts)


class EmbodimentMLP(nn.ModuleList):
    """Two linear layers per robot: x (B, T, in) to (B, T, out)."""

    def __init__(self, embodiments, inner, width, outer):
        first = EmbodimentLinear(embodiments, inner, width)
        second = EmbodimentLinear(embodiments, width, outer)
        super().__init__([first, second])

    def forward(self, x, groups):
        first, second = self
        return second(F.silu(first(x, groups)), groups)


class ActionEncoder(nn.Module):
    """Noised actions (B, T, A) and tau (B,) to (B, T, D): GR00T's MultiEmbodimentActionEncoder."""

    def __init__(self, embodiments, action_dim, width):
        super().__init__()
        self.first = EmbodimentLinear(embodiments, action_dim, width)
        self.second = EmbodimentLinear(embodiments, 2 * width, width)
        self.third = EmbodimentLinear(embodiments, width, width)

    def forward(self, noised, tau, groups):
        x = self.first(noised, groups)
        time = sinusoids(1000 * tau, x.shape[-1])  # (B, D); scales tau in [0, 1) to DiT's timesteps
        time = time[:, None].expand_as(x)
        x = torch.cat([x, time], dim=-1)  # (B, T, 2 D)
        x = self.second(x, groups)
        return self.third(F.silu(x), groups)


def modulate(x, shift, scale):
    """AdaLN: x (B, Q, D) times 1 + scale, plus shift, both (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """A DiT block: AdaLN from tau, cross-attention to the intent or self-attention, MLP.

    AdaLN only at the attention norm and without gates, as in GR00T.
    """

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.norm = nn.LayerNorm(D, elementwise_affine=False)
        self.attention = Attention(D, config.num_heads, D)
        self.mlp = mlp(D, config.mlp_ratio)

    def forward(self, x, shift, scale, key_value=None):
        """key_value: the intent's; None in a self-attention block."""
        h = modulate(self.norm(x), shift, scale)
        if key_value is None:
            key_value = self.attention.project_kv(h)  # self-attention
        x = x + self.attention(h, key_value)
        return x + self.mlp(x)


# ---- flow matching


def sample_tau(n, generator=None):
    """(n,) in [0, 1): Beta(a, 1) equals U^(1/a)."""
    u = torch.rand(n, generator=generator) ** (1 / TAU_BETA)
    return ((TAU_LIMIT - u) / TAU_LIMIT).clamp(min=0)


def add_noise(actions, noise, tau, valid):
    """A_tau = tau A + (1 - tau) eps: (B, T, A), zero where valid (B, T, A) is False; tau (B,).

    Padding must not even reach the encoder: masking the loss alone would be too late.
    """
    t = tau[:, None, None]
    return torch.where(valid, t * actions + (1 - t) * noise, 0.0)


def flow_loss(velocity, actions, noise, valid, total):
    """Masked mean square of velocity minus (A - eps). All (B, T, A), valid False on padding.

    total: how many numbers are valid, here or, if this is part of a batch, in all parts.
    """
    error = (velocity - (actions - noise)).square()
    return torch.where(valid, error, 0.0).sum() / total


# ---- the policy


def waypoint_head(config):
    """The mean of the intent (B, D) to tool positions (B, 3 W)."""
    D = config.hidden_size
    places = nn.Linear(D, 3 * config.num_waypoints)
    nn.init.zeros_(places.weight)  # the same head whenever one is added to a policy
    nn.init.zeros_(places.bias)
    return nn.Sequential(nn.LayerNorm(D), places)


class Policy(nn.Module):
    """embodiments {robot: Embodiment}; condition_size Dc, the language model's width."""

    def __init__(self, config, condition_size, embodiments):
        super().__init__()
        self.config = config
        self.condition_size = condition_size
        self.embodiments = dict(embodiments)
        self.normalizer = Normalizer(self.embodiments, config.action_horizon)
        E, self.state_dim = self.normalizer.state_mean.shape
        self.action_dim = self.normalizer.action_mean.shape[-1]
        D = config.hidden_size

        # what to do: the prompt with its images, as N tokens
        self.perceiver = Perceiver(config, condition_size)

        # the DiT's tokens: state, future tokens, actions
        self.state_encoder = EmbodimentMLP(E, self.state_dim, D, D)
        self.action_encoder = ActionEncoder(E, self.action_dim, D)
        self.action_positions = nn.Parameter(torch.empty(config.action_horizon, D))
        self.future_tokens = nn.Parameter(torch.empty(config.num_future_tokens, D))

        # tau to a shift and a scale for every block and for the last norm, in one matrix product
        self.tau_mlp = nn.Sequential(
            nn.Linear(D, D),
            nn.SiLU(),
            nn.Linear(D, D),
            nn.SiLU(),
        )
        norms = config.num_layers + 1
        self.modulation = nn.Linear(D, 2 * norms * D)

        # cross-attention to the intent, self-attention, cross-attention ...
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.out_norm = nn.LayerNorm(D, elementwise_affine=False)
        self.decoder = EmbodimentMLP(E, D, D, self.action_dim)
        # only for training
        self.future_head = mlp(D, 2)  # f
        self.waypoint_head = waypoint_head(config)
        self.initialize()

    def initialize(self):
        """All initial weights: Xavier, small embeddings, and DiT's zeros.

        With the zeros AdaLN starts as a plain norm, and the velocity as 0.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, EmbodimentLinear)):
                bound = math.sqrt(6 / sum(module.weight.shape[-2:]))  # Xavier, for each robot
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)
        for table in (self.perceiver.queries, self.future_tokens, self.action_positions):
            nn.init.normal_(table, std=0.02)
        steps = torch.arange(self.config.action_horizon)
        with torch.no_grad():
            self.action_positions += sinusoids(steps, self.config.hidden_size)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.decoder[-1].weight)

    # ---- the network

    def check_length(self, length):
        """UserError if a prompt of this many tokens is longer than this policy reads."""
        longest = self.config.max_condition_tokens
        if length > longest:
            raise UserError(
                f"a prompt of {length} tokens is longer than this policy's {longest}: "
                "shorten the instruction, or take fewer cameras"
            )

    def intent(self, hidden, mask):
        """Hidden states (B, L, Dc) of block k, mask (B, L) bool, to the intent C (B, N, D)."""
        self.check_length(hidden.shape[1])
        intent = self.perceiver(hidden.float(), mask)  # cached hidden states are float16
        return intent if self.config.use_intent else torch.zeros_like(intent)

    def context(self, hidden, mask, state, embodiment, state_noise=0.0):
        """(intent, everything that does not depend on tau, so it is computed once per chunk).

        The latter: the state's token (B, 1, D); the intent's keys and values for every even block;
        `embodiment_groups`.
        """
        groups = embodiment_groups(embodiment)
        state = self.normalizer.normalize_state(state, embodiment, state_noise)  # (B, S)
        intent = self.intent(hidden, mask)
        key_values = [block.attention.project_kv(intent) for block in self.blocks[::2]]
        state_token = self.state_encoder(state[:, None], groups)
        return intent, (state_token, key_values, groups)

    def modulations(self, tau):
        """tau (B,) to shifts and scales of the blocks and last norm: (blocks + 1, 2, B, 1, D)."""
        D = self.config.hidden_size
        x = self.tau_mlp(sinusoids(1000 * tau, D))
        x = self.modulation(x)
        return rearrange(x, "B (n two D) -> n two B 1 D", two=2, D=D)

    def velocity(self, noised, tau, modulations, context):
        """The DiT: noised actions (B, T, A) at tau (B,) to the velocity (B, T, A).

        Also returns the future tokens (B, M, D) after block `future_layer`.
        """
        state_token, key_values, groups = context
        future_tokens = self.future_tokens.expand(len(noised), -1, -1)
        action_tokens = self.action_encoder(noised, tau, groups) + self.action_positions
        x = torch.cat([state_token, future_tokens, action_tokens], dim=1)  # (B, 1 + M + T, D)

        *block_modulations, (shift, scale) = modulations.unbind()
        for i, block in enumerate(self.blocks):
            to_intent = key_values[i // 2] if i % 2 == 0 else None  # cross, self, cross, self ...
            x = block(x, *block_modulations[i], to_intent)
            if i + 1 == self.config.future_layer:
                future = x[:, 1 : 1 + self.config.num_future_tokens]

        actions = x[:, -self.config.action_horizon :]
        x = modulate(self.out_norm(actions), shift, scale)
        return self.decoder(x, groups), future

    # ---- training

    def draw(self, n, generator=None, state_noise=0.0):
        """The random part of n rows, on the CPU: noise (n, T, A), tau (n,) and state_noise (n, S).

        The argument state_noise is the size of the latter, in standard deviations.
        """
        T = self.config.action_horizon
        return {
            "noise": torch.randn(n, T, self.action_dim, generator=generator),
            "tau": sample_tau(n, generator),
            "state_noise": state_noise * torch.randn(n, self.state_dim, generator=generator),
        }

    def valid(self, embodiment):
        """(B, T, A): True on the robot's own dims."""
        own = self.normalizer.action_mask[embodiment, None]  # (B, 1, A)
        return own.expand(-1, self.config.action_horizon, -1)

    def forward(self, batch, totals=None):
        """Losses of a batch, scalars: loss = flow + weighted future loss + weighted waypoint loss.

        batch: hidden (B, L, Dc), mask (B, L) bool; future_hidden, future_mask the same T steps
        later, future_valid (B,) bool; state (B, S), action (B, T, A) in physical units, absolute,
        padded with anything; waypoints (B, W, 3) m; embodiment (B,) long; and the output of `draw`.
        totals: numbers of valid action values, of valid futures and of rows in the whole batch, if
        this is only a part of it.
        """
        state = batch["state"]
        embodiment = batch["embodiment"]
        noise = batch["noise"]
        tau = batch["tau"]
        intent, context = self.context(
            batch["hidden"],
            batch["mask"],
            state,
            embodiment,
            batch["state_noise"],
        )
        actions = self.normalizer.normalize_action(batch["action"], state, embodiment)
        valid = self.valid(embodiment)
        if totals is None:
            futures = batch["future_valid"].sum()
            totals = valid.sum(), futures.clamp(min=1), len(state)

        noised = add_noise(actions, noise, tau, valid)
        modulations = self.modulations(tau)
        velocity, tokens = self.velocity(noised, tau, modulations, context)
        flow = flow_loss(velocity, actions, noise, valid, totals[0])
        future = self.future_loss(tokens, batch, totals[1])
        places = self.normalizer.normalize_waypoints(batch["waypoints"], embodiment)
        waypoint = self.waypoint_loss(intent, places, totals[2])
        weights = self.config
        loss = flow + weights.future_loss_weight * future + weights.waypoint_loss_weight * waypoint
        return {"loss": loss, "flow": flow, "future": future, "waypoint": waypoint}

    def waypoint_loss(self, intent, waypoints, total):
        """Mean error, in deviations, of the tool positions (B, W, 3) predicted from the intent.

        The flow's gradient says little about *which* of several commands is meant, because most of
        a chunk is the same for all of them. The tool's position seconds later differs.
        """
        predicted = self.waypoint_head(intent.mean(1))
        error = F.smooth_l1_loss(predicted, waypoints.flatten(1), beta=0.1, reduction="none")
        return error.mean(1).sum() / total

    def future_loss(self, tokens, batch, total):
        """Mean of 1 - cos(f(z), C of the frame T steps later) over rows that have such a frame.

        z are the future tokens (B, M, D); no gradient flows into C, whose N tokens are pooled to M
        (FLARE).
        """
        rows = batch["future_valid"]  # leave out the others: an all-False mask would give NaN
        with torch.no_grad():
            intent = self.intent(
                batch["future_hidden"][rows],
                batch["future_mask"][rows],
            )
        target = intent.unflatten(1, (tokens.shape[1], -1)).mean(2)  # (b, M, D)
        predicted = self.future_head(tokens[rows])
        distance = 1 - F.cosine_similarity(predicted, target, dim=-1)  # (b, M)
        return distance.mean(1).sum() / total

    # ---- acting

    @torch.no_grad()
    def sample(self, hidden, mask, state, embodiment, noise, known=None, weight=None):
        """A chunk of absolute targets (B, T, A), rad and m, integrated from noise (B, T, A).

        hidden (B, L, Dc), mask (B, L), state (B, S), embodiment (B,). known: absolute targets
        (B, T, A); weight (T,) says how strongly each step is tied to them, see inpainting.py.
        """
        K = self.config.num_inference_steps
        _, context = self.context(hidden, mask, state, embodiment)
        valid = self.valid(embodiment)
        taus = torch.arange(K, device=state.device) / K
        modulations = self.modulations(taus)  # (blocks + 1, 2, K, 1, D): all steps at once

        if known is not None:
            # relative to this state: the previous chunk was relative to an earlier one
            known = self.normalizer.normalize_action(known, state, embodiment)
            weight = weight[:, None] * valid  # (B, T, A)

        x = noise * valid
        for step, tau in enumerate(taus.split(1)):
            # one Euler step, broadcast over B
            inputs = (tau, modulations[:, :, step], context)
            if known is None:
                v, _ = self.velocity(x, *inputs)
            else:
                v = guided(self.velocity, x, inputs, known, weight)
            x = (x + v / K) * valid
        return self.normalizer.unnormalize(x, state, embodiment)
