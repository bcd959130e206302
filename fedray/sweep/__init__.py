"""Many runs by one command: which cells there are, which are done, and running the others on one cluster."""
