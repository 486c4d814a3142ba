"""Speed of single parts, compared with other programs (peers) that compute the same."""
