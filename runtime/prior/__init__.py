"""The priors that compute a first segmentation, k-means or a frozen network, and the network's input."""
