"""Export, verification and audit of checkpoints."""
