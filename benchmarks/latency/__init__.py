"""Latency of the whole pipeline: it is measured, compared and reported."""
