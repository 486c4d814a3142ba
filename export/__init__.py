"""From checkpoints to bundles: freeze, verify, build engines. Command line: python -m export."""

__dist__ = "dynaguide-edge"
