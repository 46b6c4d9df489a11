"""How runs are started and ended: processes, signals, sweeps, workers, output that nobody reads."""
