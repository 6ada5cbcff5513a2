"""`plan` beside the study of hosts: from a bench on them it predicts each row's seconds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from swap_hpc.bench.calibration import read_calibration
from swap_hpc.bench.cost_model import Costs, Work, predict
from swap_hpc.study.networks import Timing, timings
from swap_hpc.study.numbers import lines, shown_phases
from swap_hpc.study.plan import Plan
from swap_hpc.study.study import Row, load_study

RUNS = Path(__file__).parents[1] / "runs" / "cifar10-hosts"
STUDY = load_study("cifar10-hosts")
SCALING = RUNS / "scaling.json"
PARAMETERS = json.loads(SCALING.read_text(encoding="utf-8"))["cases"][0]["parameters"]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan(STUDY, RUNS).for_report()


@pytest.fixture(scope="module")
def measured(plan: Plan) -> dict[str, dict[str, Timing]]:
    return timings(plan, lines(plan))


def on_hosts(network: str) -> Costs:
    """Return the costs of the hosts, whose links have a network's stated rate."""
    costs = read_calibration(SCALING).costs
    stated = STUDY.networks[network] * 1e6 / 8
    return replace(costs, cores=None, bandwidth=min(costs.bandwidth, stated))


@pytest.mark.parametrize("network", STUDY.networks)
@pytest.mark.parametrize("row", STUDY.rows, ids=lambda row: row.method)
def test_a_rows_seconds_are_predicted_within_a_quarter(
    plan: Plan, measured: dict[str, dict[str, Timing]], row: Row, network: str
) -> None:
    recipe = plan.reported_recipe(row.run)
    ranks = STUDY.runs[row.run].ranks or STUDY.ranks
    seconds = predict(Work(recipe, 50_000, PARAMETERS), on_hosts(network), ranks)
    predicted = sum(seconds[phase] for phase in shown_phases(row.model))
    assert predicted == pytest.approx(measured[row.method][network].seconds, rel=0.25)
