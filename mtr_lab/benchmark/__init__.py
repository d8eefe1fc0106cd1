"""Benchmark of backbones, policies and backends of the operations: the cases, their timing, the table."""
