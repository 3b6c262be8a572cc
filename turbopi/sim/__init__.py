"""LIBERO in closed loop: simulated tasks, the scripted expert, episodes and what they prove."""
