"""The physical half of BLM: hidden states of the language model in, a chunk of joint targets out, for several robots with one set of weights.

    H_k (B, L, Dc) ─► Perceiver ─► intent C (B, N, D) ──── keys and values, once a chunk ────┐
    state (B, S) ────► encoder of the robot ─► 1 token ─┐                                    ▼
    noised actions ──► encoder of the robot ─► T tokens ├─► DiT: cross, self, cross, self ... ─► decoder of the robot ─► velocity (B, T, A)
    future tokens ───► learned ──────────────► M tokens ┘          └─ behind block `future_layer`: f(z) ─► cosine to the intent T steps later

Flow matching, tau = 0 is noise and tau = 1 the action (code bases differ): A_tau = tau A + (1 - tau) eps, the network predicts A - eps, and sampling
walks from eps in K Euler steps. Sources: BLM1 (arXiv 2510.24161), GR00T N1 (2503.14734) for the DiT, the layers per robot and the law of tau,
FLARE (2505.15659) for the future loss, DiT (2212.09748) for AdaLN and its zeros.

Letters: B batch, L tokens of the prompt, Dc their width, N intent queries, D width here, M future tokens, T action horizon (steps of 50 ms),
A and S action and state dims, padded to the largest robot's, E robots ("embodiments"), H heads, d width of a head, K Euler steps.
Physical order and units of state and action: data/robots.py. The first A - 1 entries of both are joint angles (rad), the last action is the finger (m).
"""
import math
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from cli import UserError
from vlm import attend

# ---- configuration


