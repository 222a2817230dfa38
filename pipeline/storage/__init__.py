"""Where results are kept (a folder, or an object store with a working copy) and the leases of their
writers."""
