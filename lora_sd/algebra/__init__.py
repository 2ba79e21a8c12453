"""What can be computed of adapters: spectra, truncation, sums, differences, extraction."""
