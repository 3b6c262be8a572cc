from pathlib import Path

import pytest
import torch
from mutations import MUTATIONS, Mutation, golden_of, measure, mutated_model

CASES = [(mutation, kind) for mutation in MUTATIONS for kind in mutation.kinds]


@pytest.mark.parametrize(
    ("mutation", "kind"), CASES, ids=[f"trap{m.trap}-{m.mistake.replace(' ', '_')}-{kind}" for m, kind in CASES]
)
def test_a_mistake_is_seen_at_its_tap(mutation: Mutation, kind: str, tmp_path: Path) -> None:
    golden = golden_of(mutation, kind)
    right = measure(golden, golden.build(invalid_tokens=mutation.invalid_tokens), mutation)
    wrong = measure(golden, mutated_model(mutation, golden, tmp_path), mutation)
    assert right.relative <= mutation.tolerance
    assert not wrong.relative <= mutation.tolerance


def test_every_trap_of_section_one_has_a_mutation() -> None:
    # 26, 27 and 31 are the checkpoint room's; 30 is a choice between two right answers; 46 is tested on its own below.
    assert {m.trap for m in MUTATIONS} == {*range(1, 26), 28, 29, 32, 33}


def test_the_package_leaves_float32_matmul_precision_alone() -> None:
    # TRAPS 46: a library that sets "high" turns float32 into TF32 on a GPU.
    assert torch.get_float32_matmul_precision() == "highest"
