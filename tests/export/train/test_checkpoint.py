"""Checkpoints: what is restored equals what was stored, bit for bit."""

import numpy as np
import pytest

from export.train.run import Checkpoint, read_checkpoint
from runtime.errors import BundleError, InputError, SdkError

torch = pytest.importorskip("torch", reason="heads are trained by torch: pip install torch")

from export.train.checkpoint import pack, restore, write_checkpoint  # noqa: E402

STATE = {
    "step": 3, "broken": {"caf\udce9.png": "it is broken"}, "losses": {"loss": 0.1 + 0.2},
    "seconds": 1.5, "log": {"count": 1, "sums": {"loss": 1e-300}}, "best": None,
}  # fmt: skip


def made(kind, dtype=torch.float32):
    """A module with a parameter, batch norm and a number as buffer; and its optimiser."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).to(dtype)
    groups = [{"params": module[0].parameters()}, {"params": module[1].parameters(), "lr": 0.5}]
    return module, kind(groups)


def update(module, optimiser, number):
    torch.manual_seed(number)
    optimiser.zero_grad()
    pictures = torch.randn(2, 3, 4, 4, dtype=module[0].weight.dtype)
    module(pictures).square().sum().backward()
    optimiser.step()


OPTIMISERS = {
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.1, betas=(0.7, 0.9)),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "plain SGD": lambda groups: torch.optim.SGD(groups, lr=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_training_continues_bit_for_bit(name, dtype, tmp_path):
    module, optimiser = made(OPTIMISERS[name], dtype)
    for number in range(3):
        update(module, optimiser, number)
    write_checkpoint(tmp_path, pack(module, optimiser, STATE))
    stored = read_checkpoint(tmp_path)
    assert stored.step == 3 and {k: stored.state[k] for k in STATE} == STATE
    again, other = made(OPTIMISERS[name], dtype)
    restore(stored, again, other, tmp_path)
    assert other.state_dict()["param_groups"] == optimiser.state_dict()["param_groups"]
    for number in range(3, 6):
        update(module, optimiser, number)
        update(again, other, number)
    ours, wanted = again.state_dict(), module.state_dict()
    assert ours["1.num_batches_tracked"].dtype == torch.int64
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)
    assert pack(module, optimiser, STATE) == pack(again, other, STATE)


def test_a_new_optimiser_has_no_state_yet(tmp_path):
    module, optimiser = made(OPTIMISERS["Adam"])
    write_checkpoint(tmp_path, pack(module, optimiser, STATE))
    restore(read_checkpoint(tmp_path), *made(OPTIMISERS["Adam"]), tmp_path)


def test_values_that_are_not_finite_are_not_stored():
    module, optimiser = made(OPTIMISERS["Adam"])
    update(module, optimiser, 0)
    optimiser.state[module[0].weight]["exp_avg"][0] = torch.inf
    with pytest.raises(SdkError, match=r"optimiser\.0\.exp_avg has NaN or infinite .* step 3"):
        pack(module, optimiser, STATE)
    module, optimiser = made(OPTIMISERS["Adam"])
    module[1].running_var[0] = torch.nan
    with pytest.raises(SdkError, match=r"module\.1\.running_var has NaN or infinite"):
        pack(module, optimiser, STATE)


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    module, optimiser = made(OPTIMISERS["Adam"])
    update(module, optimiser, 0)
    write_checkpoint(tmp_path, pack(module, optimiser, STATE))
    stored = read_checkpoint(tmp_path)

    def refused(match, tensors=None, kind="Adam", **optimiser):
        state = stored.state | {"optimiser": stored.state["optimiser"] | optimiser}
        broken = Checkpoint(stored.tensors | (tensors or {}), state)
        with pytest.raises(BundleError, match=f"does not fit the method: .*{match}"):
            restore(broken, *made(OPTIMISERS[kind]), tmp_path)

    groups = stored.state["optimiser"]["param_groups"]
    refused("Error.* in loading state_dict", {"module.more": np.zeros(1)})
    refused("has the shape", {"optimiser.0.exp_avg": np.zeros((4, 3, 2, 1), np.float32)})
    refused("index out of range", {"optimiser.9.exp_avg": np.zeros(1, np.float32)})
    refused("invalid literal", {"optimiser.x.exp_avg": np.zeros(1, np.float32)})
    refused("of another kind", kind="SGD")
    refused("of another kind", param_groups=[groups[0] | {"lr": "1"}, groups[1]])
    refused("zip", param_groups=groups[:1])
    refused("", param_groups=3)
    refused("", values=[])
    refused("", values={"0": 1})


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint\.safetensors cannot be written"):
        write_checkpoint(tmp_path / "no", b"")
