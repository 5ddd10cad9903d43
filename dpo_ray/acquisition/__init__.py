"""Active preference learning: which candidate pairs are worth a label."""
