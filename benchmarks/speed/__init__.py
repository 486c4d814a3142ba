"""How fast single parts are, beside others that compute the same."""
