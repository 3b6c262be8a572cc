from dataclasses import replace
from pathlib import Path

import pytest
from test_eval_files import CONFIG, RECORD, error

from turbopi.cli.main import main
from turbopi.sim.compare import compare
from turbopi.sim.episodes_file import RunDirectory


def run(path: Path, outcomes: str, *, seed: int = 0, config: dict | None = None) -> Path:
    """A run of two tasks: a letter per episode, s success, f failure, e error, - not played."""
    with RunDirectory(path, config or CONFIG) as directory:
        for index, letter in enumerate(outcomes):
            task, state = divmod(index, 30)
            if letter == "e":
                directory.append(replace(error(state), task=task, seed=seed))
            elif letter != "-":
                directory.append(replace(RECORD, task=task, initial_state=state, seed=seed, success=letter == "s"))
    return path


def test_discordant_pairs_decide(tmp_path: Path) -> None:
    a = run(tmp_path / "a", "s" * 60)
    b = run(tmp_path / "b", "s" * 25 + "f" * 5 + "s" * 27 + "fff", config={**CONFIG, "trials": 30})
    result = compare(a, b, minimum=50)
    assert result["total"]["only_a"] == 8
    assert result["total"]["p_value"] == pytest.approx(2 / 2**8)
    assert result["total"]["difference"] == pytest.approx(-8 / 60)
    assert [t["states_only_a"] for t in result["tasks"]] == [[25, 26, 27, 28, 29], [27, 28, 29]]
    assert result["verdict"].startswith("B succeeds less often than A: p = 0.00781, 60 pairs, 8 episodes only A")
    assert result["configuration"] == ["config.trials: 20 → 30"]
    assert compare(b, a, minimum=50)["verdict"].startswith("B succeeds more often than A")
    assert compare(a, a, minimum=50)["verdict"].startswith("no difference shown, which does not show")


def test_refuses_below_the_minimum(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", "s" * 40 + "e"), run(tmp_path / "b", "---" + "f" * 40)
    result = compare(a, b, minimum=38)
    assert not result["enough"]
    assert result["total"]["pairs"] == 37
    assert result["left_out"] == {"a": 3, "b": 3}
    assert result["verdict"].startswith("no verdict: 37 pairs")
    assert compare(a, b, minimum=37)["enough"]


def test_runs_that_share_nothing(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", "ss"), run(tmp_path / "b", "ss", seed=1)
    with pytest.raises(ValueError, match=r"share no episode.*states 0 to 1, seed 0;.*seed 1; evaluate both"):
        compare(a, b, minimum=1)
    with pytest.raises(ValueError, match="no finished episode"):
        compare(a, run(tmp_path / "c", "e"), minimum=1)
    with pytest.raises(FileNotFoundError, match="turbo-pi eval"):
        compare(a, tmp_path / "absent", minimum=1)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run(tmp_path / "a", "s" * 60), run(tmp_path / "b", "s" * 55 + "f" * 5, config={**CONFIG, "trials": 30})
    with pytest.raises(SystemExit) as status:
        main(["compare", str(a), str(b), "--json-out", str(tmp_path / "out.json")])
    assert status.value.code == 0
    out = capsys.readouterr().out
    assert "config.trials: 20 → 30" in out
    assert "no difference shown" in out
    assert "only B" in out
    assert (tmp_path / "out.json").is_file()
    with pytest.raises(SystemExit) as status:
        main(["compare", str(a), str(tmp_path / "absent")])
    assert status.value.code == 1
    assert capsys.readouterr().err.startswith("error: no episodes.jsonl")
