"""Guides that are computed beforehand, for a folder of masks."""
