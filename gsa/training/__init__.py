"""Training: stages, one step, the loop around it, and checkpoints."""
