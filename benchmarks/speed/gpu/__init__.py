"""Speed of the CUDA module, compared with PyTorch on the same GPU: python -m benchmarks gpu."""
