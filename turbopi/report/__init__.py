"""HTML reports, from the JSON that other rooms write and from nothing else."""

from .audit import write_audit_report
from .episode import write_episode_report
from .evaluation import write_eval_report
from .latency import write_bench_report
from .pareto import write_sweep_report

__all__ = [
    "write_audit_report",
    "write_bench_report",
    "write_episode_report",
    "write_eval_report",
    "write_sweep_report",
]
