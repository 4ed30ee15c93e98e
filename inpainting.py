"""Real-time chunking: a chunk that continues what the arm executes while the chunk is computed.

A large network takes longer than a control step, and an arm that waits for it stops and starts. So
the arm continues with the previous chunk, and the new one is computed as in image inpainting: its
first steps are known, and guidance pulls the flow, step by step, until it ends in them. The later
steps follow, because the network has learned how the steps of a chunk belong together. No training
is needed.

Source: Black, Galliker, Levine, "Real-Time Execution of Action Chunking Flow Policies" (arXiv
2506.07339). Their later "Training-Time Action Conditioning" (2512.05964) needs no gradient, but it
needs a tau for each step of a chunk, and weights that were trained with it.

Letters as in policy.py: B batch, T action horizon, A action dims.
"""

import math

import torch

MOST_GUIDANCE = 5.0  # the paper's beta: with few Euler steps larger values overshoot


def soft_mask(committed, known, horizon):
    """How strongly each step is tied to the previous chunk, (T,): the paper's equation 5.

    1 for the `committed` steps, then decreasing, and 0 for steps beyond the `known` ones.
    """
    fade = (known - torch.arange(horizon)) / (known - committed + 1)
    fade = fade.clamp(0, 1)
    return fade * torch.expm1(fade) / math.expm1(1)


def guided(velocity, x, inputs, known, weight):
    """The velocity at x, guided so that the flow ends in `known` as strongly as `weight` says.

    velocity(x, *inputs): the network, which returns the velocity first; inputs: tau (1,) and its
    other arguments; x, known and weight (B, T, A). The error at the flow's endpoint is
    backpropagated through the network to x, so the free steps follow the known ones (the paper's
    equations 2 to 4).
    """
    tau = inputs[0]
    # a gradient for x only, not for the weights
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = velocity(x, *inputs)[0]
        end = x + (1 - tau) * v
        error = weight * (known - end)
        [pull] = torch.autograd.grad(end, x, error.detach())
    # (1 - tau) / tau divided by r squared; infinite at tau = 0
    left = 1 - tau
    strength = (tau**2 + left**2) / (tau * left)
    strength = strength.clamp(max=MOST_GUIDANCE)
    return v.detach() + strength * pull
