"""Fine-tuning: reads records, trains an adapter, writes a report."""
