"""The checkpoint that trainings of heads and of language models share."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from knnlm_hf.errors import KNNLMError
from knnlm_hf.memory.checkpoint import Checkpoint, remove_checkpoint

IDENTITY = {"recipe": {"lr": 0.1, "seed": 3}, "tokens": ["a" * 64, "b" * 64], "teacher": None}


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def optimizer_of(net, fused=False):
    """In two groups, in another order than the module's: biases first."""
    biases = [p for p in net.parameters() if p.dim() == 1]
    others = [p for p in net.parameters() if p.dim() > 1]
    groups = [{"params": biases, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.5}]
    return torch.optim.AdamW(groups, lr=0.1, fused=fused)


def steps(net, optimizer, numbers):
    for number in numbers:
        torch.manual_seed(number)
        net(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def checkpoint_of(folder, net, optimizer, identity=IDENTITY):
    return Checkpoint(folder, identity, dict(net.named_parameters()), optimizer)


def test_what_is_written(tmp_path):
    net = model()
    optimizer = optimizer_of(net)
    steps(net, optimizer, [0])
    best = {"0.bias": torch.arange(4.0)}
    checkpoint_of(tmp_path / "c", net, optimizer).save(7, {"loss": 2.5, "never": math.nan}, best)
    assert {file.name for file in (tmp_path / "c").iterdir()} == {"state.json", "7.safetensors"}
    state = json.loads((tmp_path / "c" / "state.json").read_text())
    assert (state["identity"], state["tensors"]) == (IDENTITY, "7.safetensors")
    tensors = load_file(tmp_path / "c" / "7.safetensors")
    assert torch.equal(tensors["best.0.bias"], best["0.bias"])
    assert torch.equal(tensors["now.1.weight"], net[1].weight)
    of_bias = {name for name in tensors if name.startswith("optimizer.0.bias.")}
    assert of_bias == {f"optimizer.0.bias.{key}" for key in ("step", "exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("fused", [False, True])
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path, fused):
    whole, first, second = model(), model(), model(1)
    steps(whole, optimizer_of(whole, fused), range(6))
    optimizer = optimizer_of(first, fused)
    steps(first, optimizer, range(3))
    best = {name: p.detach() * 2 for name, p in first.named_parameters()}
    checkpoint_of(tmp_path, first, optimizer).save(3, {"step": 3, "best": math.inf}, best)
    optimizer = optimizer_of(second, fused)
    progress, found = checkpoint_of(tmp_path, second, optimizer).load()
    assert progress == {"step": 3, "best": math.inf}
    assert found.keys() == best.keys()
    assert all(torch.equal(found[name], best[name]) for name in best)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.5]
    steps(second, optimizer, range(3, 6))
    assert all(map(torch.equal, second.parameters(), whole.parameters()))


def test_before_the_first_step_there_is_no_optimizer_state(tmp_path):
    net, other = model(), model(1)
    checkpoint_of(tmp_path, net, optimizer_of(net)).save(0, {}, {})
    optimizer = optimizer_of(other)
    assert checkpoint_of(tmp_path, other, optimizer).load() == ({}, {})
    assert torch.equal(other[0].weight, net[0].weight)
    steps(other, optimizer, [0])


def test_files_of_others_stay(tmp_path):
    """A folder that was given by mistake loses nothing."""
    net = model()
    (tmp_path / "model.safetensors").write_text("mine")
    checkpoint = checkpoint_of(tmp_path, net, optimizer_of(net))
    assert checkpoint.load() is None
    for step in (1, 2):
        checkpoint.save(step, {}, {})
        names = {"model.safetensors", "state.json", f"{step}.safetensors"}
        assert {file.name for file in tmp_path.iterdir()} == names
    remove_checkpoint(tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "mine"
    (tmp_path / "model.safetensors").unlink()
    remove_checkpoint(tmp_path)
    assert not tmp_path.exists()
    remove_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recipe": {"lr": 0.2, "seed": 3}}, "recipe lr is 0.1, expected 0.2"),
        ({"recipe": {"lr": 0.1, "seed": 3, "new": 1}}, "recipe new is None, expected 1"),
        ({"teacher": {"k": 3}}, "teacher is None, expected {'k': 3}"),
        ({"tokens": ["c" * 64]}, "tokens is ['aaaa"),
    ],
)
def test_another_training(tmp_path, change, said):
    net = model()
    checkpoint_of(tmp_path, net, optimizer_of(net)).save(1, {}, {})
    other = model(1)
    before = other[0].weight.clone()
    with pytest.raises(KNNLMError) as caught:
        checkpoint_of(tmp_path, other, optimizer_of(other), IDENTITY | change).load()
    assert f"another training: its {said}" in str(caught.value)
    assert "remove it to start anew" in str(caught.value)
    assert len(str(caught.value)) < 400
    assert torch.equal(other[0].weight, before)


@pytest.mark.parametrize("damage", ["no tensors", "cut", "no json", "changed", "a list"])
def test_damage(tmp_path, damage):
    net = model()
    checkpoint_of(tmp_path, net, optimizer_of(net)).save(1, {"step": 1}, {})
    tensors, state = tmp_path / "1.safetensors", tmp_path / "state.json"
    if damage == "no tensors":
        tensors.unlink()
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-4])
    elif damage == "no json":
        state.write_text("{")
    elif damage == "changed":
        state.write_text(state.read_text().replace('"step": 1', '"step": 2'))
    else:
        state.write_text("[]")
    with pytest.raises(KNNLMError, match=r"checkpoint is damaged .*remove it to start anew"):
        checkpoint_of(tmp_path, net, optimizer_of(net)).load()
