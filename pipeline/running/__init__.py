"""The driver of a run: its stages, services, retries, signals, and submission as a job."""
