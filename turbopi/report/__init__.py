"""HTML reports, from the JSON that other rooms write and from nothing else."""

from .episode import write_episode_report
from .evaluation import write_eval_report
from .latency import write_bench_report

__all__ = ["write_bench_report", "write_episode_report", "write_eval_report"]
