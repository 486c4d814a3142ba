"""Bundles: the manifest, reading, writing, golden vectors, and what a bundle runs."""
