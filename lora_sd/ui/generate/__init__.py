"""The Generate tab: pictures with adapters."""
