"""What can be computed of adapters: spectra, truncation, sums, differences. No file, no model."""