@dataclass
class PolicyConfig:
    """The action side. PRESETS names sets of these numbers, and every field is a flag of train_policy.py."""
    intent_layer: int = 3             # k: the LLM block whose hidden states carry the intent
    num_intent_queries: int = 16      # N
    perceiver_layers: int = 2         # each: attention to the hidden states, MLP
    max_condition_tokens: int = 256   # longest prompt, pictures included, in tokens
    hidden_size: int = 192            # D
    num_layers: int = 6               # DiT blocks: even ones attend to the intent, odd ones to each other
    num_heads: int = 6                # H
    mlp_ratio: int = 2                # inner width of an MLP in D
    action_horizon: int = 16          # T, at 20 Hz
    num_inference_steps: int = 4      # K: Euler steps, as GR00T N1.5
    num_future_tokens: int = 8        # M; each predicts the mean of N / M intent tokens
    future_layer: int = 4             # the future tokens are read behind this many blocks: about three quarters, as FLARE
    future_loss_weight: float = 0.2   # FLARE's
    blind: bool = False               # no intent at all: what a robot can do by its state alone, for comparison

    def __post_init__(self):
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(f"--hidden_size {self.hidden_size} must be an even multiple of --num_heads {self.num_heads}")
        if not 1 <= self.future_layer <= self.num_layers:
            raise UserError(f"--future_layer {self.future_layer} must be between 1 and --num_layers {self.num_layers}")
        if self.num_future_tokens < 1 or self.num_intent_queries % self.num_future_tokens:
            raise UserError(f"--num_intent_queries {self.num_intent_queries} must be a multiple of --num_future_tokens {self.num_future_tokens}")
        for name in ("intent_layer", "perceiver_layers", "max_condition_tokens", "mlp_ratio", "action_horizon", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")


PRESETS = {
    "nano": PolicyConfig(),
    "gr00t": PolicyConfig(intent_layer=12, num_intent_queries=32, perceiver_layers=4, max_condition_tokens=2048, hidden_size=1536, num_layers=16,
                          num_heads=32, mlp_ratio=4, num_future_tokens=32, future_layer=12),
}
TAU_BETA, TAU_LIMIT = 1.5, 0.999      # u ~ Beta(1.5, 1), tau = (s - u) / s: GR00T's law, more weight on noise


# ---- physical units <-> what the network sees

class Normalizer(nn.Module):
    """States to zero mean and unit deviation; so are *relative* targets (joint target - joint now, finger as it is), each step of the chunk for itself.

    Statistics are buffers, a row for each robot, so they travel with the weights. Using a robot without any raises UserError.
    """
    STATE_FLOOR, ACTION_FLOOR = 1e-2, 1e-3       # rad, m: what hardly moves must not become noise of size one

    def __init__(self, embodiments, horizon):
        super().__init__()
        self.names = list(embodiments)
        E, S, A = len(embodiments), max(s for s, _ in embodiments.values()), max(a for _, a in embodiments.values())
        sizes = torch.tensor(list(embodiments.values()))
        self.register_buffer("state_mean", torch.zeros(E, S))
        self.register_buffer("state_std", torch.ones(E, S))
        self.register_buffer("action_mean", torch.zeros(E, horizon, A))
        self.register_buffer("action_std", torch.ones(E, horizon, A))
        self.register_buffer("fitted", torch.zeros(E, dtype=torch.bool))
        self.register_buffer("state_mask", torch.arange(S) < sizes[:, :1], persistent=False)             # (E, S): the robot's own dims
        self.register_buffer("action_mask", torch.arange(A) < sizes[:, 1:], persistent=False)            # (E, A)
        self.register_buffer("joint_mask", torch.arange(A) < sizes[:, 1:] - 1, persistent=False)         # (E, A): all but the finger

    def fit(self, embodiment, state, action, valid):
        """Statistics of one robot (its index) from demonstrations: state (n, S), action (n, T, A) absolute, padded, valid (n, T)."""
        relative = torch.where(valid[..., None], action - self.reference(state, torch.tensor(embodiment)), 0.0).double()
        count = valid.sum(0).clamp(min=1)[:, None]                                                       # (T, 1)
        mean = relative.sum(0) / count
        deviation = (torch.where(valid[..., None], (relative - mean).square(), 0.0).sum(0) / count).sqrt()
        S, A = self.state_mask[embodiment], self.action_mask[embodiment]
        self.state_mean[embodiment] = torch.where(S, state.double().mean(0), 0.0).float()
        self.state_std[embodiment] = torch.where(S, state.double().std(0, correction=0).clamp(min=self.STATE_FLOOR), 1.0).float()
        self.action_mean[embodiment] = torch.where(A, mean, 0.0).float()
        self.action_std[embodiment] = torch.where(A, deviation.clamp(min=self.ACTION_FLOOR), 1.0).float()
        self.fitted[embodiment] = True

    def check(self, embodiment):
        if not self.fitted[embodiment].all():
            absent = [self.names[i] for i in embodiment.unique().tolist() if not self.fitted[i]]
            raise UserError(f"this policy has no statistics for {', '.join(absent)}: train it on that robot's demonstrations with `python train_policy.py`")

    def reference(self, state, embodiment):
        """What joint targets are relative to: joint angles now (B, 1, A), zero for the finger."""
        return torch.where(self.joint_mask[embodiment], state[..., :self.joint_mask.shape[1]], 0.0)[:, None]

    def normalize_state(self, state, embodiment):
        return torch.where(self.state_mask[embodiment], (state - self.state_mean[embodiment]) / self.state_std[embodiment], 0.0)

    def normalize_action(self, action, state, embodiment):
        """Absolute (B, T, A), rad and m, to what flows; padded dims become 0."""
        x = (action - self.reference(state, embodiment) - self.action_mean[embodiment]) / self.action_std[embodiment]
        return torch.where(self.action_mask[embodiment][:, None], x, 0.0)

    def unnormalize(self, x, state, embodiment):
        """normalize_action undone."""
        action = x * self.action_std[embodiment] + self.action_mean[embodiment] + self.reference(state, embodiment)
        return torch.where(self.action_mask[embodiment][:, None], action, 0.0)


# ---- blocks

def sinusoids(x, width):
    """Sines and cosines of x (...) at geometric frequencies from 1 to 1/10000: (..., width)."""
    frequency = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=x.device) / (width // 2))
    angle = x[..., None] * frequency
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=-1), (0, width % 2))


class Attention(nn.Module):
    """x (B, Q, D) looks at keys and values (2, B, H, S, d) from `project_kv`; mask (B, 1, 1, S) True on real ones, or None."""

    def __init__(self, width, heads, context_width):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def project_kv(self, context):
        return rearrange(self.key_value(context), "B S (two H d) -> two B H S d", two=2, H=self.heads)

    def forward(self, x, key_value, mask=None):
        q = rearrange(self.query(x), "B Q (H d) -> B H Q d", H=self.heads)
        y = attend(q, key_value[0], key_value[1], mask)
        return self.out(rearrange(y, "B H Q d -> B Q (H d)"))


def mlp(width, ratio):
    return nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(approximate="tanh"), nn.Linear(ratio * width, width))


