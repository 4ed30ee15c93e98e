"""The README keeps its word: its commands have the flags it prints, its line counts are about right, its figures are those of the result files."""
import importlib
import json
import re
import shlex
import sys

import pytest

import cli
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].split("&&")[-1].strip() for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
SCRIPTS = [c for c in COMMANDS if re.match(r"python (-m data\.\w+|\w+\.py)", c)]


def flags_parse(words, monkeypatch):
    """Do the flags of a command, ["eval.py", "physical", ...] or ["-m", "data.record", ...], exist?"""
    name, argv = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
    argv = argv[1:] if name == "eval" else argv
    module, seen = importlib.import_module(name), []
    parse = cli.parse

    def spy(*classes, **options):
        seen.append(parse(*classes, **{**options, "argv": argv}))
        raise KeyboardInterrupt                            # parsed: that was the question

    monkeypatch.setattr(module, "parse", spy)
    monkeypatch.setattr(sys, "argv", [name, *words[1:]])
    with pytest.raises(KeyboardInterrupt):
        module.main()
    monkeypatch.undo()
    assert seen


@pytest.mark.parametrize("command", SCRIPTS)
def test_commands_have_the_flags_they_print(command, monkeypatch):
    flags_parse(shlex.split(command)[1:], monkeypatch)


def test_line_counts_are_about_right():
    rows = re.findall(r"^\| (`[^|]+) \| ([\d, ]+) \|", TEXT, re.M)
    assert rows
    for files, counts in rows:
        for name, count in zip(re.findall(r"`([^`]+)`", files), counts.split(",")):
            lines = len((ROOT / name).read_text().splitlines())
            assert abs(lines - int(count)) <= 0.1 * lines, f"{name} has {lines} lines, the README says {count}"


def test_pictures_and_files_are_there():
    for path in re.findall(r"\[.*?\]\((.*?)\)", TEXT):
        assert path.startswith("https://") or (ROOT / path).exists(), path


@pytest.mark.parametrize("what", ["expert", "physical"])
def test_figures_come_from_the_result_files(what):
    result = json.loads((ROOT / "results" / f"{what}.json").read_text())
    assert f"{100 * result['mean']:.2f}%" in TEXT
    for robot, row in result["cells"].items():
        mean = 100 * sum(cell["success"] for cell in row.values()) / len(row)
        if what == "physical":
            line = next(l for l in TEXT.splitlines() if l.startswith(f"| {robot} |"))
            assert line.rstrip(" |").endswith(f"{mean:.1f}") and all(f"{100 * cell['success']:.0f} (" in line for cell in row.values())


def test_digital_figures_come_from_the_result_file():
    result, percent = json.loads((ROOT / "results" / "digital.json").read_text()), lambda share: f"{100 * share:.0f}"
    for name, row in result["categories"].items():
        cells = [cell.strip() for cell in next(line for line in TEXT.splitlines() if line.startswith(f"| {name} | {row['asked']} |")).split("|")]
        assert {percent(row[who]) for who in ("chance", "blind", "base", "model")} <= set(cells) and f"{percent(row['seen'])} / {percent(row['held_out'])}" in cells
    mean = next(line for line in TEXT.splitlines() if line.startswith(f"| mean | {result['asked']} |"))
    assert all(f"{100 * result[who]:.1f}" in mean for who in ("mean", "blind_mean", "chance_mean", "seen_mean", "held_out_mean"))
    for row in result["retention"].values():
        assert " | ".join(map(percent, row.values())) in TEXT
