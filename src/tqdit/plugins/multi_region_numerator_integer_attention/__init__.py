"""MultiRegionNumeratorIntegerAttention: MultiRegionNumeratorAttention of int8 codes, its result int8 if asked for."""
