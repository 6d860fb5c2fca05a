"""Model runtimes that run with clustered heads."""
