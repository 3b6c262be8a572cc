"""Training of small policies with the reference model's own loss."""
