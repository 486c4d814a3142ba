"""Freezes priors and refinement steps into ONNX files and engines (not written yet)."""

__dist__ = "dynaguide-edge"
