"""Programs over the public names of forerun: command line and benchmarks."""
