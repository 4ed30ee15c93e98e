#!/usr/bin/env bash
# safetensors 0.8.0 (0.7.0 is the same; numpy 2.3.5).
# Expected: the same tensors and the same metadata, in the same order, give the same bytes.
# Seen:     the entries of the metadata are written in an order that changes from save to save, so that
#           files with one content have many hashes. With no entry, or one, the bytes are the same.
# Source:   github.com/safetensors/safetensors issue 584.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.3.5
cd "$folder"
venv/bin/python - <<'PYTHON'
import hashlib
import numpy as np
from safetensors.numpy import save_file

def hashes(metadata):
    found = set()
    for _ in range(8):
        save_file({"a": np.zeros(3, np.float32)}, "a.safetensors", metadata=metadata)
        with open("a.safetensors", "rb") as file:
            found.add(hashlib.sha256(file.read()).hexdigest())
    return found

many = hashes({letter: letter for letter in "abcdefgh"})
one = hashes({"all": "abcdefgh"})
print(f"eight entries: {len(many)} different files of 8; one entry: {len(one)}")
assert len(many) > 1, "the order is fixed now: this finding is out of date"
assert len(one) == 1
PYTHON
