#!/usr/bin/env bash
# safetensors 0.8.0 (and numpy 2.3.5) on Linux or macOS.
# Expected: save_file gives a new file the mode that the umask allows, as open() and 0.7.0 do, and
#           leaves the mode of a file that it replaces.
# Seen:     the file is 0600 either way, so a model in a shared folder can be read by its writer alone
#           (a server that runs as another user reports that there is no model).
# Source:   github.com/safetensors/safetensors issue 782; pull request 764 writes a temporary file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.3.5
cd "$folder"
umask 022
venv/bin/python - <<'PYTHON'
import os
import numpy as np
from safetensors.numpy import save_file

def mode(path):
    return oct(os.stat(path).st_mode & 0o777)

open("old.safetensors", "wb").close()
print("a file that is there:", mode("old.safetensors"))
for path in ("old.safetensors", "new.safetensors"):
    save_file({"a": np.zeros(3, np.float32)}, path)
    print(path, mode(path))
    assert mode(path) == "0o600", "the mode is kept now: this finding is out of date"
PYTHON
