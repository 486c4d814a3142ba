"""Measures, compares and reports the latency of the whole pipeline."""
