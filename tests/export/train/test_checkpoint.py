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
    write_checkpoint(tmp_path, pack(module, optimiser, STATE | {"step": 0}))
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


@pytest.fixture
def stored(tmp_path):
    module, optimiser = made(OPTIMISERS["Adam"])
    for number in range(3):
        update(module, optimiser, number)
    write_checkpoint(tmp_path, pack(module, optimiser, STATE))
    return read_checkpoint(tmp_path)


def refused(stored, folder, match, *, tensors, kind="Adam", **changes):
    """The checkpoint with these tensors and other fields of the optimiser is refused, and the
    module and the optimiser are as they were."""
    state = stored.state | {"optimiser": stored.state["optimiser"] | changes}
    module, optimiser = made(OPTIMISERS[kind])
    before = pack(module, optimiser, STATE)
    with pytest.raises(BundleError, match=f"does not fit the method: .*{match}"):
        restore(Checkpoint(tensors, state), module, optimiser, folder)
    assert pack(module, optimiser, STATE) == before, match


def test_other_tensors_are_refused(stored, tmp_path):
    """Missing ones, unknown ones, and ones of another shape, type or sign."""
    own = stored.tensors
    moments = {key: array for key, array in own.items() if key.startswith("optimiser.")}
    for left in [
        own.keys() - moments.keys(),
        own.keys() - {"optimiser.0.exp_avg"},
        own.keys() - {k for k in moments if k.startswith("optimiser.3.")},
        own.keys() - {"module.0.bias"},
    ]:
        refused(stored, tmp_path, "missing or unknown", tensors={k: own[k] for k in left})
    names = ("module.more", "optimiser.-1.exp_avg", "optimiser.9.exp_avg", "optimiser.x.exp_avg")
    for name in (*names, "optimiser.0.more", "optimiser.0", "optimiser.", "optimiser.00.step"):
        more = own | {name: np.zeros((), np.float32)}
        refused(stored, tmp_path, "missing or unknown", tensors=more)
    for key, array, match in [
        ("optimiser.0.exp_avg", np.zeros((4, 3, 2, 1), np.float32), "has the shape"),
        ("optimiser.0.exp_avg", np.zeros((), np.float32), "has the shape"),
        ("optimiser.0.exp_avg", own["optimiser.0.exp_avg"].astype(np.float64), "type float64"),
        ("optimiser.0.exp_avg", own["optimiser.0.exp_avg"].astype(np.int64), "type int64"),
        ("optimiser.0.step", np.full(1, 3, np.float32), "has the shape"),
        ("optimiser.0.step", np.float32(-1), "is -1.0; wanted the step 3"),
        ("optimiser.0.exp_avg_sq", -own["optimiser.0.exp_avg_sq"], "has negative values"),
        ("module.1.running_var", -own["module.1.running_var"], "has negative values"),
        ("module.0.bias", own["module.0.bias"].astype(np.float64), "type float64"),
        ("module.0.bias", np.zeros(3, np.float32), "has the shape"),
    ]:
        refused(stored, tmp_path, match, tensors=own | {key: np.asarray(array)})


def test_other_settings_of_the_optimiser_are_refused(stored, tmp_path):
    own = stored.tensors
    refused(stored, tmp_path, "missing or unknown", tensors=own, kind="SGD")
    groups = stored.state["optimiser"]["param_groups"]
    for change in [
        {"lr": 5}, {"lr": "0.1"}, {"betas": [1, 1]}, {"betas": []}, {"amsgrad": True},
        {"amsgrad": 0}, {"capturable": True}, {"params": [1, 0]}, {"params": []}, {"more": 1},
    ]:  # fmt: skip
        changed = [groups[0] | change, groups[1]]
        refused(stored, tmp_path, "settings of the", tensors=own, param_groups=changed)
    for other in (groups[:1], [], 3, None):
        refused(stored, tmp_path, "settings of the", tensors=own, param_groups=other)
    for values in ([], {"0": 1}, {"0": {"exp_avg": 1}}, {"-1": {}}):
        refused(stored, tmp_path, "settings of the", tensors=own, values=values)
    refused(stored, tmp_path, "settings of the", tensors=own, more=1)


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint\.safetensors cannot be written"):
        write_checkpoint(tmp_path / "no", b"")
