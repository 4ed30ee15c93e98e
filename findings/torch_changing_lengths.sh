#!/usr/bin/env bash
# torch 2.13.0+cpu on Linux with glibc's malloc (seen with glibc 2.36, one thread).
# Expected: training on sequences packed into one row takes the same time per token at step 150 as
#           at step 20, whatever the lengths of the rows; a few percent of padding makes it slower.
# Seen:     if every row has another length, the time per token grows from step to step, by a third
#           to a half within 150 steps, and memory grows to three times as much. With rows padded to
#           a multiple of 256 tokens it stays where it began. A profile shows a quarter of the
#           time inside glibc's malloc, which has to search ever longer lists of free blocks.
#           With tcmalloc preloaded, time stays flat without padding.
# Source:   this run. PyTorch's tuning guide recommends other allocators for speed, not for this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > train.py <<'PYTHON'
import resource
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

multiple = int(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)
WIDTH, HEADS, STEPS, WINDOW = 192, 6, 150, 25


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 1024)
        self.down = nn.Linear(1024, WIDTH)

    def forward(self, x, lengths):
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3)
        texts = qkv.split(lengths, dim=2)  # texts packed into one row do not see each other
        seen = [F.scaled_dot_product_attention(*text, is_causal=True) for text in texts]
        x = x + self.out(torch.cat(seen, 1).transpose(0, 1).flatten(1))
        return x + self.down(F.silu(self.up(self.norms[1](x))))


blocks = nn.ModuleList(Block() for _ in range(6))
embed = nn.Embedding(1000, WIDTH)
optimizer = torch.optim.SGD([*blocks.parameters(), *embed.parameters()], 1e-3)
generator = torch.Generator().manual_seed(0)
per_token = []
for step in range(STEPS):
    if step % WINDOW == 0:
        began, tokens = time.process_time(), 0
    lengths = torch.randint(60, 260, (16,), generator=generator).tolist()
    padding = -sum(lengths) % multiple
    lengths += [padding] if padding else []
    ids = torch.randint(1000, (sum(lengths),), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        x = embed(ids)
        for block in blocks:
            x = block(x, lengths)
        loss = F.cross_entropy((x @ embed.weight.T).float(), ids)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    tokens += len(ids)
    if step % WINDOW == WINDOW - 1:
        per_token.append(1e6 * (time.process_time() - began) / tokens)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(*[f"{microseconds:.0f}" for microseconds in per_token], memory)
PYTHON
for multiple in 1 256; do
    venv/bin/python train.py "$multiple" > "$multiple.txt"
    echo "padded to a multiple of $multiple: microseconds a token, then MB: $(cat "$multiple.txt")"
done
venv/bin/python - <<'PYTHON'
from pathlib import Path

changing, padded = (list(map(float, Path(f"{m}.txt").read_text().split())) for m in (1, 256))
slower = changing[-2] / padded[-2]
print(f"changing lengths, last 25 steps: {slower:.2f} times the time per token")
assert slower > 1.15 and changing[-1] > 1.5 * padded[-1], "lengths no longer matter"
PYTHON
