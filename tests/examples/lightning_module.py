"""A LightningModule with SWAP.

Start it with: torchrun --nproc-per-node 2 lightning_module.py
or with:       mpirun -n 2 python -m mpi4py lightning_module.py
"""

import os
from typing import Any

import lightning
import torch
from ddp_loop import connect
from plain_loop import Samples, build, load
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from swap_hpc import Team, average_weights_, evaluate, refresh_batchnorm_, weights_sha256


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = build()
        self.rate = 0.0  # set for each phase

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: Samples, number: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.rate, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        falls = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falls, "interval": "step"}}


def trainer(epochs: int, **how: Any) -> lightning.Trainer:
    """Return a trainer that writes nothing: in phase 2 all ranks would write the same files."""
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **how,
    )


def loader(samples: Samples, size: int) -> "DataLoader[Any]":
    return DataLoader(TensorDataset(*samples), size, shuffle=True, drop_last=True)


def share(samples: Samples, size: int, world: Team) -> list[Samples]:
    """Return this rank's share of batches that are the same on any number of ranks."""
    images, labels = samples
    whole = list(zip(images.split(size), labels.split(size), strict=True))
    return whole[world.rank :: world.size]


def main() -> nn.Module:
    world = connect()
    samples, test = load()
    torch.manual_seed(0)
    model = Digits()

    # Phase 1: Lightning's DDP strategy gives each rank a share of every epoch.
    on_this_node = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = world.size // on_this_node
    model.rate = 0.2
    together = trainer(10, strategy="ddp", devices=on_this_node, num_nodes=nodes)
    together.fit(model, loader(samples, 200 // world.size))

    # Phase 2: a trainer of one device knows of no other rank. The order of the samples is the
    # rank's own.
    torch.manual_seed(1 + world.rank)
    model.rate = 0.05
    alone = trainer(3, devices=1)
    alone.fit(model, loader(samples, 40))

    # Phase 3.
    average_weights_(model, world)
    refresh_batchnorm_(model, (images for images, _ in share(samples, 200, world)), world)
    found = evaluate(model, share(test, 100, world), world)
    if world.rank == 0:
        print(f"accuracy {found.accuracy:.4f}, weights_sha256 {weights_sha256(model)}")
    return model


if __name__ == "__main__":
    main()
