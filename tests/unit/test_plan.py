"""Predictions: the cost model, and the costs that a calibration finds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from swap_hpc.bench import plan, worth
from swap_hpc.bench.calibration import fit_costs, parse_cost, read_calibration
from swap_hpc.bench.cost_model import (
    Costs,
    Work,
    baselines,
    bytes_per_image,
    epoch_seconds,
    predict,
)
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
    seconds = predict(WORK, COSTS, 1)
    assert seconds["large_batch"] == pytest.approx(3 * (640 * 0.01 + 10 * 0.1))
    assert seconds["refine"] == pytest.approx(2 * 2 * (640 * 0.01 + 40 * 0.1))  # two groups in turn
    assert seconds["average"] == 0
    assert seconds["save"] == pytest.approx((3 + 2 * 2) * 8000 / 1e6)


def test_two_ranks_share_phase_1_and_refine_alone() -> None:
    seconds = predict(WORK, COSTS, 2)
    allreduce = 2 * (0.001 + 2000 / 1e6)
    assert seconds["large_batch"] == pytest.approx(3 * (320 * 0.01 + 10 * (0.1 + allreduce)))
    assert seconds["refine"] == pytest.approx(2 * (640 * 0.01 + 40 * 0.1))
    assert seconds["average"] == pytest.approx(2 * (0.001 + 4000 / 1e6))
    assert seconds["batchnorm"] == pytest.approx(2 * 20 * 0.01 / 3)  # two of the four batches of 20


def test_groups_that_continue_from_their_average_pay_for_each() -> None:
    refine = RECIPE.refine.model_copy(update={"average_every_steps": 16})
    post_local = replace(WORK, recipe=RECIPE.model_copy(update={"refine": refine}))
    seconds, plain = predict(post_local, COSTS, 2), predict(WORK, COSTS, 2)
    on_the_way = 4  # after 16, 32, 48 and 64 of the 80 steps; the one at the end has a phase
    assert seconds["refine"] == pytest.approx(plain["refine"] + on_the_way * plain["average"])


def test_peers_average_and_whole_batches_are_dealt_out() -> None:
    """Eight ranks in two groups: two peers average; with four batches, four ranks have none."""
    seconds = predict(WORK, COSTS, 8)
    assert seconds["average"] == predict(WORK, COSTS, 2)["average"]
    assert seconds["batchnorm"] == pytest.approx(20 * 0.01 / 3)


@pytest.mark.parametrize(
    ("seconds", "saves"),
    [
        (7.0, 100),  # every 2nd epoch
        (3.0, 50),  # two epochs take 6 s: every 4th
        (0.1, 2),  # every 100th
        (0.0, 100),
    ],
)
def test_short_epochs_make_saves_rare(seconds: float, saves: int) -> None:
    assert Checkpoint(epochs=2, min_seconds=10).saves(200, seconds) == saves


def test_saves_can_be_off_or_at_every_epoch() -> None:
    assert Checkpoint(epochs=0).saves(200, 1.0) == 0
    assert Checkpoint(min_seconds=0).saves(200, 0.01) == 200


def test_saves_are_as_rare_as_the_recipe_asks() -> None:
    every_second = RECIPE.checkpoint.model_copy(update={"epochs": 2})
    recipe = RECIPE.model_copy(update={"checkpoint": every_second})
    seconds = predict(Work(recipe, 640, 1000), COSTS, 2)
    assert seconds["save"] == pytest.approx((1 + 1 * 2) * 8000 / 1e6)


def test_ranks_beyond_the_cores_share_them() -> None:
    on_two = predict(WORK, Costs(0.01, 0.1, cores=2), 2)
    on_four = predict(WORK, Costs(0.01, 0.1, cores=2), 4)
    assert on_four["refine"] > on_two["refine"] > predict(WORK, Costs(0.01, 0.1), 4)["refine"]


def test_an_allreduce_of_many_ranks_is_a_tree() -> None:
    ring = 2 * 1023 * (0.001 + 8 / 1024 / 1e6)
    tree = 20 * (0.001 + 8 / 1e6)
    assert COSTS.allreduce(8, 1024) == pytest.approx(tree) and tree < ring


def test_an_allreduce_of_many_bytes_is_a_ring() -> None:
    assert COSTS.allreduce(1e9, 4) == pytest.approx(6 * (0.001 + 250))


def test_phase_2_sends_only_inside_groups() -> None:
    assert bytes_per_image(WORK, 2) == {"large_batch": 4000 / 64, "refine": 0}
    assert bytes_per_image(WORK, 4)["refine"] == 4000 / 16


def case(
    ranks: int, width: int, samples: int, costs: Costs, parameters: int, slower: float
) -> dict[str, Any]:
    """Return what `bench scaling` would measure on a machine with these costs.

    A sample of the case's model takes `slower` times as long as `costs.sample`.
    """
    work = Work(RECIPE.model_copy(update={"groups": ranks}), samples, parameters)
    costs = replace(costs, sample=costs.sample * slower, growth=costs.growth * slower)
    large_batch = epoch_seconds(work, costs, RECIPE.large_batch, ranks, ranks)
    refine = epoch_seconds(work, costs, RECIPE.refine, 1, ranks)
    return {
        "ranks": ranks,
        "width": width,
        "samples": samples,
        "parameters": parameters,
        "phases": {"large_batch": {"seconds": large_batch}, "refine": {"seconds": refine}},
        "batch_sizes": {"large_batch": 64, "refine": 16},
    }


def test_a_calibration_finds_the_costs_that_made_the_measurements() -> None:
    made = [
        case(1, 8, 640, COSTS, 1000, 1),
        case(2, 8, 640, COSTS, 1000, 1),
        case(2, 16, 640, COSTS, 4000, 3.5),
        case(2, 8, 1280, COSTS, 1000, 1),
    ]
    found = fit_costs(made, cores=2)
    for name in ("sample", "step", "latency", "bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(COSTS, name), rel=1e-6), name
    assert found.cores == 2


def test_a_calibration_takes_all_ranks_that_have_a_core_of_their_own(tmp_path: Path) -> None:
    """On hosts of their own, where two ranks alone would tell another latency."""
    two = [case(ranks, 8, 640, COSTS, 1000, 1) for ranks in (1, 2)]
    two.append(case(2, 16, 640, COSTS, 4000, 3.5))
    slow = replace(COSTS, latency=0.003)
    more = [case(ranks, 8, 640, slow, 1000, 1) for ranks in (4, 8)]
    crowded = case(8, 8, 640, replace(COSTS, latency=0.3), 1000, 5)  # on two hosts with one core
    for each in (*two, *more, crowded):
        each["ranks_on_a_host"] = 4 if each is crowded else 1
    file = tmp_path / "scaling.json"

    def latency_of(made: list[dict[str, Any]]) -> float:
        file.write_text(json.dumps({"machine": {"cores": 1}, "cases": made}))
        return read_calibration(file).costs.latency

    assert latency_of(two) == pytest.approx(COSTS.latency)
    assert COSTS.latency < latency_of([*two, *more]) == latency_of([*two, *more, crowded])


def test_ranks_that_slow_each_other_down_are_taken_for_slow_not_for_steps_that_cost() -> None:
    """Eight hosts that share two processors, each 1.6 times slower than alone."""
    costs = replace(COSTS, step=0.0)
    crowd = {1: 1.0, 2: 1.05, 4: 1.2, 8: 1.6}
    made = [case(ranks, 8, 640, costs, 1000, slower) for ranks, slower in crowd.items()]
    made.append(case(2, 16, 640, costs, 4000, 3.5 * 1.05))
    for each in made:
        each["ranks_on_a_host"] = 1
    found = fit_costs(made, cores=1)
    assert (found.step, found.growth) == pytest.approx((0, 0), abs=1e-9)
    assert found.sample == pytest.approx(1.6 * costs.sample)
    assert (found.latency, found.bandwidth) == pytest.approx((costs.latency, costs.bandwidth))


def test_a_calibration_finds_that_large_steps_outgrow_the_caches() -> None:
    costs = replace(COSTS, step=0.0, growth=0.002, small=16, large=64)
    made = [
        case(1, 8, 640, costs, 1000, 1),
        case(2, 8, 640, costs, 1000, 1),
        case(2, 16, 640, costs, 4000, 3.5),
    ]
    found = fit_costs(made, cores=2)
    for name in ("sample", "step", "growth", "latency", "bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(costs, name), rel=1e-6), name


SCALING = Path(__file__).parents[1] / "runs" / "scaling" / "scaling.json"
MEASURED = json.loads(SCALING.read_text(encoding="utf-8"))["cases"]


def test_the_committed_measurements_go_beyond_two_ranks() -> None:
    assert [case["ranks"] for case in MEASURED if case["ranks"] > 2] == [4, 8]


@pytest.mark.parametrize(
    "measured",
    [case for case in MEASURED if case["ranks"] > 2],
    ids=lambda case: f"{case['ranks']} ranks",
)
@pytest.mark.parametrize("phase", ["large_batch", "refine"])
def test_calibrated_on_one_and_two_ranks_it_predicts_more(
    measured: dict[str, Any], phase: str
) -> None:
    """Each phase that `bench scaling` measured on two cores is predicted within a quarter."""
    ranks = measured["ranks"]
    sizes = [f"{name}.batch_size={size}" for name, size in measured["batch_sizes"].items()]
    recipe = load_recipe("cifar10-cpu", (f"groups={ranks}", *sizes))
    work = Work(recipe, measured["samples"], measured["parameters"])
    team = ranks if phase == "large_batch" else 1
    costs = read_calibration(SCALING).costs
    predicted = epoch_seconds(work, costs, getattr(recipe, phase), team, ranks)
    assert predicted == pytest.approx(measured["phases"][phase]["seconds"], rel=0.25)


def test_phase_2_sent_nothing_in_any_measurement() -> None:
    assert [case["phases"]["refine"]["bytes"] for case in MEASURED] == [0] * 8


def test_more_ranks_needed_no_more_memory_each() -> None:
    alike = [case for case in MEASURED if (case["width"], case["samples"]) == (8, 4096)]
    memory = {case["ranks"]: case["peak_memory_mib"] for case in alike}
    assert sorted(memory) == [1, 2, 4, 8]
    by_ranks = [memory[ranks] for ranks in sorted(memory)]
    assert by_ranks == sorted(by_ranks, reverse=True)


def test_the_table_names_what_limits_and_what_is_refused() -> None:
    table = plan.table(WORK, COSTS, (2, 32))
    assert "| small batch (16)" in table and "phase 1: computing" in table
    assert "large_batch.batch_size = 16 does not divide by its 32 ranks |" in table


# A step's samples take long, so that its message is what small batches pay for more ranks.
BUSY = replace(COSTS, sample=0.1, latency=1e-6, bandwidth=1e4)


def test_swap_is_faster_between_the_rates_at_which_both_take_equally_long() -> None:
    ((low, high),) = worth.rates(WORK, BUSY, 4)
    assert 0 < low < high < float("inf")
    for rate, faster in ((0.99 * low, False), (1.01 * low, True), (0.99 * high, True)):
        assert (worth.slower_by(WORK, replace(BUSY, bandwidth=rate), 4) > 0) is faster
    assert worth.slower_by(WORK, replace(BUSY, bandwidth=1.01 * high), 4) < 0


def test_every_range_of_rates_is_found() -> None:
    """With a hole: on 256 ranks fewer of them serve small batches best in between."""
    recipe = load_recipe("imagenet", ())
    work = Work(recipe, 1_281_167, 25_557_032)
    costs = Costs(sample=1e-3, step=0.0, latency=1e-3)
    ranges = worth.rates(work, costs, 256)
    for rate in np.geomspace(1e4, 1e14, 61):
        inside = any(low < rate < high for low, high in ranges)
        assert (worth.slower_by(work, replace(costs, bandwidth=rate), 256) > 0) == inside, rate


def test_small_batches_take_the_ranks_that_serve_them_best() -> None:
    # Over a slow network one rank is best, whatever number the job has.
    slow = replace(COSTS, bandwidth=10.0, latency=1.0)
    small = next(iter(baselines(RECIPE).values()))
    alone = sum(predict(replace(WORK, recipe=small), slow, 1).values())
    ours = sum(predict(WORK, slow, 8).values())
    assert worth.slower_by(WORK, slow, 8) == pytest.approx(alone - ours)


def test_from_a_number_of_ranks_on_swap_is_faster() -> None:
    costs = replace(BUSY, bandwidth=1e5)
    assert [worth.slower_by(WORK, costs, ranks) > 0 for ranks in (2, 4, 8, 16)] == [0, 0, 0, 1]
    found = worth.numbers_of_ranks(WORK, costs)
    assert found and found[0] == 16


def test_the_plan_says_when_swap_is_worth_it() -> None:
    head, on_four, at_this_rate = worth.lines(WORK, BUSY, (3, 4))  # two groups: no three ranks
    assert head == "SWAP takes less time than small batch (16), for as many epochs,"
    assert on_four.startswith("- on 4 ranks: where a rank gets less than ")
    assert at_this_rate.startswith("- at 0.08 Mbit/s a rank: from ")
    plain = replace(WORK, recipe=next(iter(baselines(RECIPE).values())))
    assert worth.lines(plain, BUSY, (4,)) == []


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
        parse_cost(override)
