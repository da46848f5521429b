//! virtio-console with several ports (virtio 1.2 §5.3).
