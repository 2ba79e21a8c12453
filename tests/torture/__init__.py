"""Runs that are killed, cut off and starved of disk, again and again; `make torture`."""
