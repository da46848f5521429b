//! VM objects on Linux KVM.
