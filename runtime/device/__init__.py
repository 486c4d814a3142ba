"""The devices of this machine: finding them, the native module of each, and copies to a GPU."""
