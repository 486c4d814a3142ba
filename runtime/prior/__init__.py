"""The priors, k-means and frozen networks, and the conversion of pictures to a network's input."""
