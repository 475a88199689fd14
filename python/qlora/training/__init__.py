"""Fine-tuning: records in, adapter and report out."""
