"""Measurements that leave a receipt."""

from .receipt import machine, summary, write_receipt

__all__ = ["machine", "summary", "write_receipt"]
