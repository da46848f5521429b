//! virtio-net (virtio 1.2 §5.1).
