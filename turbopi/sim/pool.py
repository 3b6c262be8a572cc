"""The worker processes of an evaluation, from the parent's side: hands out episodes, and replaces workers that die."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from .episodes_file import EpisodeRecord
from .workers import Failed, Job, Ready, WorkerPlan, work

ATTEMPTS = 3
LOG_DIRECTORY = "logs"
END_SECONDS = 5.0
START_SECONDS = 600.0
"""A large checkpoint takes its time."""


class WorkersError(OSError):
    """Workers that die before they can play anything."""


class _Worker:
    """One process, the pipe to it, and the episode that it plays."""

    def __init__(self, plan: WorkerPlan, number: int) -> None:
        context = get_context("spawn")
        self.log = plan.out / LOG_DIRECTORY / f"worker{number}.log"
        ours, theirs = context.Pipe()
        self.connection: Connection = ours
        self.process: BaseProcess = context.Process(
            target=work, args=(plan, theirs, self.log), name=f"turbo-pi worker {number}", daemon=True
        )
        self.process.start()
        theirs.close()
        self.number = number
        self.ready = False
        self.job: Job | None = None
        self.task: int | None = None
        self.since = time.monotonic()

    def give(self, job: Job) -> None:
        """Send it an episode."""
        self.job, self.task, self.since = job, job.task, time.monotonic()
        self.connection.send(job)

    def take(self) -> Job:
        """The episode that it played, which is now over."""
        job, self.job = self.job, None
        assert job is not None
        return job

    def end(self, patience_s: float = 0.0) -> None:
        """End the process, gently if there is patience."""
        self.process.join(patience_s)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.connection.close()

    def epitaph(self) -> str:
        """How it died, and the last thing that it said."""
        code = self.process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        lines = [line for line in _tail(self.log).splitlines() if line.strip()]
        return f"{how}; {self.log} ends with: {lines[-1].strip() if lines else '(nothing)'}"


class Pool:
    """Plays episodes in parallel; see `run`."""

    def __init__(self, plan: WorkerPlan, workers: int, episode_timeout_s: float) -> None:
        self.plan = plan
        self.size = workers
        self.episode_timeout_s = episode_timeout_s
        self._workers: list[_Worker] = []
        self._pending: list[Job] = []
        self._deaths: Counter[Job] = Counter()
        self._stillborn = 0

    def run(self, jobs: Sequence[Job]) -> Iterator[Ready | EpisodeRecord]:
        """Play every job; yields workers' announcements and episodes as they come.

        An episode whose worker dies, hangs or fails for want of something outside is played again by a new worker, at
        most `ATTEMPTS` times in all; then it comes as a record with an error.

        Raises:
            ValueError: something that trying again cannot mend; says what.
            WorkersError: workers die before they are ready.
        """
        self._pending = list(jobs)
        try:
            for number in range(min(self.size, len(jobs))):
                self._workers.append(_Worker(self.plan, number))
            while self._workers:
                for worker in self._listen():
                    message = self._hear(worker)
                    if message is not None:
                        yield message
                    self._go_on(worker)
        finally:
            for worker in self._workers:
                worker.end()

    def _listen(self) -> list[_Worker]:
        """Wait until some worker has spoken, died, or been silent for too long; those."""
        now = time.monotonic()
        deadlines = [worker.since + self._patience(worker) - now for worker in self._workers]
        waiting: dict[object, _Worker] = {worker.connection: worker for worker in self._workers}
        spoken = wait([worker.connection for worker in self._workers], max(0.0, min(deadlines)))
        if spoken:
            return [waiting[connection] for connection in spoken]
        return [worker for worker, left in zip(self._workers, deadlines, strict=True) if left <= 0]

    def _patience(self, worker: _Worker) -> float:
        return self.episode_timeout_s if worker.ready else START_SECONDS

    def _hear(self, worker: _Worker) -> Ready | EpisodeRecord | None:
        """What the worker has to say to the outside; buries it if it died or hangs."""
        try:
            if not worker.connection.poll():
                return self._bury(worker, f"no result within {self._patience(worker):g} s")
            message = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            return self._bury(worker, f"its worker died: {worker.epitaph()}")
        if isinstance(message, Ready):
            worker.ready, self._stillborn = True, 0
            return message
        if isinstance(message, Failed):
            if message.hopeless:
                raise ValueError(message.message)
            return self._bury(worker, message.message)
        job = worker.take()
        return replace(message, attempts=self._deaths[job] + 1)

    def _go_on(self, worker: _Worker) -> None:
        """Give the worker its next episode, or let it go."""
        if worker not in self._workers or not worker.ready or worker.job is not None:
            return
        job = self._next_job(worker.task)
        try:
            if job is not None:
                worker.give(job)
                return
            worker.connection.send(None)
        except (BrokenPipeError, ConnectionResetError):
            return  # it died just now; listening tells, and buries it
        self._workers.remove(worker)
        worker.end(END_SECONDS)

    def _next_job(self, task: int | None) -> Job | None:
        """An episode of the worker's own task, whose simulation it has, else of the task with most to do."""
        if not self._pending:
            return None
        left = Counter(job.task for job in self._pending)
        chosen = task if task in left else left.most_common(1)[0][0]
        job = next(job for job in self._pending if job.task == chosen)
        self._pending.remove(job)
        return job

    def _bury(self, worker: _Worker, cause: str) -> EpisodeRecord | None:
        """End a worker that is of no use, start another, and queue its episode again or give that up."""
        worker.end()
        self._workers.remove(worker)
        record = None
        if worker.job is not None:
            record = self._retry(worker.job, cause)
        elif not worker.ready:
            self._stillborn += 1
            if self._stillborn >= ATTEMPTS:
                raise WorkersError(f"{self._stillborn} workers in a row were lost before their first episode: {cause}")
        if self._pending:
            self._workers.append(_Worker(self.plan, worker.number))
        return record

    def _retry(self, job: Job, cause: str) -> EpisodeRecord | None:
        self._deaths[job] += 1
        if self._deaths[job] < ATTEMPTS:
            self._pending.insert(0, job)
            return None
        return EpisodeRecord(
            suite=self.plan.suite,
            task=job.task,
            initial_state=job.initial_state,
            seed=self.plan.seed,
            prompt="",
            success=False,
            steps=0,
            inferences=0,
            infer_ms=[],
            note=None,
            error=cause,
            attempts=ATTEMPTS,
            wall_s=0.0,
            media={},
        )


def _tail(path: Path, size: int = 4096) -> str:
    try:
        return path.read_bytes()[-size:].decode(errors="replace")
    except FileNotFoundError:
        return ""
