"""MultiRegionAttention: attention whose probabilities are rounded on two regions, in one kernel."""
