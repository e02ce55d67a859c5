"""Studies: running arms and seeds, and their statistics, plots and report."""