class Perceiver(nn.Module):
    """N learned queries read the prompt's hidden states (B, L, Dc), mask (B, L) True on real tokens: the intent (B, N, D).

    Hidden states carry *what*; rotary positions never enter them, so *where* (which patch) is a table added to the keys, by index in the prompt.
    Prompts are padded on the right: the index of a token does not depend on its batch.
    """

    def __init__(self, config, condition_size):
        super().__init__()
        D = config.hidden_size
        self.norm = nn.LayerNorm(condition_size)
        self.positions = nn.Parameter(torch.empty(config.max_condition_tokens, condition_size))
        self.queries = nn.Parameter(torch.empty(config.num_intent_queries, D))
        self.query_norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(config.perceiver_layers))
        self.attentions = nn.ModuleList(Attention(D, config.num_heads, condition_size) for _ in range(config.perceiver_layers))
        self.mlps = nn.ModuleList(nn.Sequential(nn.LayerNorm(D), *mlp(D, config.mlp_ratio)) for _ in range(config.perceiver_layers))
        self.out_norm = nn.LayerNorm(D)

    def forward(self, hidden, mask):
        B, L, _ = hidden.shape
        if L > len(self.positions):
            raise UserError(f"a prompt of {L} tokens is longer than this policy's {len(self.positions)}: shorten the instruction, "
                            "or train with a larger --max_condition_tokens")
        context = self.norm(torch.where(mask[..., None], hidden, 0.0)) + self.positions[:L]
        x, looks = self.queries.expand(B, -1, -1), mask[:, None, None]
        for norm, attention, feed in zip(self.query_norms, self.attentions, self.mlps):
            x = x + attention(norm(x), attention.project_kv(context), looks)
            x = x + feed(x)
        return self.out_norm(x)


def embodiment_groups(embodiment):
    """[(robot, rows)] of neighbours in (B,) that are the same robot: a product for each, so rows sorted by robot are the fastest."""
    return [(robot, len(list(same))) for robot, same in groupby(embodiment.tolist())]


class EmbodimentLinear(nn.Module):
    """A linear layer for each robot: weight (E, in, out); x (B, T, in) and its `embodiment_groups` robots to (B, T, out)."""

    def __init__(self, embodiments, inner, outer):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embodiments, inner, outer))
        self.bias = nn.Parameter(torch.empty(embodiments, outer))

    def forward(self, x, runs):
        weights, biases = self.weight.unbind(), self.bias.unbind()
        return torch.cat([F.linear(part, weights[robot].T, biases[robot]) for part, (robot, _) in zip(x.split([rows for _, rows in runs]), runs)])


class ActionEncoder(nn.Module):
    """Noised actions (B, T, A) joined with sinusoids of tau (B,): (B, T, D). GR00T's MultiEmbodimentActionEncoder."""

    def __init__(self, embodiments, action_dim, width):
        super().__init__()
        self.width = width
        self.first = EmbodimentLinear(embodiments, action_dim, width)
        self.second = EmbodimentLinear(embodiments, 2 * width, width)
        self.third = EmbodimentLinear(embodiments, width, width)

    def forward(self, noised, tau, runs):
        x = self.first(noised, runs)
        time = sinusoids(1000 * tau, self.width)[:, None].expand_as(x)
        return self.third(F.silu(self.second(torch.cat([x, time], dim=-1), runs)), runs)


