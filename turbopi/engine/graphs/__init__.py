"""Engines over exported graphs: where the graphs come from, and how the stages walk through them."""
