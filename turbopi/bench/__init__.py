"""Measurements that leave a receipt."""

from .receipt import machine, summary, write_receipt
from .workloads import WORKLOADS, Workload, workload

__all__ = ["WORKLOADS", "Workload", "machine", "summary", "workload", "write_receipt"]
