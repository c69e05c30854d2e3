"""What `benchmarks/quantization.py` measures: trained networks, ways to rescale them, and ways to round them."""
