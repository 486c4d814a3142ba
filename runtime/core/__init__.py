"""Refinement, guided filter and regions on arrays: checks, then the device's module."""
