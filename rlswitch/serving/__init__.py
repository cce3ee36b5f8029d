"""Several models on one accelerator, no training."""