class Block(nn.Module):
    """A DiT block: AdaLN from tau on the attention's norm (no gates, as GR00T), attention to the intent (cross) or among the tokens, MLP."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.norm = nn.LayerNorm(D, elementwise_affine=False)
        self.attention = Attention(D, config.num_heads, D)
        self.mlp = nn.Sequential(nn.LayerNorm(D), *mlp(D, config.mlp_ratio))

    def forward(self, x, shift, scale, key_value=None):
        h = modulate(self.norm(x), shift, scale)
        x = x + self.attention(h, self.attention.project_kv(h) if key_value is None else key_value)
        return x + self.mlp(x)


def modulate(x, shift, scale):
    return torch.addcmul(shift, x, 1 + scale)


# ---- the policy

def sample_tau(n, generator=None, device="cpu"):
    """(n,) in [0, 1): Beta(a, 1) is U^(1/a)."""
    u = torch.rand(n, generator=generator, device=device) ** (1 / TAU_BETA)
    return ((TAU_LIMIT - u) / TAU_LIMIT).clamp(min=0)


def flow_loss(velocity, actions, noise, tau, valid, total=None):
    """Masked mean square of velocity(noised, tau) against actions - noise. All (B, T, A), tau (B,); valid is True on real steps and real joints.

    total divides the sum: how many are valid, here or, if the batch is a part of one, in all parts.
    """
    t = tau[:, None, None]
    noised = torch.where(valid, t * actions + (1 - t) * noise, 0.0)       # padding must not reach the encoder: masking the loss is too late
    error = (velocity(noised, tau) - (actions - noise)).square()
    return torch.where(valid, error, 0.0).sum() / (valid.sum() if total is None else total)


class Policy(nn.Module):
    """embodiments {robot: (state_dim, action_dim)}; condition_size Dc, the width of the language model."""

    def __init__(self, config, condition_size, embodiments):
        super().__init__()
        self.config, self.condition_size, self.embodiments = config, condition_size, dict(embodiments)
        D, E = config.hidden_size, len(embodiments)
        self.normalizer = Normalizer(self.embodiments, config.action_horizon)
        self.state_dim, self.action_dim = self.normalizer.state_mask.shape[1], self.normalizer.action_mask.shape[1]
        self.perceiver = Perceiver(config, condition_size)
        self.state_encoder = nn.ModuleList([EmbodimentLinear(E, self.state_dim, D), EmbodimentLinear(E, D, D)])
        self.action_encoder = ActionEncoder(E, self.action_dim, D)
        self.action_positions = nn.Parameter(torch.empty(config.action_horizon, D))
        self.future_tokens = nn.Parameter(torch.empty(config.num_future_tokens, D))
        self.tau_mlp = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU())
        self.modulation = nn.Linear(D, (config.num_layers + 1) * 2 * D)   # every block's shift and scale, and the last norm's: one product
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.out_norm = nn.LayerNorm(D, elementwise_affine=False)
        self.decoder = nn.ModuleList([EmbodimentLinear(E, D, D), EmbodimentLinear(E, D, self.action_dim)])
        self.future_head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(approximate="tanh"), nn.Linear(2 * D, D))
        self.initialise()

    def initialise(self):
        """All initial weights. Xavier and small embeddings; AdaLN starts as a plain norm, the velocity as 0 (DiT's zeros)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, EmbodimentLinear):
                bound = math.sqrt(6 / sum(module.weight.shape[1:]))
                nn.init.uniform_(module.weight, -bound, bound)
                nn.init.zeros_(module.bias)
        for table in (self.perceiver.queries, self.future_tokens, self.action_positions):
            nn.init.normal_(table, std=0.02)
        with torch.no_grad():
            self.action_positions += sinusoids(torch.arange(self.config.action_horizon), self.config.hidden_size)
            self.perceiver.positions.copy_(sinusoids(torch.arange(self.config.max_condition_tokens), self.condition_size))
        for layer in (self.modulation, self.decoder[-1]):
            nn.init.zeros_(layer.weight)

    def intent(self, hidden, mask):
        """Hidden states (B, L, Dc) of block k, mask (B, L) bool, to the intent (B, N, D)."""
        intent = self.perceiver(hidden.float(), mask)
        return torch.zeros_like(intent) if self.config.blind else intent

    def project_kv(self, intent):
        """Keys and values of the even blocks: they depend on the intent alone, so a chunk needs them once, not once an Euler step."""
        return [block.attention.project_kv(intent) if i % 2 == 0 else None for i, block in enumerate(self.blocks)]

    def modulations(self, tau):
        """tau (B,) to a (shift, scale) pair, each (B, 1, D), for every block and the last norm."""
        pairs = self.modulation(self.tau_mlp(sinusoids(1000 * tau, self.config.hidden_size)))
        return rearrange(pairs, "B (n two D) -> n two B 1 D", two=2, D=self.config.hidden_size).unbind(0)

    def encode_state(self, state, runs):
        """Normalised state (B, S) to one token (B, 1, D). Clamped: a reading far outside the demonstrations says no more than "far"."""
        first, second = self.state_encoder
        return second(F.silu(first(state.clamp(-5, 5)[:, None], runs)), runs)

    def velocity(self, noised, tau, state_token, key_values, runs, modulations=None):
        """Noised actions (B, T, A) at tau (B,) to the velocity (B, T, A) and the future tokens behind block `future_layer` (B, M, D)."""
        modulations = self.modulations(tau) if modulations is None else modulations
        actions = self.action_encoder(noised, tau, runs) + self.action_positions
        x = torch.cat([state_token, self.future_tokens.expand(len(noised), -1, -1), actions], dim=1)
        for i, (block, (shift, scale), key_value) in enumerate(zip(self.blocks, modulations, key_values), start=1):
            x = block(x, shift, scale, key_value)
            if i == self.config.future_layer:
                future = x[:, 1:1 + self.config.num_future_tokens]
        x = modulate(self.out_norm(x[:, -self.config.action_horizon:]), *modulations[-1])
        first, second = self.decoder
        return second(F.silu(first(x, runs)), runs), future

    def draw(self, n, generator=None, state_noise=0.0, device="cpu"):
        """The random part of a training step for n rows: noise (n, T, A), tau (n,), and what is added to the normalised state (n, S)."""
        normal = lambda *shape: torch.randn(*shape, generator=generator, device=device)
        return {"noise": normal(n, self.config.action_horizon, self.action_dim), "tau": sample_tau(n, generator, device),
                "state_noise": state_noise * normal(n, self.state_dim)}

    def valid(self, batch):
        """(B, T, A): real steps of the episode and the robot's own dims."""
        return batch["action_valid"][..., None] & self.normalizer.action_mask[batch["embodiment"]][:, None]

    def forward(self, batch, totals=None):
        """Losses of a batch: {"loss", "flow", "future"}, scalars; loss = flow + future_loss_weight x future.

        batch: hidden (B, L, Dc), mask (B, L) bool, future_hidden, future_mask the same T steps later, future_valid (B,) bool,
        state (B, S), action (B, T, A) physical units, absolute, padded with anything, action_valid (B, T) bool, embodiment (B,) long;
        and, to fix them, any of what `draw` makes. totals (valid action numbers, valid futures): divisors, if the batch is a part of one.
        """
        embodiment, runs, norm = batch["embodiment"], embodiment_groups(batch["embodiment"]), self.normalizer
        norm.check(embodiment)
        batch = {**self.draw(len(embodiment), device=batch["state"].device), **batch}
        intent = self.intent(batch["hidden"], batch["mask"])
        state = norm.normalize_state(batch["state"], embodiment) + batch["state_noise"]
        state_token, key_values = self.encode_state(torch.where(norm.state_mask[embodiment], state, 0.0), runs), self.project_kv(intent)
        seen = {}

        def velocity(noised, tau):
            v, seen["future"] = self.velocity(noised, tau, state_token, key_values, runs)
            return v

        actions = norm.normalize_action(batch["action"], batch["state"], embodiment)
        flow = flow_loss(velocity, actions, batch["noise"], batch["tau"], self.valid(batch), totals and totals[0])
        future = self.future_loss(seen["future"], batch, totals and totals[1])
        return {"loss": flow + self.config.future_loss_weight * future, "flow": flow, "future": future}

    def future_loss(self, tokens, batch, total=None):
        """Mean of 1 - cos(f(z), stop-grad(C of the frame T steps later)) over rows with such a frame; z (B, M, D), C pooled to M tokens."""
        valid = batch["future_valid"]
        with torch.no_grad():                                             # rows without a future are left out: an all-False mask is a NaN
            target = self.intent(batch["future_hidden"][valid], batch["future_mask"][valid])
            target = target.unflatten(1, (self.config.num_future_tokens, -1)).mean(2)
        distance = 1 - F.cosine_similarity(self.future_head(tokens[valid]), target, dim=-1)               # (b, M)
        return distance.mean(1).sum() / (valid.sum().clamp(min=1) if total is None else total)

    @torch.no_grad()
    def sample(self, hidden, mask, state, embodiment, noise=None):
        """A chunk of absolute targets (B, T, A), rad and m, from hidden (B, L, Dc), mask (B, L), state (B, S), embodiment (B,).

        noise (B, T, A) is drawn if None. UserError for a robot without statistics.
        """
        self.normalizer.check(embodiment)
        B, K, own, runs = len(state), self.config.num_inference_steps, self.normalizer.action_mask[embodiment][:, None], embodiment_groups(embodiment)
        if noise is None:
            noise = torch.randn(B, self.config.action_horizon, self.action_dim, device=state.device)
        state_token = self.encode_state(self.normalizer.normalize_state(state, embodiment), runs)
        key_values, taus = self.project_kv(self.intent(hidden, mask)), torch.arange(K, device=state.device) / K
        modulations = self.modulations(taus)                              # of all steps at once
        x = torch.where(own, noise, 0.0)
        for step in range(K):
            now = [(shift[step], scale[step]) for shift, scale in modulations]
            v, _ = self.velocity(x, taus[step].expand(B), state_token, key_values, runs, now)
            x = torch.where(own, x + v / K, 0.0)
        return self.normalizer.unnormalize(x, state, embodiment)
