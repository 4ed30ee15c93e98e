"""The hub: uploads contain what from_pretrained needs, and a card with figures from the files.

A fake of the hub's HTTP API, on this machine, answers as far as files and names go.
"""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import huggingface_hub
import huggingface_hub.constants
import pytest
from conftest import ROOT
from huggingface_hub import hf_api
from test_mistakes import call
from test_model import observation, small_blm

import hub
from cli import UserError
from model import BLM

NANO = ROOT / "weights" / "nano"
COMMIT = "a" * 40
TOKEN = "hf_right"
TYPED = ("config.json", "tokenizer.json", "model.safetensors")


class StandIn(BaseHTTPRequestHandler):
    """Repositories as {name: {file: bytes}}; every file is sent in the commit itself."""

    repositories: ClassVar = {}

    def log_message(self, *_):
        pass

    def reply(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid username or password."}, 401)
        place = self.path.split("?")[0]
        if place == "/api/repos/create":
            about = json.loads(body)
            name = f"{about['organization']}/{about['name']}"
            self.repositories.setdefault(name, {})
            return self.reply({"url": f"http://{self.headers['Host']}/{name}"})
        if place == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        _, _, _, user, name, verb, _ = place.split("/")
        files = self.repositories[f"{user}/{name}"]
        if verb == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in asked
            ]
            return self.reply({"files": modes})
        assert verb == "commit"
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        url = f"http://{self.headers['Host']}/{user}/{name}/commit/{COMMIT}"
        return self.reply({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":
            files = self.repositories.get("/".join(parts[2:4]))
            if files is None:
                return self.reply({}, 404, X_Error_Code="RepoNotFound")
            if "tree" in parts:
                rows = []
                for path, content in files.items():
                    rows.append({"type": "file", "path": path, "size": len(content), "oid": path})
                return self.reply(rows)
            siblings = [{"rfilename": path} for path in files]
            return self.reply(
                {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings, "private": False}
            )
        content = self.repositories["/".join(parts[:2])].get(parts[-1])
        if content is None:
            return self.reply({}, 404, X_Error_Code="EntryNotFound")
        return self.reply(content, ETag=f'"{len(content)}-{parts[-1]}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def repositories(monkeypatch, tmp_path):
    """The fake's token with write access, and an empty cache."""
    StandIn.repositories = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # a new one, because the library's caches what it knows about the endpoint
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hf_api.HfApi(address))
    yield StandIn.repositories
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    """A model folder as training leaves it, with files that nobody else needs."""
    folder = tmp_path / "trained"
    small_blm().save_pretrained(folder)
    (folder / "state").mkdir()
    (folder / "state" / "7.safetensors").write_bytes(b"moments")
    (folder / "heads.safetensors").write_bytes(b"heads")
    (folder / "log.jsonl").write_text("{}\n")
    (folder / "README.md").write_text("mine\n")
    return folder


def test_what_goes_is_what_from_pretrained_needs_and_a_card(repositories, folder):
    hub.push(folder, "user/name")
    sent = repositories["user/name"]
    wanted = {*hub.NEEDED, *hub.OPTIONAL, "model.safetensors", "README.md"}
    assert set(sent) == wanted - {"processor_config.json"}
    for name in set(sent) - {"README.md"}:
        assert sent[name] == (folder / name).read_bytes()
    assert sent["README.md"].decode() == hub.model_card(folder, "user/name")
    # nothing that is read was left out
    copy = folder.parent / "copy"
    copy.mkdir()
    for name, content in sent.items():
        (copy / name).write_bytes(content)
    seen = observation()
    chunk = BLM.from_pretrained(copy).act(seen, "panda")
    assert (chunk == BLM.from_pretrained(folder).act(seen, "panda")).all()


def test_what_is_pushed_is_what_is_loaded(repositories):
    blm = small_blm()
    address = blm.push_to_hub("user/again")
    assert address.endswith(f"/user/again/commit/{COMMIT}")
    seen = observation()
    again = BLM.from_pretrained("user/again")
    assert (again.act(seen, "panda") == blm.act(seen, "panda")).all()


def test_a_policy_of_the_model_before_goes(repositories):
    small_blm().push_to_hub("user/name")
    repositories["user/name"]["notes.txt"] = b"kept"
    small_blm(policy=False).push_to_hub("user/name")
    left = set(repositories["user/name"])
    assert not left & {"policy.json", "policy.safetensors"}
    assert {"notes.txt", "README.md", *TYPED} <= left


def test_the_card_of_the_shipped_weights_quotes_the_files():
    card = hub.model_card(NANO, "user/nano", hub.results_of(NANO))
    physical = json.loads((ROOT / "results" / "physical.json").read_text())
    assert f"success {100 * physical['success']:.1f}% of {physical['episodes']} episodes" in card
    cells = [f"{100 * cell['success']:.0f}" for cell in physical["cells"]["widowx"].values()]
    assert sorted(row_of(card, "widowx", 1)) == sorted(cells)
    policy = json.loads((NANO / "policy.json").read_text())
    assert policy["state"] in card and policy["action"] in card and policy["backbone"] in card
    assert "| front, wrist | 20 |" in card and "Trained from random weights" in card
    assert "Code: MIT License" in card and 'BLM.from_pretrained("user/nano")' in card
    # no results of other weights, or of the expert
    assert "out/policy" not in card and "expert" not in card
    assert len(card.split("```")[1].strip().splitlines()) == 4  # python, and three lines


def test_a_card_quotes_what_was_measured_elsewhere():
    path = ROOT / "results" / "maniskill-transferred.json"
    result = json.loads(path.read_text())
    said = hub.about_result(path)
    episodes = sum(task["episodes"] for task in result["tasks"].values())
    assert f"**maniskill**: success {100 * result['mean']:.1f}% of {episodes} episodes" in said
    assert result["command"] in said


def row_of(card, name, number):
    """Cells of a row: the number-th row that starts so."""
    rows = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in rows[number].strip("|").split("|")][1:]


def test_a_card_claims_nothing_without_files(folder):
    (folder / "training.json").unlink()
    card = hub.model_card(folder, "user/name")
    assert "No result file" in card and "%" not in card
    assert "## Training" not in card and "Trained from" not in card


MISTAKES = [
    ("--weights {tmp}/nowhere --repo u/n", "no folder .*nowhere"),
    ("--weights {tmp} --repo u/n", "no model folder .* it has no config.json"),
    ("--weights {folder} --repo name", "'name' is not a hub repository name"),
    ("--weights {folder} --repo u/n --results {folder}/config.json", "cannot read .*eval.py wrote"),
]


@pytest.mark.parametrize("argv, says", MISTAKES)
def test_mistakes_are_told_before_anything_is_sent(
    argv, says, repositories, folder, monkeypatch, capsys
):
    argv = argv.format(tmp=folder.parent, folder=folder).split()
    code, said = call(hub, argv, monkeypatch, capsys)
    assert code == 2 and len(said.splitlines()) == 1
    assert re.search(says, said), said
    assert not repositories


def test_without_a_token_it_says_where_to_get_one(repositories, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="export HF_TOKEN"):
        hub.push(folder, "user/name")


def test_a_token_that_may_not_write_is_told(repositories, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(
        UserError, match="cannot upload to user/name: .*does the token have write access"
    ):
        hub.push(folder, "user/name")
    assert not repositories


def test_without_a_connection_it_says_so(repositories, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot upload to user/name: .*is there a connection"):
        hub.push(folder, "user/name")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    closed = "http://127.0.0.1:9"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hf_api.HfApi(closed))
    with pytest.raises(UserError, match="cannot upload to user/name: .*is there a connection"):
        hub.push(folder, "user/name")
