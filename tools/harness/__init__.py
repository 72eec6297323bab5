"""What tests and benchmarks share: servers, media, cases, results."""
