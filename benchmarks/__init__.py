"""Measures: python -m benchmarks quality | step."""

__dist__ = "dynaguide-edge"
