"""Training: one optimiser step and its loss. Needs torch."""
