from pathlib import Path

import pytest

from turbopi.sim.other_bowl import GOAL, OTHER, TARGET, other_prompts, region_of
from turbopi.train.demos import DemoConfig, kept_per_task

BDDL = """(define (problem x)
  (:init
    (On akita_black_bowl_1 main_table_table_center)
    (In akita_black_bowl_2 wooden_cabinet_1_top_region)
  )
)"""


def test_regions_are_read_from_the_task() -> None:
    assert region_of(BDDL, TARGET) == "main_table_table_center"
    assert region_of(BDDL, OTHER) == "wooden_cabinet_1_top_region"
    assert region_of(BDDL, GOAL) is None


def test_each_other_bowl_has_the_prompt_of_its_place() -> None:
    pytest.importorskip("libero")
    prompts = other_prompts()
    assert prompts[0] == "pick up the black bowl next to the ramekin and place it on the plate"
    assert prompts[6] == "pick up the black bowl on the stove and place it on the plate"
    assert len(prompts) == 10


@pytest.mark.parametrize("change", [{"episodes": 0}, {"processes": 0}, {"tasks": (10,)}])
def test_demo_config_checks_itself(change: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got"):
        DemoConfig(out=tmp_path, **change)


def test_results_are_counted_per_task() -> None:
    assert kept_per_task([(1, True), (0, False), (1, False)]) == {0: (0, 1), 1: (1, 2)}
