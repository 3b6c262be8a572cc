"""HTML reports, from the JSON that other rooms write and from nothing else."""

from .evaluation import write_eval_report

__all__ = ["write_eval_report"]
