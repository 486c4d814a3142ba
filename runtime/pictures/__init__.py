"""Reading pictures: sources, file headers, decoding, and lists of picture files."""
