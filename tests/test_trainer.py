"""A run loses nothing: killed and resumed it is the run that was not, on one process, two or shards; spikes and full disks are told."""
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import test_sft
import test_train_policy
import train_policy
import train_sft
import trainer
from cli import UserError
from conftest import last_state, spawn_two
from policy import PolicyConfig
from trainer import Muon, Run, RunConfig, checkpoints, make_optimizers, orthogonal, shard, whole

made = test_train_policy.made                                            # the fixture


@dataclass
class LineConfig(RunConfig):
    out: str = ""
    data: str = ""


def fit(out, bad=(), watch=lambda run: None, evaluate=lambda: {"val": 1.0}, **changes):
    """A run of a two-layer network; steps in `bad` have a huge loss, or with None as their number one that is not a number."""
    cfg = LineConfig(**{**dict(out=str(out), steps=90, batch_size=4, warmup=2, lr=1e-2, save_every=5, eval_every=1000, device="cpu"), **changes})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    run = Run(cfg, asdict(cfg))
    if run.sharded:
        shard(model, [model[0]], run.device)
    run.begin({"model": model}, make_optimizers((model,), cfg))

    def batches_of(step):
        x = torch.randn(cfg.batch_size, 3, generator=torch.Generator().manual_seed(step))
        return x[run.rank::run.world], (x.sum(1, keepdim=True) * 2)[run.rank::run.world]

    def gradients(batches, step):
        watch(run)
        loss = (model(batches[0]) - batches[1]).square().sum() / cfg.batch_size * dict(bad).get(step, 1.0)
        run.backward(loss)
        return {"loss": loss.detach()}

    def export():
        weights = whole(model)
        if run.rank == 0:
            (Path(cfg.out) / "export.json").write_text(json.dumps(float(weights["0.weight"].sum())))

    run.loop(batches_of, gradients, evaluate, export, lambda: run.about("line"), lambda step: f"rows of {step}", lambda batches, step: 1.0)
    return run


