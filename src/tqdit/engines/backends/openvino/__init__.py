"""OpenVINO, the fastest backend on CPUs. Its artefact is an OpenVINO IR; kernels are chosen when it is opened."""
