"""Training on one machine: data, losses, optimiser, a resumable loop."""
