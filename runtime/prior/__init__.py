"""What gives a first segmentation: k-means or a frozen network, and how a network is fed."""
