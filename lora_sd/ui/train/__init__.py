"""The Train tab: settings, start, and the run as it goes."""
