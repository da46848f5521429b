//! Tests of the hot-plug registers, from both sides.
