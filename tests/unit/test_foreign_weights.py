"""Weights in files of other programs: what is taken from them, and why a file is refused."""

import argparse
import collections
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from swap_hpc.errors import UserError
from swap_hpc.run.fitting import common_prefix, load_foreign_
from swap_hpc.run.state_dicts import read_state_dict
from swap_hpc.run.weights import read_header

SAVED = Path("executed")  # what a file would write whose code is run


class Net(nn.Module):
    """A model with parameters, buffers, integers and a head."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, classes)


class Malicious:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(SAVED)!r}, 'w')",)


class Calling:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {SAVED}",)


def net(seed: int = 0, classes: int = 10) -> Net:
    torch.manual_seed(seed)
    return Net(classes)


STATE = net(1).state_dict()
HEAD = ("head.weight", "head.bias")


def renamed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in STATE.items()}


def loaded(path: Path, *except_for: str, entry: str | None = None) -> tuple[Net, list[str]]:
    """Return a model that was given the weights in a file, and what a person reads."""
    model = net(2)
    file = read_state_dict(path, entry)
    return model, [*file.notes, *load_foreign_(model, file.tensors, str(path), except_for)]


def differing(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    return [name for name, t in model.state_dict().items() if not torch.equal(t, state[name])]


PLACES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "a state dict alone": (lambda: STATE, []),
    "of the trainer": (
        lambda: {"epoch": 3, "model": STATE, "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
        ["the weights in its entry model"],
    ),
    "beside its average": (
        lambda: {"state_dict_ema": net(3).state_dict(), "state_dict": STATE},
        [
            "the weights in its entry state_dict "
            "(it also has state_dict_ema: --set model.weights_entry=state_dict_ema)"
        ],
    ),
    "beside arguments and NumPy's numbers": (
        lambda: {
            "state_dict": STATE,
            "args": argparse.Namespace(lr=0.1),
            "best": np.float64(0.5),
            "log": collections.defaultdict(list, {"loss": [1.0]}),
        },
        [
            "left out, since nothing in a file is run: argparse.Namespace, builtins.list, "
            "collections.defaultdict, numpy._core.multiarray.scalar, numpy.dtype",
            "the weights in its entry state_dict",
        ],
    ),
    "beside an object that runs code": (
        lambda: {"state_dict": STATE, "callback": Malicious()},
        [
            "left out, since nothing in a file is run: builtins.exec",
            "the weights in its entry state_dict",
        ],
    ),
    "two levels down, beside an optimizer by names": (
        lambda: {
            "state": {
                "optimizers": {"Adam": {"state": {"head.weight": {"step": torch.ones(())}}}},
                "model": STATE,
            }
        },
        ["the weights in its entry state.model"],
    ),
    "under a name of its own": (
        lambda: {"encoder_q": STATE, "epoch": 3},
        ["the weights in its entry encoder_q"],
    ),
    "of DistributedDataParallel": (
        lambda: {"model": nn.DataParallel(_with(STATE)).state_dict()},
        ["the weights in its entry model", "the prefix module. removed from names"],
    ),
    "of Lightning": (
        lambda: {"state_dict": renamed("model."), "pytorch-lightning_version": "2.6"},
        ["the weights in its entry state_dict", "the prefix model. removed from names"],
    ),
    "of torch.compile": (
        lambda: renamed("_orig_mod."),
        ["_orig_mod. removed from names"],
    ),
    "of a compiled part in a wrapped model": (
        lambda: {
            f"module.{name.replace('stem.', 'stem._orig_mod.')}": t for name, t in STATE.items()
        },
        ["_orig_mod. removed from names", "the prefix module. removed from names"],
    ),
    "of torch's averaged model": (
        lambda: AveragedModel(_with(STATE)).state_dict(),
        ["the prefix module. removed from names", "the counter n_averaged left out"],
    ),
}


def _with(state: dict[str, Tensor]) -> Net:
    model = net()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("place", PLACES)
def test_weights_are_found_where_programs_keep_them(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, notes = PLACES[place]
    torch.save(content(), "weights.pth")
    model, told = loaded(Path("weights.pth"))
    assert differing(model, STATE) == []
    assert told == [f"weights.pth: {note}" for note in notes]
    assert not SAVED.exists()


@pytest.mark.parametrize("name", ["weights", "weights.pt", "weights.safetensors", "weights.bin"])
@pytest.mark.parametrize("kind", ["safetensors", "torch.save", "torch.save before 1.6"])
def test_the_content_of_a_file_tells_what_it_is(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "torch.save")
    model, told = loaded(path)
    assert differing(model, STATE) == [] and told == []


@pytest.mark.parametrize(
    "words",
    [
        {"checkpoint": "epoch 3"},
        {"count": "3"},
        {"data": "digits"},
        {"recipe": "a cake", "state": "baked", "checkpoint": "3"},
        {"sha256": "ab", "checkpoint": "3"},
    ],
    ids=" ".join,
)
def test_words_of_ours_in_the_metadata_of_another_program_mean_nothing(
    words: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(STATE, path, metadata={"format": "pt", **words})
    model, told = loaded(path)
    assert differing(model, STATE) == [] and told == []
    assert read_state_dict(path).header == read_header(path) == {}


@pytest.mark.parametrize("has_sums", [True, False])
def test_a_changed_byte_is_found_where_the_writer_left_checksums(
    has_sums: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pt"
    monkeypatch.setattr(torch.utils.serialization.config.save, "compute_crc32", has_sums)
    torch.save(STATE, path)
    assert differing(loaded(path)[0], STATE) == []
    content = bytearray(path.read_bytes())
    content[content.index(STATE["head.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    if has_sums:
        with pytest.raises(
            UserError, match=r"damaged: the checksum of its entry weights/data/\d+ d"
        ):
            loaded(path)
    else:
        assert differing(loaded(path)[0], STATE) == ["head.weight"]


def test_an_entry_may_be_asked_for(tmp_path: Path) -> None:
    path, average = tmp_path / "weights.pth", net(3).state_dict()
    torch.save({"state_dict": STATE, "state_dict_ema": average}, path)
    model, told = loaded(path, entry="state_dict_ema")
    assert differing(model, average) == []
    assert told == [f"{path}: the weights in its entry state_dict_ema"]
    with pytest.raises(UserError, match="no state dict in its entry ema: it has state_dict, state"):
        loaded(path, entry="ema")
    save_file(STATE, path)
    with pytest.raises(UserError, match="a .safetensors file has no entries: leave out .* ema"):
        loaded(path, entry="ema")


def test_extra_states_are_loaded(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        extra: Any = None

        def get_extra_state(self) -> Any:
            return self.extra

        def set_extra_state(self, state: Any) -> None:
            self.extra = state

    given, model = Counting(2, 2), Counting(2, 2)
    given.extra = {"seen": 3, "at": torch.ones(2)}
    torch.save({"model": given.state_dict()}, tmp_path / "weights.pth")
    load_foreign_(model, read_state_dict(tmp_path / "weights.pth").tensors, "x")
    assert model.extra["seen"] == 3 and torch.equal(model.extra["at"], torch.ones(2))


def test_a_head_of_another_size_is_named_and_can_be_left_as_initialised(tmp_path: Path) -> None:
    path, fresh = tmp_path / "weights.pth", net(2).state_dict()
    torch.save(net(1, classes=1000).state_dict(), path)
    with pytest.raises(UserError) as error:
        loaded(path)
    assert str(error.value) == (
        f"the weights {path} do not fit this model: head.weight is (1000, 4) in them and (10, 4) "
        "in the model; head.bias is (1000,) in them and (10,) in the model; "
        "--set 'model.weights_except=[\"head.*\"]' leaves that out: "
        "the model's own stay as initialised"
    )
    model, told = loaded(path, "head.*")
    assert told == [f"{path}: head.weight, head.bias not loaded, left as initialised"]
    assert differing(model, STATE | fresh) != []
    assert differing(model, STATE | {name: fresh[name] for name in HEAD}) == []


def test_names_that_only_the_file_has_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(renamed("model.") | {"loss.weight": torch.ones(3)}, path)
    with pytest.raises(UserError, match=r"1 name unknown to the model: loss.weight; --set .*loss"):
        loaded(path)
    model, told = loaded(path, "loss.*")
    assert differing(model, STATE) == []
    assert told[1] == f"{path}: loss.weight not used"


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"'fc.\*' matches no name, .* stem.0.weight, .* more$"):
        loaded(tmp_path / "weights.pth", "head.*", "fc.*")


def test_another_models_weights_are_told_in_whole_names(tmp_path: Path) -> None:
    torch.save(nn.Sequential(*(nn.Linear(2, 2) for _ in range(200))).state_dict(), tmp_path / "x")
    with pytest.raises(UserError) as error:
        loaded(tmp_path / "x")
    assert str(error.value).endswith(
        "8 names of the model missing in them: stem.0.weight, stem.0.bias, stem.1.weight "
        "and 5 more; 400 names unknown to the model: 0.weight, 0.bias, 1.weight and 397 more"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_point_types_are_converted_and_told(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in STATE.items()}
    torch.save(cast, tmp_path / "x")
    model, told = loaded(tmp_path / "x")
    assert {t.dtype for t in model.parameters()} == {torch.float32}
    assert differing(model, {name: t.to(STATE[name].dtype) for name, t in cast.items()}) == []
    name = str(dtype).removeprefix("torch.")
    assert told == [f"{tmp_path}/x: 8 tensors of type {name} converted to the model's float32"]


def test_integers_are_no_weights(tmp_path: Path) -> None:
    torch.save(STATE | {"head.bias": torch.ones(10, dtype=torch.int8)}, tmp_path / "x")
    with pytest.raises(UserError, match="head.bias of .* is int8, where the model has float32"):
        loaded(tmp_path / "x")


def test_files_of_old_torch_without_batch_counters_are_loaded(tmp_path: Path) -> None:
    counter = "stem.1.num_batches_tracked"
    torch.save({name: t for name, t in STATE.items() if name != counter}, tmp_path / "x")
    assert differing(loaded(tmp_path / "x")[0], STATE) == []


def _whole(path: Path, **how: Any) -> None:
    torch.save(net(), path, **how)


def _truncated(path: Path, share: float, **how: Any) -> None:
    torch.save(STATE, path, **how)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


OLD = {"_use_new_zipfile_serialization": False}
MODULE = r"torch.save\(torch.load\(FILE, weights_only=False\).state_dict\(\), NEW\)$"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing there": (lambda path: None, "No such file$"),
    "a folder": (lambda path: path.mkdir(), "a folder: name a .safetensors file in it$"),
    "empty": (lambda path: path.touch(), "an empty file$"),
    "text": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n"),
        "a text file, no weights: it begins with 'version https://git-lfs.github.com/spec/v1'$",
    ),
    "other bytes": (lambda path: path.write_bytes(bytes(90)), "no file of weights, neither .saf"),
    "zip of another program": (
        lambda path: np.savez(path.open("wb"), a=np.ones(2)),
        "a zip archive, but not one of torch.save$",
    ),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps({"a": 1})),
        "a pickle, but not one of torch.save: reading it would run code$",
    ),
    "another protocol": (
        lambda path: torch.save(STATE, path, pickle_protocol=4),
        "its pickle is of a protocol that torch reads by running code: leave it the default$",
    ),
    "half a file": (lambda path: _truncated(path, 0.5), "truncated or damaged: a zip archive"),
    "half an old file": (lambda path: _truncated(path, 0.9, **OLD), "truncated or damaged: "),
    "half a .safetensors file": (
        lambda path: path.write_bytes(save(STATE)[:-100]),
        "truncated or damaged: ",
    ),
    "program": (
        lambda path: torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(path)),
        "a TorchScript archive, which is a program: write the state dict of the module alone",
    ),
    "whole module": (_whole, rf"it holds an object of the class test_\w+.Net, .*{MODULE}"),
    "whole module in an entry": (
        lambda path: torch.save({"model": net()}, path),
        rf"its entry model is an object of the class test_\w+.Net: .*{MODULE}",
    ),
    "whole module of old torch": (
        lambda path: _whole(path, **OLD),
        r"it needs test_\w+.Net, which is not run: if you trust the file, write",
    ),
    "a call of the system": (
        lambda path: torch.save({"state_dict": STATE, "x": Calling()}, path),
        "it calls posix.system, as no file of weights does: do not load it at all$",
    ),
    "arrays": (
        lambda path: torch.save({"w": np.ones(2)}, path),
        r"it holds no dictionary of tensors alone: it has w \(numpy._core.multiarray._reconstruct",
    ),
    "no tensors": (
        lambda path: torch.save({"epoch": 3, "lr": 0.1}, path),
        r"it holds no dictionary of tensors alone: it has epoch \(int\), lr \(float\)$",
    ),
    "tensors by number": (
        lambda path: torch.save({0: torch.ones(2), 1: torch.ones(2)}, path),
        "its dictionary names tensors by something else than texts: 0, 1$",
    ),
    "one tensor": (lambda path: torch.save(torch.ones(2), path), "it holds a Tensor, not a state"),
    "nothing in it": (lambda path: torch.save({}, path), "it holds an empty dictionary"),
    "several": (
        lambda path: torch.save({"generator": STATE, "critic": STATE}, path),
        "several state dicts, generator, critic: choose one, --set model.weights_entry=generator$",
    ),
    "sparse": (
        lambda path: torch.save({"w": torch.eye(2).to_sparse()}, path),
        "its w is of layout sparse_coo: dense tensors are needed$",
    ),
    "meta": (
        lambda path: torch.save({"w": torch.ones(2, device="meta")}, path),
        "its w is on the meta device, which holds no values$",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_holds_no_weights_is_refused_in_one_line(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = REFUSED[kind]
    make(tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message) as error:
        read_state_dict(Path("weights.pth"))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("cannot read the weights weights.pth: ")
    assert not SAVED.exists()


def test_no_prefix_is_removed_that_does_not_help() -> None:
    assert common_prefix(["a.b", "a.c", "d"], ["a.b", "a.c", "d"]) == ""
    assert common_prefix(["x.a", "y.a"], ["b"]) == ""
    assert common_prefix(["net.model.a", "net.model.b", "loss"], ["a", "b", "c"]) == "net.model."
    assert common_prefix(["a", "model.a"], ["a"]) == ""
