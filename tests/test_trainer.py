"""trainer.py keeps its promises: Muon, optimizers, the schedule, checkpoints, the log, refusals."""

import json
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

import trainer
from cli import UserError, command_line
from trainer import Log, Muon, RunConfig, learning_rate, make_optimizers, orthogonalize


def settings(out, **changes):
    return RunConfig(out=str(out), device="cpu", **changes)


def test_muon_makes_singular_values_alike():
    torch.manual_seed(0)
    for shape in ((48, 32), (32, 48), (16, 16)):
        matrix = torch.randn(shape) * torch.logspace(0, -1.5, shape[1])  # singular values far apart
        values = torch.linalg.svdvals(orthogonalize(matrix[None])[0])
        assert values.max() < 1.3 and values.median() > 0.6
        assert torch.linalg.svdvals(matrix / matrix.norm()).median() < 0.3


def test_muon_equals_torchs_over_five_steps():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(24, 40)) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    before = weights[0].detach().clone()
    ours = Muon(weights[:1], lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(
        weights[1:], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        gradient = torch.randn(24, 40)
        for weight, optimizer in zip(weights, (ours, theirs)):
            weight.grad = gradient.clone()
            optimizer.step()
    a, b = (weight.detach() - before for weight in weights)
    assert (a - b).norm() < 0.02 * b.norm()  # theirs is in bfloat16


def test_muon_moves_a_matrix_among_others_as_it_would_alone(monkeypatch):
    torch.manual_seed(0)
    shapes = [(12, 8), (8, 12), (12, 8), (8, 8), (12, 8)]
    start = [torch.randn(shape) for shape in shapes]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(3)]

    def move(groups):
        weights = [nn.Parameter(weight.clone()) for weight in start]
        optimizers = [
            Muon([weights[i] for i in group], lr=0.1, weight_decay=0.1) for group in groups
        ]
        for step, gradient in enumerate(gradients):
            for i, weight in enumerate(weights):
                first = i == 2 and step == 0  # one has no gradient at first
                weight.grad = None if first else gradient[i].clone()
            for optimizer in optimizers:
                optimizer.step()
        return torch.cat([weight.detach().flatten() for weight in weights])

    alone, together = move([[i] for i in range(5)]), move([range(5)])
    monkeypatch.setattr(trainer, "MUON_NUMBERS", 2 * 96)  # two of three alike at a time
    assert (alone - torch.cat([weight.flatten() for weight in start])).norm() > 0.1
    assert torch.allclose(alone, together, atol=1e-6)
    assert torch.allclose(alone, move([range(5)]), atol=1e-6)


def test_every_parameter_has_one_optimizer_and_matrices_of_blocks_have_muon():
    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList([nn.Linear(4, 4)]),
            "embed": nn.Embedding(5, 4),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
        }
    )
    twin = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)])})
    muon, adamw = make_optimizers((model, twin), 1e-3, 0.3)
    owned = []
    for optimizer in (muon, adamw):
        decay = {}
        for group in optimizer.param_groups:
            decay |= {id(p): group["weight_decay"] for p in group["params"]}
        owned.append(decay)
    assert owned[0] == {id(module.layers[0].weight): 0.3 for module in (model, twin)}
    plain = {id(module.layers[0].bias): 0.0 for module in (model, twin)}
    assert owned[1] == {id(model.embed.weight): 0.3, **plain}
    assert len(make_optimizers((model.embed,), 1e-3, 0.1)) == 1


def test_the_rate_warms_up_and_falls_to_a_tenth():
    cfg = settings("", steps=1000, lr=1.0)
    rates = [learning_rate(step, cfg, 100) for step in range(1000)]
    assert rates[0] == 0.01 and rates[99] == rates[100] == 1.0 and max(rates) == 1.0
    assert rates[100:] == sorted(rates[100:], reverse=True) and abs(rates[-1] - 0.1) < 1e-3


