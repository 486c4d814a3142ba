"""Training of heads on frozen backbones: python -m export train."""
