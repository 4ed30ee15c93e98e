"""README and docs are right: commands have the flags they show, links work, figures are those in
the result files, and the README stays short.
"""

import importlib
import json
import re
import shlex
import sys

import pytest
from conftest import ROOT

import cli
import sample
from data.scoring import distance
from data.tasks import TASKS

README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README}
PAGES |= {f"docs/{path.name}": path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
RESULTS = PAGES["docs/RESULTS.md"]
STARTS = r"(?:torchrun --nproc_per_node \d+ |python )(?:-m )?[\w./]+"


def commands_of(page, text):
    """Commands of a page that start one of our programs, from blocks and from lines."""
    if page == "docs/WEIGHTS.md":  # only the last column of its table has current commands
        lines = text.splitlines()
        text = "\n".join(line.split(" | ")[-1] if line.startswith("|") else line for line in lines)
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    lines += re.findall(r"`([^`\n]+)`", text)
    found = [line.split(" #")[0].strip() for line in lines]
    return [line for line in found if re.match(STARTS, line) and "pytest" not in line]


COMMANDS = []
for page in PAGES:
    COMMANDS += [line for line in commands_of(page, PAGES[page]) if line not in COMMANDS]


class Parsed(Exception):
    pass


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_flags_they_print(command, monkeypatch):
    words = shlex.split(re.sub(r"^torchrun --nproc_per_node \d+|^python", "", command))
    name, *argv = words[1:] if words[0] == "-m" else words
    name = name.removesuffix(".py")
    if name == "dev.figures":
        pytest.importorskip("matplotlib")
    module = importlib.import_module(name)
    parse = cli.parse

    def spy(*classes, **options):
        parse(*classes, **options)
        raise Parsed

    monkeypatch.setattr(module, "parse", spy)
    monkeypatch.setattr(sys, "argv", [name, *argv])
    with pytest.raises(Parsed):
        module.main()


def test_commands_were_found():
    assert len(COMMANDS) >= 30


@pytest.mark.parametrize("page", PAGES)
def test_links_and_scripts_are_there(page):
    text = PAGES[page]
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\((.*?)\)", text):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            assert (folder / path).exists(), link
            if anchor:
                titles = re.findall(r"^#+ (.+)$", (folder / path).read_text(), re.MULTILINE)
                assert anchor in [title.lower().replace(" ", "-") for title in titles], link
    for script in re.findall(r"\bsh ([\w./]+\.sh)", text):
        assert (ROOT / script).exists(), script


def test_readme_is_two_screens_long():
    assert len(README.split("\n## More")[0].split()) <= 900


def test_first_screen_has_picture_pitch_and_commands():
    screen = "\n".join(README.splitlines()[:40])
    picture, pitch, commands = (
        screen.index("](assets/mosaic.gif)"),
        screen.index("*vision-language-action*"),
        screen.index("```sh"),
    )
    assert picture < pitch < commands
    assert len(commands_of("README.md", screen + "\n```")) >= 3


def test_sample_answers_as_the_readme_says(tmp_path, monkeypatch, capsys):
    question = re.search(r'python sample.py --ask "(.+)"', README)[1]
    said = re.search(r'`(\{"point_2d".+?\})`', README)[1]
    argv = ["sample.py", "--ask", question, "--weights", str(ROOT / "weights" / "nano")]
    monkeypatch.setattr(sys, "argv", [*argv, "--out", str(tmp_path)])
    sample.main()
    reply = capsys.readouterr().out.splitlines()[1]  # the device, the reply
    assert json.loads(reply)["label"] == "red cube"
    assert distance(reply, said) <= 3  # pixels: renderers differ


# ---- figures


def result(name):
    return json.loads((ROOT / "results" / name).read_text())


def percent(share, digits=0):
    return f"{100 * share:.{digits}f}"


def row(text, *starts):
    """The cells of the table row whose first cells are these."""
    lines = text.splitlines()
    line = next(line for line in lines if line.startswith(f"| {' | '.join(map(str, starts))} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("page", ["README.md", "docs/RESULTS.md"])
def test_physical_figures_come_from_the_result_file(page):
    found = result("physical.json")
    low, high = found["interval"]
    assert f"Mean {percent(found['mean'], 2)}%" in PAGES[page]
    assert f"interval {percent(low, 1)} to {percent(high, 1)}" in PAGES[page]
    for robot, cells in found["cells"].items():
        _, *texts, mean = row(PAGES[page], robot)
        rates = [cells[task]["success"] for task in TASKS]
        assert [text.split(" (")[0] for text in texts] == [percent(rate) for rate in rates]
        assert mean == percent(sum(rates) / len(rates), 1)


def test_figures_of_experts_and_of_no_words_come_from_the_result_files():
    assert f"solves {percent(result('expert.json')['mean'], 2)}%" in RESULTS
    found = result("no_words.json")
    mean = percent(found["mean"], 1)
    assert f"succeeds in {mean}% of" in README
    rates = [percent(found["cells"][task]["success"], 1) for task in TASKS]
    assert row(RESULTS, *rates) == [*rates, mean]


TOLD = ("done", "pairs", "seen_wordings", "new_wordings", "off_template", "new_combination")
TOLD += ("neutral", "no_words", "other")


def test_figures_of_scenes_with_several_commands_come_from_the_result_files():
    shipped = result("told.json")
    listening = result("told-text-first.json")
    before = result("told-text-first-before.json")
    rows = {"shipped": shipped, "text first, before": before, "text first": listening}
    rows["text first, three hours"] = result("told-three-hours.json")
    rows |= listening["families"]
    for name, figures in rows.items():
        texts = [percent(figures[figure]["rate"], 1) for figure in TOLD]
        assert row(RESULTS, name) == [name, *texts]
    done = shipped["done"]
    assert f"does {percent(done['rate'], 1)}% of {done['n']} commands" in " ".join(README.split())
    hours = [
        percent(rows[name]["done"]["rate"], 1) for name in ("text first", "text first, three hours")
    ]
    assert "did {}% in seven hours and {}% in three".format(*hours) in " ".join(README.split())
    for name in ("text-first", "text-first-before", "three-hours"):
        cells = result(f"physical-{name}.json")
        assert f"{percent(cells['mean'], 1)}% of {cells['episodes']:,} episodes" in RESULTS


def test_figures_of_goals_come_from_the_result_file():
    for length, figures in result("plan-three-hours.json")["lengths"].items():
        texts = [percent(figure["rate"], 1) for figure in figures.values()]
        number = figures["planned"]["n"]
        assert row(RESULTS, f"{length} commands") == [f"{length} commands", str(number), *texts]


def test_arms_are_those_of_the_result_file():
    found = result("arms.json")
    text = PAGES["docs/FORMATS.md"]
    assert found["command"] in text
    assert f"in all of {found['episodes']} layouts" in " ".join(text.split())
    for name, arm in found["arms"].items():
        _, gripper, solved, others = row(text, name)
        if "refused" in arm:
            assert (gripper, solved, others) == ("", "refused", arm["refused"])
            continue
        assert gripper == ("own" if arm["gripper"] == "own" else "xArm-6's")
        cells = arm["tasks"]
        assert int(solved) == sum(cell["solved"] == found["episodes"] for cell in cells.values())
        missed = {task: cell for task, cell in cells.items() if cell["ended"]}
        wanted = [f"{task} {cell['solved']}/{found['episodes']}" for task, cell in missed.items()]
        assert re.findall(r"\w+ \d/\d", others) == wanted


def test_figures_of_late_chunks_come_from_the_result_file():
    found = result("delays.json")
    assert f"`{found['command']}`" in RESULTS
    for name, figures in found["rows"].items():
        low, high = (percent(end) for end in figures["interval"])
        steps = ("border_step", "largest_border_step", "inner_step")
        texts = [f"{1000 * figures[step]:.0f}" for step in steps]
        texts = [percent(figures["success"], 1), f"{low} to {high}", *texts]
        assert row(RESULTS, name)[1:] == [*texts, f"{figures['jerk']:.1f}"]
        assert f"{figures['episodes']} episodes per row" in RESULTS


def test_figures_off_the_templates_come_from_the_result_file():
    files = result("off_template.json")["files"]
    templates, off = (files[f"out/off/{name}.jsonl"]["means"] for name in ("val", "off_template"))
    assert f"off its templates it answers {percent(off['model'], 1)}% of questions" in README
    text = " ".join(RESULTS.split())
    assert f"nano answers {percent(templates['model'], 1)}% of questions from its templates" in text
    assert f"and {percent(off['model'], 1)}% of these" in text
    assert f"It answers only {percent(off['model'], 1)}% of questions that are phrased" in text
    noise = f"{percent(templates['blind'], 1)}% and {percent(off['blind'], 1)}%"
    assert f"Shown noise instead of images, it answers {noise}. " in text
    assert f"{percent(off['degenerate'], 1)}% of the replies off the templates repeat" in text


def test_digital_figures_come_from_the_result_file():
    found = result("digital.json")
    assert f"answer {percent(found['mean'], 1)}% of" in README
    for name, rates in found["categories"].items():
        texts = row(RESULTS, name, rates["asked"])
        wanted = [percent(rates[who]) for who in ("chance", "blind", "base")]
        assert texts[2:5] == wanted
        assert percent(rates["model"]) in texts
        assert texts[-1] == f"{percent(rates['seen'])} / {percent(rates['held_out'])}"
    means = row(RESULTS, "mean", found["asked"])
    for who in ("mean", "blind_mean", "chance_mean", "base_mean"):
        assert percent(found[who], 1) in means
    for rates in found["retention"].values():
        assert " | ".join(map(percent, rates.values())) in RESULTS


def test_figures_of_the_language_model_that_knows_commands_come_from_the_result_files():
    files = result("digital-listen.json")["files"]
    names = {"val": "templates", "off_template": "off the templates"}
    names |= {"questions": "about commands", "probes": "general instructions"}
    for path, found in files.items():
        asked = sum(rates["asked"] for rates in found["categories"].values())
        rates = [percent(found["means"][who], 1) for who in ("chance", "blind", "base", "model")]
        name = names[path.split("/")[-1].removesuffix(".jsonl")]
        assert row(RESULTS, name) == [name, f"{asked:,}", *rates]
    kinds = result("wordings-listen.json")["models"]["weights/listen"]
    px = {kind: f"{figures['px']:.2f}" for kind, figures in kinds.items()}
    text = " ".join(RESULTS.split())
    said = (
        "{seen} px off in wordings of training, {held_out} in held-out ones and {off_template} as"
    )
    assert said.format(**px) in text
    assert f"the worst with {px['by_place']} px" in text and f"it is {px['.']} (" in text


def rates_of(figures):
    """Success of each task in ManiSkill, and of all with its interval."""
    tasks = [percent(figures["tasks"][task]["success"]) for task in TASKS]
    low, high = (percent(end, 1) for end in figures["interval"])
    return [*tasks, f"{percent(figures['mean'], 1)} ({low} to {high})"]


def test_figures_of_maniskill_come_from_the_result_file():
    found = result("maniskill-transferred.json")
    text = PAGES["docs/MANISKILL.md"]
    ways = {"as it is": found, 'told "."': found["controls"]["no sentence"]}
    ways["told another task's sentence"] = found["controls"]["another sentence"]
    ways["noise for pictures"] = found["controls"]["no picture"]
    ways["our pictures of ManiSkill's state"] = found["controls"]["our pictures"]
    for name, figures in ways.items():
        assert row(text, name) == [name, *rates_of(figures)]


def test_figures_of_sentences_come_from_the_result_file():
    found = result("sentences.json")
    text = PAGES["docs/LOG.md"]
    asides = [
        "red on green, please: one cube upon the other",
        "on {cubeB}, please, put {cubeA}",
    ]
    for model, sentences in found["sentences"].items():
        far = [f"{percent(sentences[aside]['far'])}%" for aside in asides]
        kinds = found["models"][model]
        told = ("held_out", "off_template", "by_place", ".")
        px = [f"{kinds[kind]['px']:.2f} px" for kind in told]
        assert f"| {' | '.join([*far, *px])} |" in text


def test_figures_of_maniskill_after_training_there_come_from_the_result_files():
    found = result("maniskill.json")
    text = PAGES["docs/MANISKILL.md"]
    ways = {
        "trained there": found,
        "Stage I alone has seen its images": result("maniskill-seen.json"),
    }
    ways['trained there, told "."'] = found["controls"]["no sentence"]
    ways["trained there, told another task's sentence"] = found["controls"]["another sentence"]
    ways["trained there, noise for pictures"] = found["controls"]["no picture"]
    for name, figures in ways.items():
        assert row(text, name) == [name, *rates_of(figures)]
    seen = ways["Stage I alone has seen its images"]
    said = f"succeeds in {percent(seen['mean'], 1)}% of {seen['tiers']['panda']['n']} episodes"
    assert said in " ".join(README.split()) and said in " ".join(text.split())
