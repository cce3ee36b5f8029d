"""RUN_DIR/report.html, and the figures that it shares with sweeps and benchmarks."""
