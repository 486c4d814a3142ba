"""How good the labels are: scores against people's truth, of pictures and of streams."""
