"""Where rounds happen: the population, the pure work of a client, runtimes and the driver's loop."""
