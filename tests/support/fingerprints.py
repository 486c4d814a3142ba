"""One number for all that a result holds."""

import hashlib


def fingerprint(result):
    """Of every array, bit by bit."""
    arrays = (result.labels, result.regions, result.confidence, result.image)
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()
