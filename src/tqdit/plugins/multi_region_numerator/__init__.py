"""MultiRegionNumerator: exponentials of a softmax, rounded on two regions, and the reciprocals of their sums."""
