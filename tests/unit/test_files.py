"""Files are whole or absent, and their weights are those that were saved."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from safetensors.torch import save_model as save_tied
from torch import nn

from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.atomic import write_json, write_whole
from swap_hpc.parallel.teams import Team
from swap_hpc.run.weights import load_weights_, save_model

HEADER = {"recipe": tiny.recipe().to_toml()}


def test_a_model_reads_back_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    file = tmp_path / "deep" / "m.safetensors"
    save_model(model, file, HEADER, Team.alone())
    load_weights_(other, file)
    saved, loaded = model.state_dict(), other.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in saved.items())
    assert [path.name for path in file.parent.iterdir()] == ["m.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})

    def half(path: Path) -> None:
        path.write_text('{"a"', encoding="utf-8")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"cannot write .*/x.json: No space left on device"):
        write_whole(file, half)
    assert file.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_model(nn.Linear(3, 4), file, HEADER, Team.alone())
    with pytest.raises(
        UserError, match=f"the weights {file} do not fit this model: weight is .4, 3. in"
    ):
        load_weights_(nn.Linear(3, 5), file)


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    with pytest.raises(UserError, match=f"cannot read the weights {file}: No such file"):
        load_weights_(nn.Linear(3, 4), file)
    file.write_bytes(b"no weights at all")
    with pytest.raises(UserError, match=f"cannot read the weights {file}: a text file, no"):
        load_weights_(nn.Linear(3, 4), file)


def test_the_second_name_of_tied_weights_may_be_missing(tmp_path: Path) -> None:
    """safetensors' own `save_model` leaves it out. Other missing names are refused."""
    model, other = tied(), tied()
    weight = model.get_parameter("0.weight")
    save_tied(model, str(tmp_path / "tied.safetensors"))
    load_weights_(other, tmp_path / "tied.safetensors")
    loaded = other.get_parameter("0.weight")
    assert torch.equal(weight, loaded) and loaded is other.get_parameter("1.weight")
    save_file({"0.weight": weight.detach()}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="do not fit this model: .*bias"):
        load_weights_(other, tmp_path / "part.safetensors")


def tied() -> nn.Sequential:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    return nn.Sequential(first, second)
