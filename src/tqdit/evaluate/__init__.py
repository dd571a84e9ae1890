"""What quantization cost: metrics, paired errors, a report, and a diagnosis (docs/evaluation.md).

`statistics`, `metrics`, `bootstrap` and `paired` are pure functions of arrays in NumPy; only extractors and the
diagnosis need torch.
"""
