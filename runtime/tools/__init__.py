"""The commands of python -m runtime, and the code that all command lines share."""
