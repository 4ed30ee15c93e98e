"""A model folder to the Hugging Face hub, with a model card of what its own files say.

    export HF_TOKEN=...     a token that may write, from huggingface.co/settings/tokens
    python hub.py --weights weights/nano --repo user/name

Then `BLM.from_pretrained("user/name")` loads it anywhere. In Python it is
`blm.push_to_hub("user/name")`, without a folder. Uploaded is what from_pretrained reads and the
card, in one commit; no training state, no log, no heads. The card quotes files of eval.py that say
they are about this folder, and claims nothing else.
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from checkpoint import stored_dtype, weight_files
from cli import UserError, one_line, parse, run
from data.tasks import TASKS
from embodiment import Embodiment
from files import read_json, reading
from model import BLM, load_training
from tables import markdown

# beside the weights, which may be in shards
NEEDED = ("config.json", "tokenizer.json")
# read where they are there; a model from elsewhere has some of them alone
OPTIONAL = (
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "policy.json",
    "policy.safetensors",
    "training.json",
)
HERE = Path(__file__).parent
RESULTS = ("results", "out/results")  # where eval.py writes


@dataclass
class HubConfig:
    weights: str = "weights/nano"  # checkpoint folder
    repo: str = ""  # where to: user/name
    results: str = ""  # result files for the card, comma-separated; empty: those about --weights
    private: bool = False  # if the repository is a new one


# ---- what goes


def model_files(folder):
    """Paths of the files in a model folder that `BLM.from_pretrained` reads, and no others."""
    folder = Path(folder)
    # told one by one: a run that was stopped early has made some of them
    needed = [*(folder / name for name in NEEDED), *weight_files(folder)]
    for path in needed:
        if not path.is_file():
            raise UserError(f"no model folder {folder}: it has no {path.name}")
    optional = [folder / name for name in OPTIONAL]
    return needed + [path for path in optional if path.is_file()]


def results_of(folder):
    """The result files of eval.py that say they are about the weights in `folder`."""
    found = []
    for place in RESULTS:
        for path in sorted((HERE / place).glob("*.json")):
            about = read_json(path)
            # older files do not say whose figures they are: those must be named by hand
            weights = (about.get("config") or {}).get("weights")
            if not weights or about["what"] == "expert":  # which has the flag, and no use for it
                continue
            if (HERE / weights).resolve() == Path(folder).resolve():
                found.append(path)
    return found


# ---- the card


def about_robots(policy):
    """The part of the card on what it drives, from policy.json."""
    rows = []
    for name, sizes in policy["embodiments"].items():
        numbers = {key: value for key, value in sizes.items() if key != "index"}
        robot = Embodiment(**numbers)  # what older files do not say is as usual
        state = f"{robot.state_dim}: {robot.state}"
        action = f"{robot.action_dim}: {robot.action}"
        rows.append([name, state, action, ", ".join(robot.views), f"{robot.control_hz:g}"])
    steps = policy["config"]["action_horizon"]
    return (
        markdown(["robot", "state", "action", "pictures, in this order", "actions a second"], rows)
        + f"\nA chunk is {steps} actions. Pictures are square.\n"
    )


def about_backbone(folder, policy, training):
    """One paragraph from config.json and training.json."""
    config = read_json(Path(folder) / "config.json")
    # Qwen3-VL has the language model's fields in a section of their own
    text = config.get("text_config") or config
    size = f"{text['num_hidden_layers']} blocks, {text['hidden_size']} wide"
    line = f"Language model: `{config['model_type']}`, {size}, stored as "
    line += f"{config.get('dtype') or text.get('dtype') or 'its files say'}."
    # each run of Stage I holds the record of the one that it began with
    first = training.get("sft")
    while first and first.get("started_from"):
        first = first["started_from"]
    if first and "config" in first:
        start = first["config"].get("backbone")
        line += f" Trained from {f'`{start}`' if start else 'random weights'}."
    # what holds the two together
    if policy:
        block = policy["config"]["intent_layer"]
        line += f" The policy reads block {block} of it (hash `{policy['backbone']}`)."
    return line + "\n"


def about_training(training):
    """A row for each stage of training.json."""
    rows = []
    for stage, record in training.items():
        figures = [f"{name} {value:.4g}" for name, value in record.get("figures", {}).items()]
        command = f"`{record['command']}`" if "command" in record else ""
        rows.append([stage, command, record.get("step", ""), "; ".join(figures)])
    return markdown(["stage", "last command", "steps", "figures on validation data"], rows)


def about_result(path):
    """What a file of eval.py says, a line and perhaps a table; "" of kinds without one figure."""
    result = read_json(path)
    assert {"what", "command"} <= result.keys(), "it is no result of eval.py"
    said = []
    # kinds of evaluations differ in what they have: what is not there is not said
    if "interval" in result:
        low, high = (100 * end for end in result["interval"])
        if "tiers" in result:  # in other people's simulators: their mean
            success = result["mean"]
            episodes = sum(tier["n"] for tier in result["tiers"].values())
        else:
            success = result["success"]
            episodes = result["episodes"]
        said.append(
            f"success {100 * success:.1f}% of {episodes} episodes in simulation "
            f"(95% interval {low:.1f} to {high:.1f})"
        )
    for name, file in result.get("files", {}).items():
        if "means" in file:
            said.append(f"{100 * file['means']['model']:.1f}% of the questions in {name} right")
    if "done" in result:
        done = result["done"]
        said.append(f"{100 * done['rate']:.1f}% of {done['n']} commands done, several in a scene")
    if not said:
        return ""
    text = f"**{result['what']}**: {'; '.join(said)}. Command: `{result['command']}`\n"
    if result["what"] in ("physical", "perturbations"):
        # in the order of our own tables, and only those that were asked for
        names = [name for name in TASKS if name in next(iter(result["cells"].values()))]
        rows = []
        for row, cells in result["cells"].items():
            rows.append([row, *(f"{100 * cells[name]['success']:.0f}" for name in names)])
        text += "\n" + markdown(["success, %", *names], rows)
    return text


def front_matter(policy):
    """What the hub files a model under, as YAML."""
    pipeline = "robotics" if policy else "image-text-to-text"
    tags = ["nanoblm", "vision-language-action" if policy else "vision-language"]
    return "\n".join(
        ["---", f"pipeline_tag: {pipeline}", "tags:", *(f"- {t}" for t in tags), "---\n"]
    )


def how_to_use(policy, repo):
    # three lines that work as they stand, but for the observation
    lines = ["from model import BLM", f'blm = BLM.from_pretrained("{repo}")']
    if policy:
        robot = next(iter(policy["embodiments"]))
        lines.append(f'chunk = blm.act(observation, "{robot}")')
    else:
        lines.append('reply = blm.answer([picture], "What is this?")')
    return "```python\n" + "\n".join(lines) + "\n```\n"


def model_card(folder, repo, results=()):
    """README.md of a model folder, as text. results: paths of files that eval.py wrote about it."""
    folder = Path(folder)
    policy = {}
    if (folder / "policy.json").exists():
        policy = read_json(folder / "policy.json")
    training = load_training(folder)
    kind = "Drives robots and answers questions" if policy else "Answers questions"
    pitch = (
        f"{kind} about what it sees. A model of nanoBLM, a small reimplementation of "
        "[BLM1](https://arxiv.org/abs/2510.24161). In a checkout of nanoBLM:\n"
    )
    name = repo.split("/")[1]
    parts = [front_matter(policy), f"# {name}\n", pitch, how_to_use(policy, repo)]
    # of other people's folders and files anything may be missing
    with reading(folder / "policy.json"):
        if policy:
            parts += ["## Robots\n", about_robots(policy)]
    with reading(folder / "training.json"):
        parts += ["## Backbone\n", about_backbone(folder, policy, training)]
        if training:
            parts += ["## Training\n", about_training(training)]
    parts.append("## Results\n")
    for path in results:
        with reading(path, "name files that eval.py wrote"):
            parts.append(about_result(path))
    if not results:
        parts.append("No result file of `eval.py` came with these weights.\n")
    # the code's is known; weights may owe something to a backbone or to somebody's data
    license_file = HERE / "LICENSE"
    if license_file.exists():
        name = license_file.read_text().splitlines()[0]
        parts += ["## License\n", f"Code: {name}. Weights: to be filled in by who uploads them.\n"]
    return "\n".join(filter(None, parts))


# ---- upload


@contextmanager
def talking_to_hub(repo):
    """Turn whatever goes wrong between here and the hub into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    # errors of the library, of its HTTP client and of its uploader share no class
    except Exception as error:  # noqa: BLE001
        # what the hub itself says of a wrong token does not name the repository
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = "is there a connection?"
        if status in (401, 403):
            advice = f"may the token write to {repo}?"
        reason = one_line(error, longest=300) or type(error).__name__
        raise UserError(f"cannot upload to {repo}: {reason}; {advice}") from None


