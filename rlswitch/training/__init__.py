"""The trainer: models, log-probabilities, batches, LoRA, publishing and parking."""
