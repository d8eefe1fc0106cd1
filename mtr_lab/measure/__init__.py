"""What a model costs and how sure a difference is: FLOPs, throughput, latency, memory, intervals."""
