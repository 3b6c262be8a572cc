"""Whole evaluations over a fake simulation, in real worker processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from eval_fakes import TASKS, TRIALS, FakeScenes, FakeSource, fake_config

from turbopi.sim import workers
from turbopi.sim.episodes_file import EpisodeRecord, read_records
from turbopi.sim.evaluate import EvalConfig, evaluate
from turbopi.sim.pool import WorkersError
from turbopi.sim.sources import noise_seed
from turbopi.sim.workers import Failed, Job, Ready, WorkerPlan, work

EPISODES = len(TASKS) * TRIALS


def outcomes(directory: Path) -> dict[Any, Any]:
    """All that does not depend on the clock."""
    return {r.key: (r.success, r.steps, r.inferences, r.error) for r in read_records(directory)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "reference"
    seen: list[EpisodeRecord] = []
    summary = evaluate(fake_config(out), on_episode=seen.append)
    assert summary["total"]["episodes"] == EPISODES == len(seen)
    assert 0 < summary["total"]["successes"] < EPISODES
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    return out


def test_outcomes_do_not_depend_on_workers_and_a_finished_run_has_nothing_to_do(
    reference: Path, tmp_path: Path
) -> None:
    evaluate(fake_config(tmp_path, workers=1))
    assert outcomes(tmp_path) == outcomes(reference)
    before = (tmp_path / "episodes.jsonl").read_bytes()
    started: list[list[EpisodeRecord]] = []
    evaluate(fake_config(tmp_path, workers=1), on_start=started.append)
    assert len(started[0]) == EPISODES
    assert (tmp_path / "episodes.jsonl").read_bytes() == before


def test_sigkill_loses_nothing_and_counts_nothing_twice(reference: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "eval_fakes.py"), str(tmp_path), "0.02"]
    log, kills, deadline = tmp_path / "episodes.jsonl", 0, time.monotonic() + 120
    known: list[bytes] = []
    while time.monotonic() < deadline:
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
        wanted = len(known) + 3
        while process.poll() is None and kills < 2:
            if log.exists() and log.read_bytes().count(b"\n") >= wanted:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        if process.wait(60) == 0:
            break
        lines = log.read_bytes().splitlines()
        assert lines[: len(known)] == known  # what was written stays
        with log.open("ab") as file:  # and the kill tore a line
            file.write(b'{"suite": "fake", "ta')
        known = lines
    assert kills == 2
    assert log.read_bytes().splitlines()[: len(known)] == known
    assert len(read_records(tmp_path)) == EPISODES
    assert outcomes(tmp_path) == outcomes(reference)


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "eval_fakes.py"), str(tmp_path), "30"]
    process = subprocess.Popen(command)
    log = tmp_path / "logs" / "worker0.log"
    while not log.exists():
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def test_another_configuration_is_refused(reference: Path) -> None:
    with pytest.raises(ValueError, match=r"replan: 5 → 2\)"):
        evaluate(fake_config(reference, replan=2))
    with pytest.raises(ValueError, match=r"source\.strength: 1\.0 → 2\.0\)"):
        evaluate(fake_config(reference, source=FakeSource(strength=2.0)))


def test_a_worker_that_dies_is_replaced_and_its_episode_played_again(reference: Path, tmp_path: Path) -> None:
    source = FakeSource(mischief="once", at=(1, 2), mark=str(tmp_path / "mark"))
    summary = evaluate(fake_config(tmp_path / "run", source=source, workers=1))
    assert summary["errors"] == []
    records = {r.key: r for r in read_records(tmp_path / "run")}
    assert len(records) == EPISODES
    assert records["fake", 1, 2, 0].attempts == 2
    assert {r.attempts for key, r in records.items() if key != ("fake", 1, 2, 0)} == {1}


def test_three_deaths_are_an_error_and_no_failure_and_a_later_run_tries_again(tmp_path: Path) -> None:
    mark, at = tmp_path / "mark", (0, 1)
    config = fake_config(tmp_path / "run", tasks=(0,), trials=2, workers=1)
    config = replace(config, source=FakeSource(mischief="always", at=at, mark=str(mark)))
    summary = evaluate(config)
    assert mark.read_text() == "xxx"
    assert summary["total"]["episodes"] == 1
    assert [(e["task"], e["initial_state"]) for e in summary["errors"]] == [at]
    assert "exit status 7" in summary["errors"][0]["error"]
    assert "count nowhere" in summary["verdict"]
    mended = evaluate(replace(config, source=FakeSource()))
    assert mended["errors"] == []
    assert mended["total"]["episodes"] == 2


def test_a_fault_from_outside_is_tried_again_and_silence_ends(tmp_path: Path) -> None:
    common: dict[str, Any] = {"tasks": (0,), "trials": 1, "workers": 1}
    source = FakeSource(mischief="raise", at=(0, 0))
    summary = evaluate(fake_config(tmp_path / "a", source=source, **common))
    expected = "fake task 0, initial state 0: RuntimeError: the arm fell off"
    assert [e["error"] for e in summary["errors"]] == [expected]
    source = FakeSource(mischief="hang", at=(0, 0))
    summary = evaluate(fake_config(tmp_path / "b", source=source, episode_timeout_s=0.5, **common))
    assert [e["error"] for e in summary["errors"]] == ["no result within 0.5 s"]


@pytest.mark.parametrize(
    ("mischief", "message"),
    [("nan", "task 0, initial state 1.*NaN"), ("short", "task 0, initial state 1.*horizon"), ("misfit", "aloha")],
)
def test_a_policy_that_breaks_its_contract_is_one_clear_message(tmp_path: Path, mischief: str, message: str) -> None:
    source = FakeSource(mischief=mischief, at=(0, 1))
    with pytest.raises(ValueError, match=message):
        evaluate(fake_config(tmp_path, source=source, tasks=(0,), trials=2, workers=1))


def test_workers_that_never_start_are_given_up(tmp_path: Path) -> None:
    with pytest.raises(WorkersError, match=r"3 workers in a row.*exit status 3.*no memory for the weights"):
        evaluate(fake_config(tmp_path, source=FakeSource(mischief="stillborn"), workers=1))


def test_a_worker_speaks_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_settle_process", lambda threads, log: None)

    def said(source: FakeSource, *jobs: Job | None) -> list[Any]:
        plan = WorkerPlan(source, FakeScenes(), "fake", 0, 5, 1, tmp_path)
        ours, theirs = Pipe()
        for job in jobs:
            ours.send(job)
        if None not in jobs:
            ours.close()
            work(plan, theirs, tmp_path / "log")
            return []
        work(plan, theirs, tmp_path / "log")
        theirs.close()
        messages = []
        try:
            while True:
                messages.append(ours.recv())
        except (EOFError, ConnectionResetError):
            return messages

    ready, first, second = said(FakeSource(), Job(0, 0, film=True), Job(1, 3), None)
    assert ready == Ready({"strength": 1.0})
    assert (first.key, first.success, first.prompt) == (("fake", 0, 0, 0), True, "do 0")
    assert (second.key, second.success, second.steps) == (("fake", 1, 3, 0), False, 8)
    assert len(first.infer_ms) == first.inferences > 0
    assert first.media["video"] == "media/task00_state00.mp4"
    assert all((tmp_path / name).is_file() for name in [first.media["video"], *first.media["frames"]])
    assert second.media == {}
    assert said(FakeSource(mischief="nan", at=(0, 0)), Job(0, 0), None)[1].hopeless
    failed = said(FakeSource(mischief="raise", at=(0, 0)), Job(0, 0), None)[1]
    assert failed == Failed("fake task 0, initial state 0: RuntimeError: the arm fell off", hopeless=False)
    assert said(FakeSource(mischief="misfit"), None) == [Failed("the checkpoint is for robot 'aloha'", hopeless=True)]
    assert said(FakeSource()) == []  # the parent is gone


def test_a_worker_settles_in_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    redirected: list[int] = []
    monkeypatch.setattr(os, "dup2", lambda ours, standard: redirected.append(standard))
    monkeypatch.setattr(signal, "signal", lambda number, handler: redirected.append(number))
    monkeypatch.setattr(workers, "_end_with_parent", lambda: None)
    workers._settle_process(1, tmp_path / "logs" / "worker0.log")
    assert redirected == [signal.SIGINT, 1, 2]
    assert (tmp_path / "logs" / "worker0.log").exists()


def test_a_worker_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = Pipe()
    theirs.close()
    monkeypatch.setattr(workers, "parent_process", lambda: SimpleNamespace(sentinel=ours))
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as status:
        workers._end_with_parent()
    assert status.value.code == 1


def test_noise_is_a_function_of_the_episode_alone() -> None:
    assert noise_seed(0, "libero_spatial", 3, 7) == noise_seed(0, "libero_spatial", 3, 7)
    seeds = {noise_seed(s, suite, t, i) for s in range(3) for suite in ("a", "b") for t in range(5) for i in range(20)}
    assert len(seeds) == 3 * 2 * 5 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "trials must be a positive integer"),
        ({"workers": True}, "workers must be"),
        ({"seed": -1}, "seed must be"),
        ({"tasks": ()}, "at least one task"),
        ({"tasks": (1, 1)}, "each once"),
        ({"episode_timeout_s": 0}, "episode_timeout_s"),
        ({"film": frozenset({(9, 0)})}, r"9:0 \(task:initial state\)"),
    ],
)
def test_configurations_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fake_config(tmp_path, **changes)
    assert EvalConfig(tmp_path, FakeSource(), FakeScenes()).episodes == 200
