"""The commands of python -m runtime, and what all command lines share."""
