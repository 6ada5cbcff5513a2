"""Files are whole or not there."""

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


def test_a_model_reads_back_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    save_model(
        model,
        tmp_path / "deep" / "m.safetensors",
        {"recipe": tiny.recipe().to_toml()},
        Team.alone(),
    )
    load_weights_(other, tmp_path / "deep" / "m.safetensors")
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["m.safetensors"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})

    def half(path: Path) -> None:
        path.write_text('{"a"', encoding="utf-8")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"cannot write .*/x.json: No space left on device"):
        write_whole(tmp_path / "x.json", half)
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 1\n}\n' and len(
        list(tmp_path.iterdir())
    ) == 1


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_model(
        nn.Linear(3, 4),
        tmp_path / "m.safetensors",
        {"recipe": tiny.recipe().to_toml()},
        Team.alone(),
    )
    with pytest.raises(
        UserError, match=r"the weights .*m.safetensors do not fit this model: .*size mismatch"
    ):
        load_weights_(nn.Linear(3, 5), tmp_path / "m.safetensors")
    with pytest.raises(
        UserError, match=r"cannot read the weights .*gone.safetensors: No such file"
    ):
        load_weights_(nn.Linear(3, 4), tmp_path / "gone.safetensors")
    (tmp_path / "m.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(UserError, match="cannot read the weights"):
        load_weights_(nn.Linear(3, 4), tmp_path / "m.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_save_is_told_for_what_it_is(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "resnet.pth"
    torch.save(nn.Linear(3, 4).state_dict(), file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError,
        match=f"cannot read the weights {file}: a file of torch.save, whose loading can run code",
    ) as error:
        load_weights_(nn.Linear(3, 4), file)
    assert "\n" not in str(error.value)


def test_the_second_name_of_tied_weights_may_be_missing(tmp_path: Path) -> None:
    """As in what safetensors' own `save_model` writes; a name that is missing for another reason is refused."""
    model, other = tied(), tied()
    weight, loaded = (each.get_submodule("0").get_parameter("weight") for each in (model, other))
    save_tied(model, str(tmp_path / "tied.safetensors"))
    load_weights_(other, tmp_path / "tied.safetensors")
    assert torch.equal(weight, loaded) and loaded is other.get_submodule("1").get_parameter(
        "weight"
    )
    save_file({"0.weight": weight.detach()}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="do not fit this model: .*bias"):
        load_weights_(other, tmp_path / "part.safetensors")


def tied() -> nn.Sequential:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    return nn.Sequential(first, second)
