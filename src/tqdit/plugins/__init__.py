"""Custom ops of exported graphs, one folder per op. The float pipeline needs none, so there is none yet:
`TimeGroupSelect` and `MultiRegionSoftmax` come with the quantized exporter."""
