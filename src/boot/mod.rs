//! What the guest finds at its first instruction: kernel, initrd, command line, memory map, registers.
