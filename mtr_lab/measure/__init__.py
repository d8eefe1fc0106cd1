"""The costs of a model (FLOPs, throughput, latency, memory), and confidence intervals."""
