"""A search server: an index kept on disk, served over HTTP."""
