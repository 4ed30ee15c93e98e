"""The solutions in docs/exercises.md are programs, and right."""

import re

import pytest

from conftest import ROOT

TEXT = (ROOT / "docs" / "exercises.md").read_text()
TITLES = re.findall(r"^## (.+)$", TEXT, re.M)
SOLUTIONS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("title, program", list(zip(TITLES, SOLUTIONS, strict=True)))
def test_solution_of_an_exercise_is_right(title, program, monkeypatch):
    assert program.count("assert ") >= 3
    monkeypatch.chdir(ROOT)
    exec(compile(program, title, "exec"), {})
