"""MultiRegionIntegerAttention: MultiRegionAttention of int8 codes, whose result may be int8 as well."""
