"""Search spaces for `dpo-ray sweep`: declarations only."""
