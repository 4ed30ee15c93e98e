"""The paper's six benchmarks as conversations files, from the folders that their authors publish.

    hf download nvidia/Cosmos-Reason1-Benchmark --repo-type dataset --local-dir out/cosmos
    python -m data.benchmarks --name robovqa --data out/cosmos
    python eval.py digital --data out/cosmos/robovqa.json

    robovqa, agibot, holoassist, robofail    nvidia/Cosmos-Reason1-Benchmark (arXiv 2503.15558)
        NAME/NAME_benchmark_qa_pairs.json    [{"video": "clips/1.mp4", "qa_pairs": {"question",
                                             "index2ans": {"A": ...}, "answer": "A"} or a list}]
    egothink                                 EgoThink/EgoThink (arXiv 2311.15596)
        CATEGORY/annotations.json            [{"image_path": [...], "question", "answer"}]
    sharerobot                               BAAI/ShareRobot (arXiv 2502.21257)
        planning/jsons/*.json                [{"task", "image": [...], "conversations": [{"from":
                                             "human", "value"}, {"from": "gpt", "value"}]}]

The first four ask for a letter, as in Cosmos-Reason1's own evaluation. The others are open-ended
and meant for a language model as judge, which is not included: data/scoring.py is stricter. Unpack
the archives first.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from cli import UserError, choose, parse, run
from data.conversations import as_list
from files import inside, read_text, reading, write_json


@dataclass
class BenchmarkConfig:
    name: str = "robovqa"  # robovqa, agibot, holoassist, robofail, egothink or sharerobot
    data: str = "out/cosmos"  # the benchmark's folder; NAME.json is written there


# The authors' names: the file, its field with images or clips, and its field with questions
# (None: the row itself is the question).
PUBLISHED = {
    "egothink": ("annotations.json", "image_path", None),
    "sharerobot": ("planning/**/*.json", "image", "conversations"),
}
for name in ("robovqa", "agibot", "holoassist", "robofail"):
    PUBLISHED[name] = (f"{name}_benchmark_qa_pairs.json", "video", "qa_pairs")


def read_question(pair):
    """A question as data/scoring.py expects it."""
    # the published files use both names
    answer = pair.get("answer") or pair["correct_answer"]
    if "index2ans" not in pair:
        return {"question": pair["question"], "answer": answer, "form": "open"}
    # sorted by letter, so that the question's text and "options" agree
    options = dict(sorted(pair["index2ans"].items()))
    answer = answer.strip().upper()  # letters come in either case
    assert answer in options, f"the answer {answer} is none of the options"
    lines = [f"({letter}) {text}" for letter, text in options.items()]
    lines = [pair["question"], *lines, "Answer with the letter of the right option alone."]
    return {
        "question": "\n".join(lines),
        "answer": answer,
        "form": "letter",
        "options": list(options.values()),
        "chance": 1 / len(options),
    }


def find_media(name, file, folder):
    """The path of an image or a clip in `folder`, or None if it does not exist."""
    # each benchmark's paths start at a different folder
    for place in file.relative_to(folder).parents:
        for path in (place / name, place / "images" / name):
            if inside(folder, path).exists():
                return str(path)


def convert(config):
    """Write the conversations file to the benchmark's folder."""
    pattern, shown, asked = PUBLISHED[choose(config.name, PUBLISHED, "benchmark")]
    folder = Path(config.data).absolute()
    records = []
    count = 0
    for file in sorted(folder.rglob(pattern)):  # the folder may hold other benchmarks too
        with reading(file, f"this is not how {config.name} is published"):
            for row in json.loads(read_text(file)):
                pairs = as_list(row[asked] if asked else row)
                if asked == "conversations":
                    # images come before the text in the original too
                    question = pairs[0]["value"].replace("<image>", "").lstrip()
                    pairs = [{"question": question, "answer": pairs[1]["value"]}]
                paths = [find_media(name, file, folder) for name in as_list(row[shown])]
                for pair in pairs:
                    count += 1
                    question = read_question(pair)
                    question["category"] = row.get("task", file.parent.name)
                    if None not in paths:  # some archives may still be packed
                        records.append({shown[:5]: paths, "questions": [question]})
    if not records:
        raise UserError(
            f"{folder} has {count} questions of {config.name}, but none of their images: download "
            "the benchmark and unpack its archives there"
        )
    # a conversations file refers to files in its own folder and below
    out = folder / f"{config.name}.json"
    write_json(out, records)
    print(f"{out}: {len(records)} of {count} questions, those with images present")


def main():
    convert(parse(BenchmarkConfig, description=__doc__.split("\n")[0]))


if __name__ == "__main__":
    run(main)
