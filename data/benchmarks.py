"""The paper's six benchmarks as conversations files, from the folders that their authors publish.

    python -m data.benchmarks --name robovqa --data nvidia/Cosmos-Reason1-Benchmark
    python eval.py digital --data out/robovqa.jsonl

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
been unpacked; a clip may also be a folder of pictures of its name without ".mp4". Beside the file
comes a link to the data.
"""

import json
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from cli import UserError, choose, parse, run
from files import atomic, find_folder, inside, read_text, reading


@dataclass
class BenchmarkConfig:
    name: str = "robovqa"  # robovqa, agibot, holoassist, robofail, egothink or sharerobot
    data: str = "nvidia/Cosmos-Reason1-Benchmark"  # the benchmark's folder, or its name on the hub
    out: str = ""  # conversations file; default out/<name>.jsonl


# Each reader: ([names of pictures or clips], question) for every question of a row.


def read_cosmos(row):
    pairs = row["qa_pairs"] if isinstance(row["qa_pairs"], list) else [row["qa_pairs"]]
    for pair in pairs:
        options = dict(sorted(pair["index2ans"].items()))
        # the published files have both names, and letters in both cases
        answer = (pair.get("answer") or pair["correct_answer"]).strip().upper()
        assert answer in options, f"the answer {answer} is none of the options"
        lines = [f"({letter}) {text}" for letter, text in options.items()]
        lines = [pair["question"], *lines, "Answer with the letter of the right option alone."]
        question = {"question": "\n".join(lines), "answer": answer, "form": "letter"}
        question |= {"options": list(options.values()), "chance": 1 / len(options)}
        yield [row["video"]], question


def read_egothink(row):
    paths = row["image_path"] if isinstance(row["image_path"], list) else [row["image_path"]]
    yield paths, {"question": row["question"], "answer": row["answer"]}


def read_sharerobot(row):
    asked, answered = (turn["value"] for turn in row["conversations"][:2])
    # pictures come first here as they do there
    question = re.sub(r"<(image|video)>\s*", "", asked)
    yield row["image"], {"question": question, "answer": answered, "category": row["task"]}


COSMOS = ("robovqa", "agibot", "holoassist", "robofail")
READERS = {name: (read_cosmos, "videos", f"{name}_benchmark_qa_pairs.json") for name in COSMOS}
READERS["egothink"] = (read_egothink, "images", "annotations.json")
READERS["sharerobot"] = (read_sharerobot, "images", "planning/**/*.json")


def find_media(name, file, folder):
    """A picture, a clip or the folder of its frames beside `file` or further up in `folder`."""
    for place in file.parents:
        # names start at different folders from benchmark to benchmark
        for path in (inside(place, name), inside(place / "images", name)):
            path = path if path.exists() else path.with_suffix("")  # frames of clips/1.mp4
            if path.exists() and place.is_relative_to(folder):
                return path
    return None


def read(name, folder):
    """(records of a conversations file that names media NAME/..., number of all questions)."""
    reader, kind, pattern = READERS[name]
    records = []
    count = 0
    for file in sorted(folder.rglob(pattern)):  # the folder may hold other benchmarks too
        with reading(file, f"this is not how {name} is published"):
            for names, question in chain.from_iterable(map(reader, json.loads(read_text(file)))):
                count += 1
                question = {"category": file.parent.name, "form": "open"} | question
                paths = [find_media(media, file, folder) for media in names]
                if None not in paths:  # archives that nobody has unpacked
                    paths = [f"{name}/{path.relative_to(folder)}" for path in paths]
                    records.append({kind: paths, "questions": [question]})
    return records, count


def convert(config):
    """Write the conversations file, and beside it a link to the folder that its paths go through."""
    choose(config.name, READERS, "benchmark")
    patterns = [f"{config.name}/*"] if config.name in COSMOS else None
    folder = find_folder(config.data, repo_type="dataset", allow_patterns=patterns)
    records, count = read(config.name, folder.absolute())
    if not records:
        raise UserError(
            f"{folder} has {count} questions of {config.name}, and pictures of none: give the "
            "benchmark's folder, with its archives unpacked, or its name on the hub"
        )
    out = Path(config.out or f"out/{config.name}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    link = out.with_name(config.name)  # a conversations file names what lies below it
    if not link.exists():
        link.symlink_to(folder.absolute())
    if not link.samefile(folder):
        raise UserError(f"{link} is in the way of a link to {folder}: choose another --out")
    with atomic(out) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{out}: {len(records)} of {count} questions, those whose pictures are there")


if __name__ == "__main__":
    run(lambda: convert(parse(BenchmarkConfig, description=__doc__.split("\n")[0])))
