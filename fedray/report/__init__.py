"""Runs in, tables out: reads run directories and nothing else."""
