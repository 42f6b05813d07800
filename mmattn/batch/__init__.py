"""Many items in one run: job files, items, a worker for any engine, the manifest, and file writers."""
