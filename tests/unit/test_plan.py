"""Predictions: what the cost model says, and what a calibration finds again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from swap_hpc.bench import plan
from swap_hpc.bench.plan import Costs, Work
from swap_hpc.errors import UserError
from swap_hpc.recipe.loading import load_recipe
from swap_hpc.recipe.schema import Checkpoint

RECIPE = tiny.recipe(
    groups=2,
    large_batch={"batch_size": 64, "epochs": 3, "learning_rate": 0.1},
    refine={"batch_size": 16, "epochs": 2, "learning_rate": 0.1},
)
WORK = Work(RECIPE, samples=640, parameters=1000)
COSTS = Costs(sample=0.01, step=0.1, latency=0.001, bandwidth=1e6, disk=1e6)


def test_one_rank_computes_and_sends_nothing() -> None:
    seconds = plan.predict(WORK, COSTS, 1)
    assert seconds["large_batch"] == pytest.approx(3 * (640 * 0.01 + 10 * 0.1))
    assert seconds["refine"] == pytest.approx(2 * 2 * (640 * 0.01 + 40 * 0.1))  # two groups in turn
    assert seconds["average"] == 0 and seconds["save"] == pytest.approx((3 + 2 * 2) * 8000 / 1e6)


def test_two_ranks_share_phase_1_and_refine_alone() -> None:
    seconds = plan.predict(WORK, COSTS, 2)
    allreduce = 2 * (0.001 + 2000 / 1e6)
    assert seconds["large_batch"] == pytest.approx(3 * (320 * 0.01 + 10 * (0.1 + allreduce)))
    assert seconds["refine"] == pytest.approx(2 * (640 * 0.01 + 40 * 0.1))
    assert seconds["average"] == pytest.approx(2 * (0.001 + 4000 / 1e6))
    assert seconds["batchnorm"] == pytest.approx(2 * 20 * 0.01 / 3)  # of four batches of 20


def test_the_average_is_that_of_peers_and_whole_batches_are_dealt_out() -> None:
    """Of eight ranks in two groups: two peers, and four batches, so that four ranks have none."""
    seconds = plan.predict(WORK, COSTS, 8)
    assert seconds["average"] == plan.predict(WORK, COSTS, 2)["average"]
    assert seconds["batchnorm"] == pytest.approx(20 * 0.01 / 3)


def test_saves_are_as_rare_as_short_epochs_make_them() -> None:
    checkpoint = Checkpoint(epochs=2, min_seconds=10)
    # every 2nd epoch of 7 s; of 3 s, where 2 epochs take 6 s, every 4th; of 0.1 s every 100th
    assert [checkpoint.saves(200, seconds) for seconds in (7.0, 3.0, 0.1, 0.0)] == [100, 50, 2, 100]
    assert (
        Checkpoint(epochs=0).saves(200, 1.0) == 0
        and Checkpoint(min_seconds=0).saves(200, 0.01) == 200
    )


def test_saves_are_as_rare_as_the_recipe_says() -> None:
    rare = RECIPE.model_copy(
        update={"checkpoint": RECIPE.checkpoint.model_copy(update={"epochs": 2})}
    )
    assert plan.predict(Work(rare, 640, 1000), COSTS, 2)["save"] == pytest.approx(
        (1 + 1 * 2) * 8000 / 1e6
    )


def test_ranks_beyond_the_cores_share_them() -> None:
    on_two = plan.predict(WORK, Costs(0.01, 0.1, cores=2), 2)
    on_four = plan.predict(WORK, Costs(0.01, 0.1, cores=2), 4)
    assert on_four["refine"] > on_two["refine"] > plan.predict(WORK, Costs(0.01, 0.1), 4)["refine"]


def test_many_ranks_add_up_in_a_tree() -> None:
    ring = 2 * 1023 * (0.001 + 8 / 1024 / 1e6)
    assert (
        COSTS.allreduce(8, 1024) == pytest.approx(20 * (0.001 + 8 / 1e6))
        and COSTS.allreduce(8, 1024) < ring
    )
    assert COSTS.allreduce(1e9, 4) == pytest.approx(6 * (0.001 + 250))


def test_bytes_per_image_make_the_case() -> None:
    assert plan.bytes_per_image(WORK, 2) == {"large_batch": 4000 / 64, "refine": 0}
    assert plan.bytes_per_image(WORK, 4)["refine"] == 4000 / 16


def case(
    ranks: int, width: int, samples: int, costs: Costs, parameters: int, slower: float
) -> dict[str, Any]:
    work = Work(RECIPE.model_copy(update={"groups": ranks}), samples, parameters)
    costs = replace(costs, sample=costs.sample * slower, growth=costs.growth * slower)
    seconds = {
        "large_batch": plan.epoch(work, costs, RECIPE.large_batch, ranks, ranks),
        "refine": plan.epoch(work, costs, RECIPE.refine, 1, ranks),
    }
    sizes = {"large_batch": 64, "refine": 16}
    phases = {name: {"seconds": value} for name, value in seconds.items()}
    return {
        "ranks": ranks,
        "width": width,
        "samples": samples,
        "parameters": parameters,
        "phases": phases,
        "batch_sizes": sizes,
    }


def test_a_calibration_finds_the_costs_that_made_the_measurements() -> None:
    made = [
        case(1, 8, 640, COSTS, 1000, 1),
        case(2, 8, 640, COSTS, 1000, 1),
        case(2, 16, 640, COSTS, 4000, 3.5),
        case(2, 8, 1280, COSTS, 1000, 1),
    ]
    found = plan.fitted(made, cores=2)
    for name in ("sample", "step", "latency", "bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(COSTS, name), rel=1e-6), name
    assert found.cores == 2


def test_steps_that_outgrow_the_caches_are_told_from_steps_that_cost_something() -> None:
    costs = replace(COSTS, step=0.0, growth=0.002, small=16, large=64)
    made = [
        case(1, 8, 640, costs, 1000, 1),
        case(2, 8, 640, costs, 1000, 1),
        case(2, 16, 640, costs, 4000, 3.5),
    ]
    found = plan.fitted(made, cores=2)
    for name in ("sample", "step", "growth", "latency", "bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(costs, name), rel=1e-6), name


SCALING = Path(__file__).parents[1] / "runs" / "scaling" / "scaling.json"


def test_calibrated_on_one_and_two_ranks_it_predicts_four_and_eight() -> None:
    """Against what `bench scaling` measured on two cores, each phase within a quarter."""
    costs, seen = plan.calibrated(SCALING), 0
    for measured in json.loads(SCALING.read_text())["cases"]:
        if measured["ranks"] > 2:
            sizes = [
                f"{phase}.batch_size={size}" for phase, size in measured["batch_sizes"].items()
            ]
            recipe = load_recipe("cifar10-cpu", (f"groups={measured['ranks']}", *sizes))
            work = Work(recipe, measured["samples"], measured["parameters"])
            for phase, section, team in (
                ("large_batch", recipe.large_batch, measured["ranks"]),
                ("refine", recipe.refine, 1),
            ):
                predicted = plan.epoch(work, costs, section, team, measured["ranks"])
                assert predicted == pytest.approx(measured["phases"][phase]["seconds"], rel=0.25), (
                    measured["ranks"],
                    phase,
                )
                seen += 1
    assert seen == 4


def test_what_was_measured_sends_nothing_in_phase_2_and_needs_no_more_memory_on_more_ranks() -> (
    None
):
    cases = json.loads(SCALING.read_text())["cases"]
    assert len(cases) == 8 and all(case["phases"]["refine"]["bytes"] == 0 for case in cases)
    alike = sorted(
        (case for case in cases if (case["width"], case["samples"]) == (8, 4096)),
        key=lambda case: case["ranks"],
    )
    memory = [case["peak_memory_mib"] for case in alike]
    assert [case["ranks"] for case in alike] == [1, 2, 4, 8] and memory == sorted(
        memory, reverse=True
    )


def test_the_table_names_what_limits_and_what_cannot_be() -> None:
    table = plan.table(WORK, COSTS, (2, 32))
    assert "| small batch (16)" in table and "phase 1: computing" in table
    assert "large_batch.batch_size = 16 does not divide by its 32 ranks |" in table


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("speed=3", "there are sample, step, growth, "),
        ("sample=fast", "write it as sample=0.001"),
        ("bandwidth=0", "write it as"),
        ("disk=inf", "write it as"),
    ],
)
def test_a_wrong_cost_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan._cost(override)
