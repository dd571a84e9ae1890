"""Scale tables and quantization schemes: below every stage, so that all of them compute the same."""
