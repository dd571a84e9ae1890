"""MultiRegionNumeratorAttention: attention whose numerators are rounded on two regions, divided at the end."""
