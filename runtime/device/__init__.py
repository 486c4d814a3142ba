"""Find the devices of this machine, load the native module of each, and copy arrays to a GPU."""
