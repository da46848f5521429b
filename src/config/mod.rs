//! What a VM is, on paper: the configuration document, its versions and its validating builder.
