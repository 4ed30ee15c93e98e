"""Solutions in docs/exercises.md are programs, and right; docs/one_image.md has the real shapes."""

import re
import runpy

import pytest
from conftest import ROOT

from data.env import TabletopEnv
from model import BLM

EXERCISES = (ROOT / "docs" / "exercises.md").read_text()
TITLES = re.findall(r"^## (.+)$", EXERCISES, re.MULTILINE)
SOLUTIONS = re.findall(r"```python\n(.*?)```", EXERCISES, re.DOTALL)
ONE_IMAGE = (ROOT / "docs" / "one_image.md").read_text()


assert len(TITLES) == len(SOLUTIONS)


@pytest.mark.parametrize("program", SOLUTIONS, ids=TITLES)
def test_solution_of_an_exercise_is_right(program, tmp_path, monkeypatch):
    assert program.count("assert ") >= 3
    monkeypatch.chdir(ROOT)
    path = tmp_path / "solution.py"
    path.write_text(program)
    runpy.run_path(str(path))


def test_one_image_has_the_real_shapes():
    blm = BLM.from_pretrained(ROOT / "weights" / "nano")
    instruction = "raise the red block to the green ball and stay there"
    observation, _ = TabletopEnv("widowx", "PickCube").reset(1_000_001, instruction)
    images = [list(observation["images"].values())]
    inputs = blm.processor.prompt(images, [instruction])
    hidden, _ = blm.intent_states(images, [instruction])
    shapes = {}

    def keep(name):
        def hook(module, inputs, output):
            shapes[name] = tuple(output.shape)

        return hook

    blm.vlm.visual.merger.register_forward_hook(keep("picture tokens"))
    blm.policy.perceiver.register_forward_hook(keep("intent"))
    blm.policy.blocks[0].register_forward_hook(keep("tokens"))
    blm.policy.decoder.register_forward_hook(keep("velocity"))
    chunk = blm.act(observation, "widowx")

    assert f"*{instruction}*" in " ".join(ONE_IMAGE.split())
    rows = {
        "pixel_values, image_grid_thw": (inputs["pixel_values"], inputs["image_grid_thw"]),
        "prompt, hidden states H": (inputs["input_ids"], hidden),
        "chunk": (chunk,),
    }
    rows = {name: [tuple(x.shape) for x in tensors] for name, tensors in rows.items()}
    rows["picture tokens"] = [shapes["picture tokens"]]
    rows["intent C"] = [shapes["intent"]]
    rows["tokens of the DiT"] = [shapes["tokens"]]
    rows["velocity"] = [shapes["velocity"]]
    for name, found in rows.items():
        assert f"| {name} | {', '.join(map(str, found))} |" in ONE_IMAGE
    assert ONE_IMAGE.count("\n| ") == len(rows) + 2  # with the head of the table


def test_names_in_one_image_are_there():
    files = set(re.findall(r"\]\(\.\./(\w+\.py)\)", ONE_IMAGE))
    source = "".join((ROOT / name).read_text() for name in files)
    names = re.findall(r"`(?:\w+\.)?([A-Z]?[a-z]\w*)`", ONE_IMAGE)
    for name in set(names):
        assert re.search(rf"(def|class) {name}\b", source), name
