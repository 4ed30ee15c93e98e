"""Real-time chunking: a chunk that fits what the arm carries out while the chunk is computed.

A big network needs longer than a control step, and an arm that waits for it stops and starts. So it
goes on with the chunk before, and the new one is made like a picture with a part painted already:
its first steps are known, and the flow is bent, step by step, until it ends in them. What follows
bends with them, for the network has learned how steps of one chunk belong together. Nothing is
trained for it.

Source: Black, Galliker, Levine, "Real-Time Execution of Action Chunking Flow Policies" (arXiv
2506.07339). Their later "Training-Time Action Conditioning" (2512.05964) needs no gradient, but a
tau for each step of a chunk, and weights that were trained so.

Letters as in policy.py: B batch, T action horizon, A action dims.
"""

import math

import torch

MOST_GUIDANCE = 5.0  # the paper's beta: few Euler steps overshoot with more


def soft_mask(committed, known, horizon):
    """How strongly each step of a chunk is held to the chunk before, (T,): the paper's equation 5.

    1 on the steps that are `committed`, then less and less, 0 where nothing is `known` any more.
    """
    fade = (known - torch.arange(horizon)) / (known - committed + 1)
    fade = fade.clamp(0, 1)
    return fade * torch.expm1(fade) / math.expm1(1)


def guided(velocity, x, inputs, known, weight):
    """The velocity at x, bent so that the flow ends in `known` as far as `weight` says.

    velocity(x, *inputs): the network's, the first of a tuple; inputs: tau (1,) and what else it
    takes; x, known and weight (B, T, A). The error of where the flow would end is carried back to x through the network,
    so that steps which are not held go along with those that are (the paper's equations 2 to 4).
    """
    tau = inputs[0]
    # a gradient for x alone: the weights get none
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = velocity(x, *inputs)[0]
        end = x + (1 - tau) * v
        error = weight * (known - end)
        [pull] = torch.autograd.grad(end, x, error.detach())
    # (1 - tau) / tau over r squared; infinite at tau = 0
    left = 1 - tau
    strength = (tau**2 + left**2) / (tau * left)
    strength = strength.clamp(max=MOST_GUIDANCE)
    return v.detach() + strength * pull
