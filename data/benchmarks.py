"""The paper's six benchmarks as conversations files, from the folders that their authors publish.

    hf download nvidia/Cosmos-Reason1-Benchmark --repo-type dataset --local-dir out/cosmos
    python -m data.benchmarks --name robovqa --data out/cosmos
    python eval.py digital --data out/cosmos/robovqa.jsonl

    robovqa, agibot, holoassist, robofail    nvidia/Cosmos-Reason1-Benchmark (arXiv 2503.15558)
        NAME/NAME_benchmark_qa_pairs.json    [{"video": "clips/1.mp4", "qa_pairs": {"question",
                                             "index2ans": {"A": ...}, "answer": "A"} or a list}]
    egothink                                 EgoThink/EgoThink (arXiv 2311.15596)
        CATEGORY/annotations.json            [{"image_path": [...], "question", "answer"}]
    sharerobot                               BAAI/ShareRobot (arXiv 2502.21257)
        planning/jsons/*.json                [{"task", "image": [...], "conversations": [{"from":
                                             "human", "value"}, {"from": "gpt", "value"}]}]

The first four ask for a letter, as Cosmos-Reason1's own evaluation does; the others are open and
want a language model as judge, which is not here: data/scoring.py is stricter. Archives must have
been unpacked; a clip may also be a folder of pictures of its name without ".mp4".
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from cli import UserError, choose, parse, run
from files import atomic, inside, read_text, reading


@dataclass
class BenchmarkConfig:
    name: str = "robovqa"  # robovqa, agibot, holoassist, robofail, egothink or sharerobot
    data: str = "out/cosmos"  # the benchmark's folder; NAME.jsonl is written into it


# Each reader yields (names of pictures or clips, question) for every question of a row.


def read_cosmos(row):
    for pair in listed(row["qa_pairs"]):
        # listed by letter, as the question's text and "options" must agree
        options = dict(sorted(pair["index2ans"].items()))
        # the published files have both names, and letters in both cases
        answer = (pair.get("answer") or pair["correct_answer"]).strip().upper()
        assert answer in options, f"the answer {answer} is none of the options"
        lines = [f"({letter}) {text}" for letter, text in options.items()]
        lines = [pair["question"], *lines, "Answer with the letter of the right option alone."]
        question = {
            "question": "\n".join(lines),
            "answer": answer,
            "form": "letter",
            "options": list(options.values()),
            "chance": 1 / len(options),
        }
        yield [row["video"]], question


def read_egothink(row):
    question = {"question": row["question"], "answer": row["answer"]}
    yield listed(row["image_path"]), question


def read_sharerobot(row):
    asked, answered = (turn["value"] for turn in row["conversations"][:2])
    # pictures come first here as they do there
    asked = re.sub(r"<image>\s*", "", asked)
    yield row["image"], {"question": asked, "answer": answered, "category": row["task"]}


def listed(entry):
    """The published files have a list, or its one entry alone."""
    return entry if isinstance(entry, list) else [entry]


READERS = {
    "egothink": (read_egothink, "images", "annotations.json"),
    "sharerobot": (read_sharerobot, "images", "planning/**/*.json"),
}
for name in ("robovqa", "agibot", "holoassist", "robofail"):
    READERS[name] = (read_cosmos, "videos", f"{name}_benchmark_qa_pairs.json")


def find_media(name, file, folder):
    """The path in `folder` of a picture, a clip or its frames, or None if it is not there."""
    # names start at different folders from benchmark to benchmark
    for place in file.parents:
        for start in (place, place / "images"):
            path = inside(folder, start / name)
            path = path if path.exists() else path.with_suffix("")  # frames of clips/1.mp4
            if path.exists():
                return str(path.relative_to(folder))
        if place == folder:
            return None


def convert(config):
    """Write the conversations file into the benchmark's folder."""
    reader, kind, pattern = READERS[choose(config.name, READERS, "benchmark")]
    folder = Path(config.data).absolute()
    records = []
    count = 0
    for file in sorted(folder.rglob(pattern)):  # the folder may hold other benchmarks too
        with reading(file, f"this is not how {config.name} is published"):
            for row in json.loads(read_text(file)):
                for names, question in reader(row):
                    count += 1
                    # what a reader says goes before
                    question = {"category": file.parent.name, "form": "open", **question}
                    paths = [find_media(name, file, folder) for name in names]
                    # some archives may still be packed
                    if None not in paths:
                        records.append({kind: paths, "questions": [question]})
    if not records:
        raise UserError(
            f"{folder} has {count} questions of {config.name}, and pictures of none: download "
            "the benchmark and unpack its archives there"
        )
    # a conversations file names what lies beside and below it
    out = folder / f"{config.name}.jsonl"
    with atomic(out) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{out}: {len(records)} of {count} questions, those whose pictures are there")


if __name__ == "__main__":
    run(lambda: convert(parse(BenchmarkConfig, description=__doc__.split("\n")[0])))
