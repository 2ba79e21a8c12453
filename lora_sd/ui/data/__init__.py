"""The Data set tab: pictures and captions."""
