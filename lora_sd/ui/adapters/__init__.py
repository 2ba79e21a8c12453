"""The Adapters tab: all runs and imported files."""
