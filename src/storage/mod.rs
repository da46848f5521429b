//! Where a disk's bytes are: the completion-based DiskBackend contract and the raw file.
