"""MultiRegionSoftmax: softmax whose result is rounded on two disjoint regions, the lower with a scale per row."""
