"""Text: a small transformer reads and completes sums such as "17+25=42", character by character.

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


def load(path: Path, samples: int = 1500) -> Dataset:
    """Return texts of sums; the model reads `inputs` and predicts `targets`, one character on."""
    pairs = np.random.default_rng(0).integers(0, 100, (samples + samples // 3, 2))
    texts = [f"{a}+{b}={a + b}\n" for a, b in pairs]

    def split(texts: list[str]) -> Batches:
        def batches(picks: Iterator[Picks], training: bool) -> Iterator[tuple[Inputs, Inputs]]:
            for pick in picks:
                yield padded([texts[sample] for sample in pick.indices])

        return Batches(len(texts), batches)

    return Dataset(split(texts[:samples]), split(texts[samples:]), classes=tuple(CHARACTERS))


def padded(texts: list[str]) -> tuple[Inputs, Inputs]:
    """Return a batch: characters (n, length) int64 and masks (n, length) bool, False at padding."""
    numbers = [torch.tensor([CHARACTERS.index(each) for each in text]) for text in texts]
    tokens = nn.utils.rnn.pad_sequence(numbers, batch_first=True)
    inputs, following = tokens[:, :-1], tokens[:, 1:]
    mask = following != 0
    return {"tokens": inputs, "mask": mask}, {"tokens": following, "mask": mask}


class Transformer(nn.Module):
    """Takes the dictionary `inputs`; returns logits (n, length, characters)."""

    def __init__(self, classes: int, channels: int, width: int, layers: int):
        super().__init__()
        self.tokens = nn.Embedding(classes, width)
        self.places = nn.Embedding(len("99+99=198\n"), width)
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
