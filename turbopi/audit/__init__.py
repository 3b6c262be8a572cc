"""The same inputs through two implementations, compared at every intermediate."""
