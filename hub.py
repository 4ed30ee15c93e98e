"""Upload a model folder to the Hugging Face hub, with a model card made from its own files.

    export HF_TOKEN=...     a token with write access, from huggingface.co/settings/tokens
    python hub.py --weights weights/nano --repo user/name

Then `BLM.from_pretrained("user/name")` loads it anywhere. From Python, without a folder, it is
`blm.push_to_hub("user/name")`. One commit uploads the files that from_pretrained reads and the
card, but no training state, log or heads. The card quotes result files of eval.py that name this
folder as their weights, and claims nothing else.
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

# besides the weights, which may be in shards
NEEDED = ("config.json", "tokenizer.json")
# uploaded if present; a model from elsewhere has only some of them
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
    repo: str = ""  # target repository: user/name
    results: str = ""  # result files for the card, comma-separated; empty: those about --weights
    private: bool = False  # make the repository private, if it is new


# ---- what is uploaded


def model_files(folder):
    """Paths of the files in a model folder that `BLM.from_pretrained` reads, and no others."""
    folder = Path(folder)
    # each checked by name: a run that stopped early has written only some of them
    needed = [*(folder / name for name in NEEDED), *weight_files(folder)]
    for path in needed:
        if not path.is_file():
            raise UserError(f"no model folder {folder}: it has no {path.name}")
    optional = [folder / name for name in OPTIONAL]
    return needed + [path for path in optional if path.is_file()]


def results_of(folder):
    """The result files of eval.py that were measured with the weights in `folder`."""
    found = []
    for place in RESULTS:
        for path in sorted((HERE / place).glob("*.json")):
            about = read_json(path)
            # older files do not record their weights: name those with --results
            weights = (about.get("config") or {}).get("weights")
            if not weights or about["what"] == "expert":  # expert has the flag but does not use it
                continue
            if (HERE / weights).resolve() == Path(folder).resolve():
                found.append(path)
    return found


# ---- the card


def about_robots(policy):
    """The card's section about the robots, from policy.json."""
    rows = []
    for name, sizes in policy["embodiments"].items():
        numbers = {key: value for key, value in sizes.items() if key != "index"}
        robot = Embodiment(**numbers)  # older files leave out fields that have the defaults
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
    # Qwen3-VL keeps the language model's fields in a section of their own
    text = config.get("text_config") or config
    size = f"{text['num_hidden_layers']} blocks, {text['hidden_size']} wide"
    line = f"Language model: `{config['model_type']}`, {size}, stored as "
    line += f"{config.get('dtype') or text.get('dtype') or 'its files say'}."
    # a run of Stage I stores the record of the run it started from
    first = training.get("sft")
    while first and first.get("started_from"):
        first = first["started_from"]
    if first and "config" in first:
        start = first["config"].get("backbone")
        line += f" Trained from {f'`{start}`' if start else 'random weights'}."
    # the block and the hash tie the policy to this language model
    if policy:
        block = policy["config"]["intent_layer"]
        line += f" The policy reads block {block} of it (hash `{policy['backbone']}`)."
    return line + "\n"


def about_training(training):
    """One row for each stage in training.json."""
    rows = []
    for stage, record in training.items():
        figures = [f"{name} {value:.4g}" for name, value in record.get("figures", {}).items()]
        command = f"`{record['command']}`" if "command" in record else ""
        rows.append([stage, command, record.get("step", ""), "; ".join(figures)])
    return markdown(["stage", "last command", "steps", "figures on validation data"], rows)


def about_result(path):
    """A result file of eval.py in one line, maybe with a table; "" if it has no single figure."""
    result = read_json(path)
    assert {"what", "command"} <= result.keys(), "it is not a result file of eval.py"
    said = []
    # each kind of evaluation stores other keys: report those that are present
    if "interval" in result:
        low, high = (100 * end for end in result["interval"])
        if "tiers" in result:  # other simulators report the mean of their tiers
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
        # in the order of our own tables, and only the tasks that were evaluated
        names = [name for name in TASKS if name in next(iter(result["cells"].values()))]
        rows = []
        for row, cells in result["cells"].items():
            rows.append([row, *(f"{100 * cells[name]['success']:.0f}" for name in names)])
        text += "\n" + markdown(["success, %", *names], rows)
    return text


def front_matter(policy):
    """The metadata that the hub indexes a model by, as YAML."""
    pipeline = "robotics" if policy else "image-text-to-text"
    tags = ["nanoblm", "vision-language-action" if policy else "vision-language"]
    return "\n".join(
        ["---", f"pipeline_tag: {pipeline}", "tags:", *(f"- {t}" for t in tags), "---\n"]
    )


def how_to_use(policy, repo):
    # runs as it is, given an observation or a picture
    lines = ["from model import BLM", f'blm = BLM.from_pretrained("{repo}")']
    if policy:
        robot = next(iter(policy["embodiments"]))
        lines.append(f'chunk = blm.act(observation, "{robot}")')
    else:
        lines.append('reply = blm.answer([picture], "What is this?")')
    return "```python\n" + "\n".join(lines) + "\n```\n"


def model_card(folder, repo, results=()):
    """README.md for a model folder, as text. results: paths of eval.py's result files about it."""
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
    # in files from elsewhere anything may be missing
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
    # the code's license is known; weights may be bound by that of a backbone or of their data
    license_file = HERE / "LICENSE"
    if license_file.exists():
        name = license_file.read_text().splitlines()[0]
        parts += ["## License\n", f"Code: {name}. Weights: to be filled in by the uploader.\n"]
    return "\n".join(filter(None, parts))


# ---- upload


@contextmanager
def talking_to_hub(repo):
    """Turn any error between here and the hub into a one-line UserError."""
    try:
        yield
    except UserError:
        raise
    # errors of the library, of its HTTP client and of its uploader have no common base class
    except Exception as error:  # noqa: BLE001
        # the hub's own message about a wrong token does not name the repository
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = "is there a connection?"
        if status in (401, 403):
            advice = f"does the token have write access to {repo}?"
        reason = one_line(error, longest=300) or type(error).__name__
        raise UserError(f"cannot upload to {repo}: {reason}; {advice}") from None


def push(folder, repo, results=(), private=False):
    """Upload the model in `folder` with its card, as one commit. Returns the commit's URL.

    If the folder has no policy, one that the repository had before is deleted. UserError if
    anything is missing here or fails on the way.
    """
    if not re.fullmatch(r"[\w-]+/[\w.-]+", repo):
        raise UserError(f"{repo!r} is not a hub repository name: use user/name")
    # everything that can fail locally fails before a repository is created
    paths = model_files(folder)
    card = model_card(folder, repo, results)
    # slow to load, and rarely needed
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    # the library raises its own error only after the first request
    if not get_token():
        raise UserError(
            "no token for the hub: export HF_TOKEN=..., with write access, "
            "from https://huggingface.co/settings/tokens"
        )
    names = {path.name for path in paths}
    operations = [CommitOperationAdd(path.name, path) for path in paths]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    with talking_to_hub(repo):
        api = HfApi()
        # one commit: anyone who downloads meanwhile gets either the old model or the new one
        api.create_repo(repo, private=private, exist_ok=True)
        for name in api.list_repo_files(repo):
            # left over from another model: it would be loaded with this one, and refused
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
    # loads, and its parts fit together: better found here than by those who download it
    BLM.from_pretrained(config.weights, dtype=stored_dtype(config.weights))
    print(push(config.weights, config.repo, results, config.private))


if __name__ == "__main__":
    run(main)