def losses(out):
    return [json.loads(line)["loss"] for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def die_at(moments, out):
    """In a fresh process, which is safe to fork: a run that dies without a word in the middle of a step, again and again."""
    for moment in moments:
        child = os.fork()
        if child == 0:
            fit(out, watch=lambda run: run.step == moment and os.kill(os.getpid(), signal.SIGKILL), resume=bool(checkpoints(out)))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_killed_at_twenty_moments_it_ends_with_the_same_bits(tmp_path):
    fit(tmp_path / "whole")
    moments = sorted(np.random.default_rng(0).choice(np.arange(1, 89), 20, replace=False).tolist())
    killer = torch.multiprocessing.get_context("spawn").Process(target=die_at, args=(moments, tmp_path / "killed"))
    killer.start()
    killer.join()
    assert killer.exitcode == 0
    fit(tmp_path / "killed", resume=True)
    one, two = last_state(tmp_path / "whole"), last_state(tmp_path / "killed")
    assert one.keys() == two.keys() and len(one) == 16 and all(torch.equal(one[name], two[name]) for name in one)
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert [path.stem for path in checkpoints(tmp_path / "killed")] == ["00000085", "00000090"] and not list((tmp_path / "killed" / "state").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends(tmp_path, number, capsys):
    fit(tmp_path / "whole", steps=12)
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path / "parts", steps=12, watch=lambda run: run.step == 6 and os.kill(os.getpid(), number))
    assert stopped.value.code == 128 + number and "stopped at step 7" in capsys.readouterr().err and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    fit(tmp_path / "parts", steps=12, resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def interrupted():
    os.kill(os.getpid(), signal.SIGTERM)
    return {"val": 1.0}


def two_interrupted(out):
    with pytest.raises(SystemExit):
        fit(out, steps=12, eval_every=4, save_every=100, evaluate=interrupted)


def test_a_signal_during_evaluation_ends_the_next_step_and_saves_it(tmp_path):
    for name, run in (("one", two_interrupted), ("two", lambda out: spawn_two(two_interrupted, out))):
        run(str(tmp_path / name))
        assert [path.stem for path in checkpoints(tmp_path / name)] == ["00000005"]
        fit(tmp_path / name, steps=12, resume=True)
    assert np.abs(np.subtract(losses(tmp_path / "one"), losses(tmp_path / "two"))).max() < 1e-4


def two(out, steps, fsdp, resume=False):
    fit(out, steps=steps, fsdp=fsdp, resume=resume, warmup=99)           # all of it: the rate does not depend on `steps`


def test_two_processes_and_shards_go_on_where_one_was_and_back(tmp_path):
    fit(tmp_path / "one", steps=24, warmup=99)
    for name, fsdp in (("two", False), ("shards", True)):
        spawn_two(two, str(tmp_path / name), 12, fsdp)
        spawn_two(two, str(tmp_path / name), 15, fsdp, True)
        fit(tmp_path / name, steps=20, resume=True, warmup=99)           # on one process
        spawn_two(two, str(tmp_path / name), 24, fsdp, True)             # and back
        assert np.abs(np.subtract(losses(tmp_path / "one"), losses(tmp_path / name))).max() < 1e-4
        assert checkpoints(tmp_path / name)[-1].is_dir() == fsdp
        assert abs(json.loads((tmp_path / "one" / "export.json").read_text()) - json.loads((tmp_path / name / "export.json").read_text())) < 1e-4


def sft_flags(folder, name, **changes):
    """Most rows have no picture, so that a process's share of a step may have none; four rows a step."""
    rows = [{"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": str(i)}]} for i in range(20)]
    (folder / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return test_sft.config(folder / name, data=f"corpus:1,{folder / 'said.jsonl'}:2", steps=20, lr=1e-3, eval_every=20, save_every=20, **changes)


def sft_two(folder, fsdp):
    test_sft.patch(pytest.MonkeyPatch())
    train_sft.train(sft_flags(folder, "sft2", fsdp=fsdp))


def policy_two(made, out, fsdp):
    train_policy.train(test_train_policy.flags(made, out, steps=20, fsdp=fsdp, save_every=20, eval_every=20), PolicyConfig(**test_train_policy.SMALL))


@pytest.mark.parametrize("fsdp", [False, True])
def test_both_stages_lose_alike_on_one_process_and_on_two(tmp_path, made, monkeypatch, fsdp):
    """The same losses to 1e-5 for 20 steps, the same global batch."""
    test_sft.patch(monkeypatch)
    train_sft.train(sft_flags(tmp_path, "sft"))
    spawn_two(sft_two, tmp_path, fsdp)
    train_policy.train(test_train_policy.flags(made, tmp_path / "policy", steps=20, save_every=20, eval_every=20), PolicyConfig(**test_train_policy.SMALL))
    spawn_two(policy_two, made, tmp_path / "policy2", fsdp)
    for stage in ("sft", "policy"):
        one, other = losses(tmp_path / stage), losses(tmp_path / f"{stage}2")
        assert len(one) == len(other) == 20 and np.abs(np.subtract(one, other)).max() <= 2e-5 * max(1, max(one)), stage
        weights = "model.safetensors" if stage == "sft" else "policy.safetensors"
        mine, theirs = load_file(tmp_path / stage / weights), load_file(tmp_path / f"{stage}2" / weights)
        assert mine.keys() == theirs.keys()


def test_a_spike_is_skipped_and_named(tmp_path, capsys):
    fit(tmp_path / "skips", bad=((70, 1e6), (75, float("nan")), (80, float("inf"))))
    lines = [json.loads(line) for line in (tmp_path / "skips" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == [71, 76, 81] and lines[70]["skipped"] == "rows of 70"
    assert all(tensor.isfinite().all() for tensor in last_state(tmp_path / "skips").values()) and max(line["loss"] for line in lines[76:] if "skipped" not in line) < 20
    assert np.asarray(Image.open(tmp_path / "skips" / "loss.png")).std() > 5                # drawn without them
    with pytest.raises(UserError, match="step 71.*where .* is usual.*rows of 70.*smaller --lr"):
        fit(tmp_path / "stops", bad=((70, 1e6),), on_spike="stop")
    with pytest.raises(UserError, match="10th in a row"):
        fit(tmp_path / "never", bad=[(step, float("nan")) for step in range(90)])
    with pytest.raises(UserError, match="unknown --on_spike 'ignore'"):
        fit(tmp_path / "what", on_spike="ignore")


def test_a_full_disk_keeps_what_was_saved(tmp_path, monkeypatch):
    fit(tmp_path, steps=10)
    save, before = trainer.save_file, last_state(tmp_path)

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise trainer.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(trainer, "save_file", full)
    with pytest.raises(UserError, match="No space left.*what was there before is whole"):
        fit(tmp_path, steps=20, resume=True)
    monkeypatch.setattr(trainer, "save_file", save)
    after = last_state(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before) and not list((tmp_path / "state").glob(".*"))


def test_what_cannot_be_resumed_is_told(tmp_path):
    with pytest.raises(UserError, match="no training run to resume"):
        fit(tmp_path / "none", resume=True)
    fit(tmp_path / "run", steps=5)
    with pytest.raises(UserError, match="already holds a training run"):
        fit(tmp_path / "run", steps=5)
    with pytest.raises(UserError, match="trained with --lr 0.01, not 0.02"):
        fit(tmp_path / "run", steps=9, resume=True, lr=0.02)
    with pytest.raises(UserError, match="--fsdp shards over several processes"):
        fit(tmp_path / "shards", fsdp=True)
    checkpoints(tmp_path / "run")[-1].write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot resume.*delete it"):
        fit(tmp_path / "run", steps=9, resume=True)


def test_the_log_is_sent_where_asked_if_that_is_installed(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda: None, init=lambda **about: SimpleNamespace(log=lambda line, step: sent.append((step, line["loss"])))))
    fit(tmp_path / "sent", steps=3, tracker="wandb")
    assert [step for step, _ in sent] == [1, 2, 3]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        fit(tmp_path / "not", tracker="wandb")
    lines = [json.loads(line) for line in (tmp_path / "sent" / "log.jsonl").read_text().splitlines()]
    assert all({"step", "loss", "lr", "grad_norm", "rows_per_s", "utilisation", "memory_gb"} <= line.keys() for line in lines)


def test_recomputing_blocks_changes_no_gradient():
    model = test_sft.VLM(test_sft.TINY)
    ids, found = torch.arange(12).view(1, 12), []
    for again in (False, True):
        model.checkpointing = model.visual.checkpointing = again
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert found[0] and all(torch.equal(a, b) for a, b in zip(*found))


def test_muon_makes_singular_values_alike_and_steps_like_torchs():
    torch.manual_seed(0)
    for shape in ((48, 32), (32, 48), (16, 16)):
        matrix = torch.randn(shape) * torch.logspace(0, -1.5, shape[1])                    # singular values far apart
        values = torch.linalg.svdvals(orthogonal(matrix[None])[0])
        assert values.max() < 1.3 and values.median() > 0.6 and torch.linalg.svdvals(matrix / matrix.norm()).median() < 0.3
    weights = [nn.Parameter(torch.randn(24, 40)) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    before, settings = weights[0].detach().clone(), {"lr": 0.02, "weight_decay": 0.1}
    optimizers = Muon(weights[:1], **settings), torch.optim.Muon(weights[1:], adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(5):
        gradient = torch.randn(24, 40)
        for weight, optimizer in zip(weights, optimizers):
            weight.grad = gradient.clone()
            optimizer.step()
    ours, theirs = (weight.detach() - before for weight in weights)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()                                   # theirs is in bfloat16


def test_muon_moves_a_matrix_among_others_as_it_would_alone(monkeypatch):
    torch.manual_seed(0)
    shapes = [(12, 8), (8, 12), (12, 8), (8, 8), (12, 8)]
    start = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(3)]

    def moved(groups):
        weights = [nn.Parameter(weight.clone()) for weight in start]
        optimizers = [Muon([weights[i] for i in group], lr=0.1, weight_decay=0.1) for group in groups]
        for gradient in gradients:
            for i, weight in enumerate(weights):
                weight.grad = None if i == 2 and gradient is gradients[0] else gradient[i].clone()         # one has none at first
            for optimizer in optimizers:
                optimizer.step()
        return torch.cat([weight.detach().flatten() for weight in weights])
    alone, together = moved([[i] for i in range(5)]), moved([range(5)])
    monkeypatch.setattr(Muon, "TOGETHER", 2 * 96)                                          # two of three alike at a time
    assert (alone - torch.cat([weight.flatten() for weight in start])).norm() > 0.1
    assert torch.allclose(alone, together, atol=1e-6) and torch.allclose(alone, moved([range(5)]), atol=1e-6)


def test_every_parameter_has_one_optimizer_and_matrices_of_blocks_have_muon():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)]), "embed": nn.Embedding(5, 4), "frozen": nn.Linear(4, 4).requires_grad_(False)})
    twin = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
    muon, adamw = make_optimizers((model, twin), RunConfig(weight_decay=0.3))
    owned = [{id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]} for optimizer in (muon, adamw)]
    assert owned[0] == {id(module.layers[0].weight): 0.3 for module in (model, twin)}
    assert owned[1] == {id(model.embed.weight): 0.3, id(model.layers[0].bias): 0.0, id(twin.layers[0].bias): 0.0}
    assert len(make_optimizers((model.embed,), RunConfig())) == len(make_optimizers((twin.layers[0],), RunConfig())) == 1
