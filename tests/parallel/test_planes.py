"""Planes, vectors and gradients against values that are computed by hand."""

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.study import planes


def test_a_plane_holds_its_three_points() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    plane = planes.Plane.through(a, b, c)
    for point in (a, b, c):
        torch.testing.assert_close(plane.at(*plane.place(point)), point)
    assert plane.place(a) == (0, 0) and abs(plane.place(b)[1]) < 1e-12
    distance = np.hypot(*np.subtract(plane.place(c), plane.place(b)))
    assert distance == pytest.approx(float((c - b).norm()))
    # the projection of a fourth point leaves nothing in the direction of the plane
    assert float((d - plane.at(*plane.place(d))) @ (b - a)) == pytest.approx(0, abs=1e-10)
    with pytest.raises(UserError, match="lie on one line"):
        planes.Plane.through(a, b, a + 0.3 * (b - a))


def test_a_gradient_is_without_dropout() -> None:
    job = tiny.job(model={"name": "tiny:normed"})
    model = tiny.model(job)
    one, other = (planes.gradient(model, job.test_batches(Team.alone()), job) for _ in range(2))
    assert torch.equal(one, other) and one.norm() > 0


def test_a_gradient_is_that_of_the_mean_loss_over_all_samples(world: Team) -> None:
    """37 samples in batches of 7: the mean over samples, not over batches."""
    job = tiny.job()
    model = tiny.model(job)
    before = planes.vector(model)
    found = planes.gradient(model, job.test_batches(Team.alone()), job)
    batches = zip(*job.test_batches(Team.alone()), strict=True)
    images, labels = (torch.cat(parts) for parts in batches)
    F.cross_entropy(model(images), labels).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    expected = torch.cat([each.flatten().double() for each in gradients])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    planes.fill_parameters_(model, before + 1)
    torch.testing.assert_close(planes.vector(model), before + 1, rtol=0, atol=1e-6)