def push(folder, repo, results=(), private=False):
    """Upload the model in `folder` with its card, as one commit. Returns the commit's address.

    A policy that the repository had before goes if the folder has none. UserError if anything
    is missing here or goes wrong on the way.
    """
    if not re.fullmatch(r"[\w-]+/[\w.-]+", repo):
        raise UserError(f"{repo!r} is no repository of the hub: name one as user/name")
    # all that can be wrong here is told before there is a repository
    paths = model_files(folder)
    card = model_card(folder, repo, results)
    # slow to load, and rarely needed
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    # its own error is raised only behind the first request
    if not get_token():
        raise UserError(
            "no token for the hub: export HF_TOKEN=..., one that may write, "
            "from https://huggingface.co/settings/tokens"
        )
    names = {path.name for path in paths}
    operations = [CommitOperationAdd(path.name, path) for path in paths]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    with talking_to_hub(repo):
        api = HfApi()
        # one commit: whoever loads it meanwhile gets the old model or the new one
        api.create_repo(repo, private=private, exist_ok=True)
        for name in api.list_repo_files(repo):
            # of another model: it would be loaded with this one, and refused
            if name in OPTIONAL and name not in names:
                operations.append(CommitOperationDelete(name))
        return api.create_commit(
            repo, operations, commit_message="Upload a model of nanoBLM"
        ).commit_url


def main():
    config = parse(HubConfig, description="Upload a model folder to the Hugging Face hub.")
    if not Path(config.weights).is_dir():
        raise UserError(f"no folder {config.weights}: name one with --weights")
    results = config.results.split(",") if config.results else results_of(config.weights)
    model_files(config.weights)
    # whole, and of one piece: told before anyone else meets it
    BLM.from_pretrained(config.weights, dtype=stored_dtype(config.weights))
    print(push(config.weights, config.repo, results, config.private))


if __name__ == "__main__":
    run(main)
