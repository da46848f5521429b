//! The VM object: decides, owns, orders.
