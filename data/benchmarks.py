"""The paper's six benchmarks, read as their authors publish them and scored: `python eval.py benchmark --name robovqa --data <folder or hub id>`.

    robovqa, agibot, holoassist, robofail    nvidia/Cosmos-Reason1-Benchmark (arXiv 2503.15558): a clip, a question, options; accuracy
        <name>/<name>_benchmark_qa_pairs.json    [{"video": "clips/<id>.mp4", "qa_pairs": {"question", "index2ans": {"A": ...}, "answer": "A"}, or a list of those}]
    egothink                                 EgoThink/EgoThink (arXiv 2311.15596): a picture, a question, an open answer
        <category>/.../annotations.json          [{"image_path": [...], "question", "answer"}]
    sharerobot                               BAAI/ShareRobot (arXiv 2502.21257): pictures of an episode, a question, an open answer
        planning/jsons/*.json                    [{"task", "image": [...], "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}]}]

Options are listed as "(A) ..." with a request for the letter, as Cosmos-Reason1's own evaluation does; the first of those letters in the reply counts. The last
two want a language model as judge, which this project does not bring: their replies are scored by exact match and by soft match, the F1 of words as
SQuAD has it (arXiv 1606.05250), which are stricter and not the paper's figures. Archives (.tar.gz) must have been unpacked; a clip may also be a
folder of pictures of the same name without ".mp4".
"""
import json
import re
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cli import UserError, choose
from data.conversations import load_media

PAPER = {                        # BLM1's table (arXiv 2510.24161), accuracy in %: its backbone before Stage I, and after
    "robovqa": (86.36, 95.45), "agibot": (42.00, 47.00), "holoassist": (49.00, 56.00), "robofail": (64.00, 66.00), "egothink": (57.00, 59.42), "sharerobot": (46.67, 65.40)}
COSMOS = ("robovqa", "agibot", "holoassist", "robofail")
MOST_FRAMES = 16                 # of a clip, evenly spread


@dataclass
class Item:
    """One question: options {letter: text} or None where the answer is open; media [("image" | "video", path)]."""
    question: str
    answer: str
    category: str
    media: list
    options: dict = None

    def prompt(self):
        if self.options is None:
            return self.question
        return "\n".join([self.question, *(f"({letter}) {text}" for letter, text in self.options.items()), "Answer with the letter of the right option alone."])

    def load(self):
        """What BLM.answers takes: pictures, and a list of frames for a video."""
        loaded = [load_media(kind, path) for kind, path in self.media]
        return [thin(found) if isinstance(found, list) else found for found in loaded]


def thin(frames):
    n = min(len(frames), MOST_FRAMES)
    return [frames[round(i * (len(frames) - 1) / max(1, n - 1))] for i in range(n)]


def find(name, data):
    """The folder itself, or the dataset of that hub id, fetched if it is not on this disk."""
    if Path(data).exists():
        return Path(data)
    if not re.fullmatch(r"[\w-]+/[\w.-]+", data):
        raise UserError(f"there is no folder {data}: give the benchmark's folder, or its name on the hub")
    from huggingface_hub import snapshot_download
    wanted = [f"{name}/*"] if name in COSMOS else None
    try:
        return Path(snapshot_download(data, repo_type="dataset", allow_patterns=wanted))
    except Exception as error:                           # the hub's errors have no common ancestor
        raise UserError(f"there is no folder {data}, and the hub does not give it: {str(error).splitlines()[0]}") from None


def rows(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(found, list):
        raise UserError(f"{path} holds no list of questions")
    return found


def existing(places, name):
    """The first of `places` that has `name`, or None."""
    return next((place / name for place in places if (place / name).exists()), None)


def read_cosmos(name, folder):
    root = folder / name if (folder / name).is_dir() else folder
    for row in rows(root / f"{name}_benchmark_qa_pairs.json"):
        clip = existing([root], row["video"]) or existing([root], row["video"].rsplit(".", 1)[0])
        pairs = row["qa_pairs"] if isinstance(row["qa_pairs"], list) else [row["qa_pairs"]]
        for pair in pairs:
            answer = pair["answer"] if "answer" in pair else pair["correct_answer"]
            yield Item(pair["question"], answer.strip().upper(), name, [("video", clip or root / row["video"])], pair["index2ans"])


def read_egothink(name, folder):
    for file in sorted(folder.rglob("annotations.json")):
        for row in rows(file):
            paths = row["image_path"] if isinstance(row["image_path"], list) else [row["image_path"]]
            media = [("image", existing([file.parent, file.parent / "images", folder], path) or file.parent / path) for path in paths]
            yield Item(row["question"], row["answer"], str(file.parent.relative_to(folder)), media)


def read_sharerobot(name, folder):
    for file in sorted((folder / "planning").rglob("*.json")) or sorted(folder.glob("*.json")):
        for row in rows(file):
            talk = {turn["from"]: turn["value"] for turn in row["conversations"][:2]}
            places = [file.parent, file.parent.parent, file.parent.parent / "images", folder, folder / "images"]
            media = [("image", existing(places, path) or file.parent / path) for path in row["image"]]
            yield Item(re.sub(r"<image>\s*|<video>\s*", "", talk["human"]), talk["gpt"], row.get("task", file.stem), media)


READERS = {**dict.fromkeys(COSMOS, read_cosmos), "egothink": read_egothink, "sharerobot": read_sharerobot}


def read(name, data):
    """The Items of a benchmark whose pictures or clips are on this disk, and how many are not. UserError if there are none, or a file has another shape."""
    choose(name, READERS, "benchmark")
    folder, found = find(name, data), []
    try:
        found += READERS[name](name, folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{data}: this is not how {name} is published ({type(error).__name__}: {error})") from None
    there = [item for item in found if all(path.exists() for _, path in item.media)]
    if not there:
        raise UserError(f"{data} has {len(found)} questions of {name}, and pictures of none of them" + ("; unpack its archives" if found else ""))
    return there, len(found) - len(there)


# ---- scores

def letter(reply, options):
    """The first letter of `options` that stands alone in a reply, inside <answer> where it has that; None without."""
    inside = re.search(r"<answer>(.*?)</answer>", reply, re.S)
    found = re.search(rf"\b[{''.join(options)}]\b", inside[1] if inside else reply)
    return found and found[0]


def words(text):
    """Lower case, without punctuation and articles."""
    return [word for word in text.lower().translate(str.maketrans("", "", string.punctuation)).split() if word not in ("a", "an", "the")]


def soft(reply, answer):
    """F1 of the words of both, 0 to 1."""
    a, b = Counter(words(reply)), Counter(words(answer))
    shared = (a & b).total()
    return 2 * shared / (a.total() + b.total()) if shared else float(a == b)


def score(items, replies):
    """{"accuracy"} where options are given, else {"exact", "soft"}; each over all and by category, 0 to 1."""
    if items[0].options is not None:
        values = {"accuracy": [letter(reply, item.options) == item.answer for item, reply in zip(items, replies)]}
    else:
        values = {"exact": [words(reply) == words(item.answer) for item, reply in zip(items, replies)], "soft": [soft(reply, item.answer) for item, reply in zip(items, replies)]}
    mean = lambda found: sum(found) / len(found)
    by = {category: [i for i, item in enumerate(items) if item.category == category] for category in sorted({item.category for item in items})}
    return {**{name: mean(found) for name, found in values.items()}, "asked": len(items),
            "categories": {category: {**{name: mean([found[i] for i in chosen]) for name, found in values.items()}, "asked": len(chosen)} for category, chosen in by.items()}}
