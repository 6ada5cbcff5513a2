"""A round of the models of `make fuzz`: all ingredients, and all kinds that must be refused."""

from pathlib import Path

import fuzz
import fuzz_models
import pytest

from swap_hpc.parallel.teams import Team


@pytest.mark.ranks(2)
def test_a_model_of_any_kind_is_trained_right_or_refused(world: Team, tmp_path: Path) -> None:
    folder = Path(world.broadcast(str(tmp_path)))
    seeds = range(fuzz_models.ROUND)
    made_of = {name for seed in seeds for name in fuzz_models.ingredients(seed)}
    assert made_of == fuzz_models.INGREDIENTS.keys() | fuzz_models.REFUSED.keys()
    verdicts = [fuzz.judge(seed, "", folder, world) for seed in seeds]
    wrong = [str(verdict) for verdict in verdicts if verdict.word == "wrong"]
    assert not wrong, "\n".join(wrong)
    assert sum(verdict.word == "refused" for verdict in verdicts) == len(fuzz_models.REFUSED)
