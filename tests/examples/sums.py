"""Text: a small transformer completes sums such as "3+8+4=15", character by character.

Start it with: mpirun -n 2 swap-hpc train sums.toml
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swap_hpc import Batches, Dataset
from swap_hpc.data import Picks

CHARACTERS = " 0123456789+=\n"  # the blank pads a text

Inputs = dict[str, Tensor]


def load(path: Path, test_every: int = 4) -> Dataset:
    """Return the sums of three digits; every `test_every`-th one tests.

    The model reads `inputs` and predicts `targets`, which are one character on.
    """
    numbers = np.random.default_rng(0).permutation(1000)
    texts = [f"{'+'.join(f'{each:03}')}={sum(map(int, f'{each:03}'))}\n" for each in numbers]

    def split(texts: list[str]) -> Batches:
        def batches(picks: Iterator[Picks], training: bool) -> Iterator[tuple[Inputs, Inputs]]:
            for pick in picks:
                yield padded([texts[sample] for sample in pick.indices])

        return Batches(len(texts), batches)

    tests = texts[::test_every]
    rest = [text for text in texts if text not in tests]
    return Dataset(split(rest), split(tests), classes=tuple(CHARACTERS))


def padded(texts: list[str]) -> tuple[Inputs, Inputs]:
    """Return a batch: characters (n, length) int64, and masks (n, length) bool.

    The mask of the inputs leaves out the padding; that of the targets, all but the answer.
    """
    numbers = [torch.tensor([CHARACTERS.index(each) for each in text]) for text in texts]
    tokens = nn.utils.rnn.pad_sequence(numbers, batch_first=True)
    inputs, following = tokens[:, :-1], tokens[:, 1:]
    mask = following != 0
    is_answer = (inputs == CHARACTERS.index("=")).cumsum(1) > 0
    return {"tokens": inputs, "mask": mask}, {"tokens": following, "mask": mask & is_answer}


class Transformer(nn.Module):
    """Takes the dictionary `inputs`; returns logits (n, length, characters)."""

    def __init__(self, classes: int, channels: int, width: int, layers: int):
        super().__init__()
        self.tokens = nn.Embedding(classes, width)
        self.places = nn.Embedding(len("9+9+9=27\n"), width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.05, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, classes)

    def forward(self, inputs: Inputs) -> Tensor:
        tokens = inputs["tokens"]
        length = tokens.shape[1]
        places = self.places(torch.arange(length, device=tokens.device))
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        hidden = self.layers(
            self.tokens(tokens) + places, mask=causal, src_key_padding_mask=~inputs["mask"]
        )
        return self.out(hidden)


def loss(outputs: Tensor, targets: Inputs) -> Tensor:
    """Return the mean cross-entropy of a text's characters, averaged over the texts.

    The mean over all characters of a batch would weigh a text by the others in its rank's share.
    """
    each = F.cross_entropy(outputs.transpose(1, 2), targets["tokens"], reduction="none")
    return _mean(each, targets["mask"]).mean()


def right(outputs: Tensor, targets: Inputs) -> Tensor:
    """Return the share of right characters of each text, (n,)."""
    return _mean((outputs.argmax(2) == targets["tokens"]).float(), targets["mask"])


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(1) / mask.sum(1)
