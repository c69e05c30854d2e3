"""The paper's experiments: networks, data, methods, a fair protocol, results as JSON lines, and pictures of them."""
