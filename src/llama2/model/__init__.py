"""The network in PyTorch: for training, and for what does not fit the processor. Needs torch."""
