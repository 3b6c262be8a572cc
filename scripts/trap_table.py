"""Put each mistake of tests/model/mutations.py into the reference and print the table of docs/parity.md.

python scripts/trap_table.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "model"))
from mutations import MUTATIONS, golden_of, measure, mutated_model


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for mutation in track(MUTATIONS, description="mutating", console=Console(stderr=True)):
            for kind in mutation.kinds:
                golden = golden_of(mutation, kind)
                right = measure(golden, golden.build(invalid_tokens=mutation.invalid_tokens), mutation)
                wrong = measure(golden, mutated_model(mutation, golden, Path(directory)), mutation)
                rows.append(
                    f"| {mutation.trap} | {mutation.mistake} | {kind} | `{mutation.tap}` "
                    f"| {right.relative:.1e} | **{wrong.relative:.1e}** |"
                )
    print("| trap | mistake | model | tap | error without | error with it |\n|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
