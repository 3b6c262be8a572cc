"""Weights in other forms: folded into fewer and larger products (`fold`)."""
