"""What the scripts of benchmarks/ share. Scripts import from here, never from each other."""