def test_batches_come_in_order_and_errors_arrive():
    assert list(trainer.prefetch(lambda step: step * step, range(3, 7))) == [9, 16, 25, 36]
    assert list(trainer.prefetch(lambda step: step, range(5, 5))) == []
    with pytest.raises(ZeroDivisionError):
        list(trainer.prefetch(lambda step: 1 // (2 - step), range(4)))


def two_tensors():
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3)])})
    optimizers = make_optimizers([model], 1e-2, 0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    trainer.step_optimizers(optimizers, 1e-2)
    return {"model": model}, optimizers


def record(cfg, step):
    return trainer.run_record(cfg, "test", {"step": step, "seconds": 1.0}, {})


def test_a_checkpoint_comes_back_whole_and_two_are_kept(tmp_path):
    cfg = settings(tmp_path, steps=9)
    modules, optimizers = two_tensors()
    for step in (3, 6, 9):
        trainer.save_checkpoint(cfg, modules, optimizers, record(cfg, step))
    names = [path.name for path in trainer.checkpoints(tmp_path)]
    assert names == ["00000006.safetensors", "00000009.safetensors"]
    fresh = {"model": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(3, 3)])})}
    again = make_optimizers(fresh.values(), 1e-2, 0.0)
    cfg.resume = True
    before = trainer.resume(cfg, (), fresh, again)
    assert before["step"] == 9
    one = trainer.state_tensors(modules, optimizers)
    two = trainer.state_tensors(fresh, again)
    assert one.keys() == two.keys() and any(name.startswith("optimizer") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_damaged_checkpoint_is_told(tmp_path):
    cfg = settings(tmp_path, steps=9, resume=True)
    modules, optimizers = two_tensors()
    trainer.save_checkpoint(cfg, modules, optimizers, record(cfg, 3))
    path = trainer.checkpoints(tmp_path)[-1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # one bit of one weight
    path.write_bytes(content)
    with pytest.raises(UserError, match="00000003.safetensors.*damaged.*delete it"):
        trainer.resume(cfg, (), modules, optimizers)
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match="00000003.safetensors.*delete it"):
        trainer.resume(cfg, (), modules, optimizers)


def test_a_full_disk_keeps_what_was_saved(tmp_path, monkeypatch):
    import safetensors.numpy

    cfg = settings(tmp_path, steps=9, resume=True)
    modules, optimizers = two_tensors()
    trainer.save_checkpoint(cfg, modules, optimizers, record(cfg, 3))

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(UserError, match="No space left.*unchanged"):
        trainer.save_checkpoint(cfg, modules, optimizers, record(cfg, 6))
    monkeypatch.undo()
    assert trainer.resume(cfg, (), modules, optimizers)["step"] == 3
    assert len(list((tmp_path / "state").iterdir())) == 1


def test_a_log_that_cannot_be_written_does_not_end_training(tmp_path, capsys):
    log = Log(tmp_path, 0)
    log.write({"step": 1, "loss": 0.5})
    log.path = tmp_path / "gone" / "log.jsonl"
    log.write({"step": 2, "loss": 0.4})
    log.write({"step": 3, "loss": 0.3})
    assert capsys.readouterr().out.count("cannot write") == 1


def test_a_resumed_log_is_cut_where_the_run_goes_on(tmp_path):
    lines = [json.dumps({"step": step}) for step in range(1, 6)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')
    Log(tmp_path, 3).write({"step": 4, "loss": 0.123456789})
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kept == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4, "loss": 0.123457}]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"steps": 0}, "--steps 0 must be at least 1"),
        ({"batch_size": -1}, "--batch_size -1"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"lr": float("inf")}, "--lr inf"),
        ({"seed": -3}, "--seed -3"),
        ({"dtype": "half"}, "half.*auto, float32, bfloat16"),
        ({"fsdp": True}, "torchrun"),
        ({"resume": True}, "no training run to resume"),
    ],
)
def test_wrong_flags_are_told(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        trainer.check(settings(tmp_path / "new", **changes))
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_a_model_or_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a model"):
        trainer.check(settings(tmp_path))
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "00000003.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="already holds a training run: add --resume"):
        trainer.check(settings(tmp_path))


def test_flags_that_may_not_change_are_named(tmp_path):
    cfg = settings(tmp_path, steps=9, lr=0.01)
    modules, optimizers = two_tensors()
    trainer.save_checkpoint(cfg, modules, optimizers, record(cfg, 3))
    changed = settings(tmp_path, steps=12, lr=0.02, resume=True)
    with pytest.raises(UserError, match="trained with --lr 0.01, not 0.02"):
        trainer.resume(changed, (), modules, optimizers)
    assert trainer.resume(changed, ("lr",), modules, optimizers)["step"] == 3


@pytest.mark.parametrize(
    ("first", "program"),
    [("eval.py", "eval.py"), ("/elsewhere/tool.py", "tool.py")]
    + [(str(ROOT / "eval.py"), "eval.py"), (str(ROOT / "nano" / "train.py"), "-m nano.train")],
)
def test_a_command_is_recorded_as_people_type_it(first, program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [first, "--out", "a b"])
    assert command_line() == f"python {program} --out 'a b'"
