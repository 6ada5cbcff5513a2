"""Metrics on several ranks: what an independent computation on all outputs at once gives."""

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
import torch
from sklearn.metrics import balanced_accuracy_score, r2_score, recall_score, top_k_accuracy_score
from torch import Tensor

from swap_hpc.data.sampling import Key
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1
from swap_hpc.train.evaluation import evaluate
from swap_hpc.train.events import Epoch
from swap_hpc.train.fit import fit
from swap_hpc.train.metrics import Metric
from swap_hpc.train.objective import objective

CLASSES = 7  # of which the last one has no sample


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.max(1).values - outputs[:, 0]


def r2_of_the_page() -> Metric:
    page = (Path(__file__).parents[2] / "swap_hpc" / "data" / "README.md").read_text()
    found = re.search(r"`r2.py`:\n\n```python\n(.*?)```", page, re.DOTALL)
    assert found
    names: dict[str, Metric] = {}
    exec(found[1], names)
    return names["r2"]


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_metrics")
    module.margin, module.r2 = margin, r2_of_the_page()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_metrics", module)


class Identity(torch.nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.usefixtures("own")
def test_metrics_are_those_of_all_samples_at_once(world: Team) -> None:
    names = ["class_accuracy", "accuracy", "top5", "own_metrics:margin", "own_metrics:r2"]
    measured = objective(tiny.recipe(metrics=names), CLASSES)
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(61, CLASSES, generator=generator)
    labels = torch.randint(CLASSES - 1, (61,), generator=generator)
    labels[:20] = 0
    batches = [*zip(logits.split(9), labels.split(9), strict=True)]
    # dealt out unevenly; with 4 ranks the last one has no sample
    mine = [] if world.rank == 3 else batches[world.rank :: min(world.size, 3)]
    found = evaluate(Identity(), mine, world, measured)
    predicted, y = logits.argmax(1).numpy(), labels.numpy()
    every = np.arange(CLASSES)
    expected = {
        "class_accuracy": balanced_accuracy_score(y, predicted),
        "accuracy": float((predicted == y).mean()),
        "top5": top_k_accuracy_score(y, logits.numpy(), k=5, labels=every),
        "margin": margin(logits, labels).double().mean().item(),
        "r2": r2_score(y, logits[:, 0].numpy()),
    }
    assert [*found.metrics] == [*expected] and found.main == found.metrics["class_accuracy"]
    assert dict(found.metrics) == pytest.approx(expected, rel=1e-6)
    recalls = recall_score(y, predicted, labels=every[:-1], average=None, zero_division=0)
    assert found.by_class["class_accuracy"][:-1] == pytest.approx([*recalls])
    assert found.by_class["class_accuracy"][-1] is None


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.usefixtures("own")
def test_training_means_are_over_all_ranks_and_steps(world: Team) -> None:
    job = tiny.job(
        metrics=["accuracy", "class_accuracy", "own_metrics:margin"],
        large_batch={"epochs": 1, "learning_rate": 0.0},
        augment={"pad": 0, "flip": False, "cutout": 0},
    )
    model = tiny.model(job)
    events = [e for e in fit(model, job, PHASE_1, world) if isinstance(e, Epoch)]
    (epoch,) = events
    # the rate is 0: the running means are those of the model on the 96 samples trained on
    alone = job.training_batches(job.recipe.large_batch, Key.of(0, PHASE_1), Team.alone())
    expected = evaluate(model, [next(alone) for _ in range(4)], Team.alone(), job.objective)
    assert dict(epoch.train.metrics) == pytest.approx(dict(expected.metrics), rel=1e-5)
