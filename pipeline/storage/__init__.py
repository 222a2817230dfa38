"""Where results are kept (a folder, or an object store with a working copy) and the lease of one writer."""
