"""MultiRegionSoftmax: softmax whose result is rounded on two disjoint regions, the lower with a step per row."""
