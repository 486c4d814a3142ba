"""Frozen networks: ONNX Runtime, TensorRT and TensorRT for RTX."""
