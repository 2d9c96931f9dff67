"""Fine-tuning of feature extractors."""
